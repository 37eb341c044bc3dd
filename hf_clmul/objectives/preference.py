"""Terms that prefer one answer to another, or to none, by whole sequences. Pure functions of predictions, to
be minimised; they know nothing of models, of other roles or of how gradients are combined."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from hf_clmul.objectives.prediction import Prediction

if TYPE_CHECKING:
    from torch import Tensor

Positive = Annotated[float, Gt(0)]


def log_sigmoid(x: "Tensor") -> "Tensor":
    """log(1 / (1 + exp(-x))) without overflow, from tensor methods alone (this module must not import
    torch)."""
    return -(-x).logaddexp(x.new_zeros(()))


def npo(student: Prediction, teacher: Prediction, *, beta: Positive = 0.1) -> "tuple[Tensor, int]":
    """Negative preference optimisation: sum over B sequences of -(2 / beta) log sigmoid(-beta (log p - log
    p_teacher)).

    Zhang et al. (arXiv 2404.05868, equation 3), log-probabilities summed over a sequence's answer, in nats;
    count B. beta 0.1 is the paper's choice. As beta goes to 0 it becomes gradient ascent.
    """
    gain = student.sequence_logps() - teacher.sequence_logps().detach()
    return -(2 / beta) * log_sigmoid(-beta * gain).sum(), student.batch_size


def simnpo(
    student: Prediction, teacher: None = None, *, beta: Positive = 4.5, delta: float = 0.0
) -> "tuple[Tensor, int]":
    """NPO on the mean token log-probability, without a teacher: -(2 / beta) log sigmoid(beta (nll - delta));
    count B.

    Fan et al. (arXiv 2410.07163, equation 4); nll is the mean over a sequence's answer, in nats per token.
    The paper's gamma is beta times delta here. Defaults 4.5 and 0: the authors' setting for TOFU forget10.
    """
    mean_nll = -student.sequence_logps() / student.sequence_lengths()
    return -(2 / beta) * log_sigmoid(beta * (mean_nll - delta)).sum(), student.batch_size


def idk(student: Prediction, teacher: Prediction, *, beta: Positive = 0.1) -> "tuple[Tensor, int]":
    """Preference of a refusal over the answer: -(2 / beta) log sigmoid(beta (gain(refusal) - gain(answer)));
    count B.

    gain = log p - log p_teacher, summed over the sequence, in nats. DPO (arXiv 2305.18290, equation 7) with a
    refusal as the preferred answer, as in TOFU (arXiv 2401.06121, section 4); scaled by 2 / beta like NPO,
    whose first term it is. beta 0.1 as there.
    """
    answer = student.sequence_logps() - teacher.sequence_logps().detach()
    refusal = student.alternative.sequence_logps() - teacher.alternative.sequence_logps().detach()
    return -(2 / beta) * log_sigmoid(beta * (refusal - answer)).sum(), student.batch_size


def dpo(student: Prediction, teacher: Prediction, *, beta: Positive = 0.1) -> "tuple[Tensor, int]":
    """`idk` with each example's own second answer, from the column `alternative` of the data; count B.

    DPO (arXiv 2305.18290, equation 7), scaled by 2 / beta; sums over a sequence, in nats. beta 0.1 as there.
    """
    return idk(student, teacher, beta=beta)


def altpo(student: Prediction, teacher: Prediction, *, beta: Positive = 0.1) -> "tuple[Tensor, int]":
    """`idk` with answers that the model wrote before the request, of the same form and with invented facts; count B.

    Alternate preference optimisation, Mekala et al. (arXiv 2409.13474); sums over a sequence, in nats. beta 0.1 as for
    `idk`, in the middle of the authors' grid 0.05, 0.1, 0.5. They retain with `nll`.
    """
    return idk(student, teacher, beta=beta)


def answer_preservation(student: Prediction, teacher: None = None, *, beta: Positive = 0.1) -> "tuple[Tensor, int]":
    """Preference of the answer over a refusal: -(1 / beta) log sigmoid(beta (log p(answer) - log
    p(refusal))); count B.

    Yuan et al. (arXiv 2410.08109, "AP"), for data to be kept while other questions are to be refused;
    log-probabilities summed over a sequence, in nats; no teacher. beta 0.1 as in the authors' experiments. It
    keeps the order of the two and not the answer's probability.
    """
    margin = student.sequence_logps() - student.alternative.sequence_logps()
    return -(1 / beta) * log_sigmoid(beta * margin).sum(), student.batch_size
