"""Terms that pull the student's distribution towards a teacher's, or push it away. Pure functions of
predictions, to be minimised; they know nothing of models, of teachers' kinds or of how gradients are
combined. No gradient reaches a teacher."""

from math import log
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hf_clmul.objectives.prediction import Prediction

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Gt(0)]


def divergence(log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    """KL(p || q) of each row, in nats, from log-probabilities [N, V]: [N]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    """Half of KL(p || m) + KL(q || m) with m = (p + q) / 2, in nats (at most log 2), from log-probabilities
    [N, V]: [N]."""
    log_m = log_p.logaddexp(log_q) - log(2)
    return (divergence(log_p, log_m) + divergence(log_q, log_m)) / 2


def softened(logits: "Tensor", temperature: float) -> "Tensor":
    return logits if temperature == 1 else logits / temperature


def kl(
    student: Prediction,
    teacher: Prediction,
    *,
    direction: Literal["forward", "reverse"] = "forward",
    temperature: Positive = 1.0,
) -> "tuple[Tensor, int]":
    """KL(teacher || student), or reverse KL(student || teacher), summed over the N supervised tokens, in
    nats; count N.

    TOFU (arXiv 2401.06121, section 4, "KL minimization"; forward, the default, is theirs) on the answer only:
    prompts and padding take no part, unlike in implementations that average over all positions. Logits are
    [N, V]. A `temperature` T other than 1 divides both logits by T and multiplies the value by T^2, so that gradients keep
    their size (Hinton et al., arXiv 1503.02531, section 2). On `learn`, with the teacher `before_request`, it is learning
    without forgetting (LwF, arXiv 1606.09282), there with T = 2.
    """
    log_p = softened(teacher.logits.detach(), temperature).log_softmax(-1)
    log_q = softened(student.logits, temperature).log_softmax(-1)
    if direction == "reverse":
        log_p, log_q = log_q, log_p
    return temperature**2 * divergence(log_p, log_q).sum(), student.tokens


def js(student: Prediction, teacher: Prediction) -> "tuple[Tensor, int]":
    """Jensen-Shannon divergence to the teacher, summed over the N supervised tokens, in nats (at most log 2
    each); count N.

    Singh et al. (arXiv 2509.02820), the retain loss of JensUn. Logits are [N, V].
    """
    log_p, log_q = teacher.logits.detach().log_softmax(-1), student.logits.log_softmax(-1)
    return jensen_shannon(log_p, log_q).sum(), student.tokens


def logit_mse(student: Prediction, teacher: Prediction) -> "tuple[Tensor, int]":
    """Mean over the vocabulary of (z - z_teacher)^2, summed over the N supervised tokens; logits [N, V];
    count N.

    Buzzega et al. (arXiv 2004.07211, "dark experience replay"); without a unit. Unlike KL it also holds a
    constant that is added to all logits, which changes no probability.
    """
    return (student.logits - teacher.logits.detach()).square().mean(-1).sum(), student.tokens


def confident_mse(student: Prediction, teacher: Prediction, *, rho: Positive = 1.0) -> "tuple[Tensor, int]":
    """w_t times the mean over the vocabulary of (z - z_teacher)^2, summed over the N supervised tokens; count N.

    UniCLUN (arXiv 2408.11374, equations 3 and 4), after OCD-Net (IJCAI 2022): w_t is the probability that the teacher gives the
    right token at temperature `rho`, so that it counts where it is right. Logits [N, V], targets [N]; no gradient reaches the
    teacher; without a unit. The mean over the vocabulary and rho 1 are the authors' code's, which weighs the term 0.1.
    """
    z = teacher.logits.detach()
    sure = softened(z, rho).softmax(-1).gather(1, student.targets[:, None]).squeeze(1)
    return (sure * (student.logits - z).square().mean(-1)).sum(), student.tokens


def undial(student: Prediction, teacher: Prediction, *, beta: Positive = 10.0) -> "tuple[Tensor, int]":
    """Self-distillation to adjusted logits: cross-entropy with softmax(z_teacher - beta onehot(y_t)) over N
    tokens; count N.

    Dong et al. (arXiv 2402.10052); the right token's logit is lowered by beta, all others keep their order.
    In nats, on supervised tokens only; logits [N, V], targets [N]. Default 10: the authors search 3, 10 and
    30.
    """
    z, right = teacher.logits.detach(), student.targets[:, None]
    adjusted = z.scatter_add(1, right, z.new_full(right.shape, -beta))
    return -(adjusted.softmax(-1) * student.logits.log_softmax(-1)).sum(), student.tokens


def bad_teacher(student: Prediction, teacher: Prediction) -> "tuple[Tensor, int]":
    """KL(teacher || student) to a teacher that knows nothing, summed over the N supervised tokens, in nats;
    count N.

    Chundawat et al. (arXiv 2205.08096), its part on forget data; also the unlearning loss of UniCLUN (arXiv
    2408.11374). `weights` says which the teacher is: a frozen model of the same architecture with random weights, the default, or
    `uniform`; logits are [N, V].
    """
    return kl(student, teacher)


def elm(student: Prediction, teacher: Prediction, *, eta: Annotated[float, Ge(0)] = 1000.0) -> "tuple[Tensor, int]":
    """Self-distillation to guided logits: cross-entropy with softmax(log q + eta (log q_novice - log q_expert)); count N.

    Erasure of language memory, Gandikota et al. (arXiv 2410.02760), its erasing loss; q_novice and q_expert are the
    teacher's answers behind a text that makes it play one; no gradient reaches them. In nats, over the N supervised
    tokens; logits [N, V]. Default 1000: the authors' choice for Zephyr-7B; so large an eta leaves hardly more than the
    token that the novice prefers most. Their consistency loss, for fluent text, is not built; retain with `kl`.
    """
    plain, novice, expert = (
        said.logits.detach().log_softmax(-1)
        for said in (teacher, teacher.variants["novice"], teacher.variants["expert"])
    )
    target = (plain + eta * (novice - expert)).softmax(-1)
    return -(target * student.logits.log_softmax(-1)).sum(), student.tokens


def scrub(student: Prediction, teacher: Prediction) -> "tuple[Tensor, int]":
    """Minus KL(teacher || student), summed over the N supervised tokens, in nats; count N. Unbounded below.

    Kurmanji et al. (arXiv 2302.09880), the part on forget data; logits [N, V]. Only the loss: the authors
    take their steps on forget and retain data in turn, which is the conflict rule `alternate`.
    """
    value, count = kl(student, teacher)
    return -value, count


def whp(student: Prediction, teacher: Prediction, *, alpha: Annotated[float, Ge(0)] = 5.0) -> "tuple[Tensor, int]":
    """Generic prediction: cross-entropy with softmax(z - alpha relu(z_reinforced - z)), z the teacher's logits; count N.

    Eldan and Russinovich (arXiv 2310.02238, "Who's Harry Potter?", equation 1): what more training on the data raises is
    what belongs to it. In nats, over the N supervised tokens; logits [N, V]; no gradient reaches the two. Default 5:
    theirs. Two things differ: they learn the most likely token of that distribution, here it is the whole of it; and
    they replace names in the text before (the anchor terms), which is not built.
    """
    z, reinforced = teacher.logits.detach(), teacher.variants["reinforced"].logits.detach()
    target = (z - alpha * (reinforced - z).clamp(min=0)).softmax(-1)
    return -(target * student.logits.log_softmax(-1)).sum(), student.tokens


def der(student: Prediction, teacher: Prediction) -> "tuple[Tensor, int]":
    """KL(stored || student), summed over the N supervised tokens, in nats; count N. What is stored is a teacher's k most
    likely tokens [N, k], all others being one more: sum over these of q (log q - log p) + q_rest (log q_rest - log p_rest).

    Dark experience replay, Buzzega et al. (arXiv 2004.07211): targets stored when an example was seen hold the model where
    it was. They begin with this divergence and then take the squared distance of all logits in its place, which needs every
    logit of a vocabulary and also holds a constant that is added to all, though it changes no probability; `logit_mse` has
    that distance, to a teacher that is there. Equal to `kl` where k is the vocabulary's size, else never above it. Student
    logits are [N, V]. With `nll` beside it, weighed by the authors' beta, it is DER++.
    """
    q, log_p = teacher.top, student.logits.log_softmax(-1)
    found = divergence(q.logps.detach(), log_p.gather(1, q.ids)).sum()
    if q.ids.shape[-1] < log_p.shape[-1]:  # else nothing is left, and its logarithm has no gradient
        rest = log_p.scatter(1, q.ids, -float("inf")).logsumexp(-1)
        tail = q.tail.detach().clamp(min=-1e4)  # of a mass of zero: zero times a finite number
        found = found + (tail.exp() * (tail - rest)).sum()
    return found, student.tokens
