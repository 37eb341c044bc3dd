"""Terms that steer a denoiser away from a concept: towards what a network says without it, of something else in its
place, or where it knows nothing. Pure functions of raw outputs, to be minimised, whatever these are (noise, v, sample
or velocity); they know nothing of models or of how gradients are combined. No gradient reaches a target."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from hf_clmul.objectives.denoising import distance
from hf_clmul.objectives.prediction import Denoised
from hf_clmul.objectives.preference import log_sigmoid

if TYPE_CHECKING:
    from torch import Tensor


def esd(student: Denoised, teacher: Denoised, *, eta: Annotated[float, Ge(0)] = 2.0) -> "tuple[Tensor, int]":
    """Negative guidance: mean (output - (c - eta (c - u)))^2, summed over B samples; count B. c, u [B, ...]: the
    teacher's outputs under the concept's prompt and under the empty one.

    Erased stable diffusion, Gandikota et al. (arXiv 2303.07345, its fine-tuning target), in the form of their later
    code, which begins at c where the paper begins at u: eta here is the paper's plus 1. Default 2: that code's for
    Stable Diffusion 1.4, the paper's 1; for SDXL it takes 1, the unconditional output itself. The coefficients of c and
    u add up to one, so that noise, v and velocity share one target, up to a weight by time. Without a unit.
    """
    conditional, empty = teacher.output, teacher.variants["empty"]
    return distance(student.output, conditional - eta * (conditional - empty)).sum(), student.batch_size


def concept_ablation(student: Denoised, teacher: Denoised) -> "tuple[Tensor, int]":
    """Mean (output - a)^2, summed over B samples; count B. a [B, ...]: the teacher's output under the anchor prompt.

    Concept ablation, Kumari et al. (arXiv 2303.13516), their model-based variant: what the concept's prompt asks for
    becomes what the anchor's does. Their code takes a from the network in training, which is `relabel`, and adds the
    noise to images of the anchor: give such images with the concept's prompt. Without a unit.
    """
    return distance(student.output, teacher.variants["anchor"]).sum(), student.batch_size


def relabel(student: Denoised, teacher: Denoised | None = None) -> "tuple[Tensor, int]":
    """Mean (output - sg[a])^2, summed over B samples; count B. a [B, ...]: the student's own output under the anchor
    prompt.

    SalUn, Fan et al. (arXiv 2310.12508), its loss for generation: the target moves along with the network. No gradient
    reaches it. Their masks are `saliency`, and the retain term is `denoising`. Without a unit.

    With `denoising` on retain it is EraseDiff too (arXiv 2401.05779): L_retain + lambda (L(theta) - L(theta_K)), L the
    forget loss and theta_K the weights after K steps on it alone. In the authors' code L(theta_K) is a constant, which
    has no gradient, so that nothing is left of it but lambda, the weight of this term: 1 in their commands for Stable
    Diffusion, 0.1 the default. An option of their code for DDPM takes it from the gradients f and r, max(0, 0.1 - <f, r>
    / (|f| |r|)): the conflict rule `bome` with `agreement: cosine`.
    """
    return distance(student.output, student.variants["anchor"]).sum(), student.batch_size


def incompetent(student: Denoised, teacher: Denoised) -> "tuple[Tensor, int]":
    """`distill` to a network that knows nothing: mean (output - output of it)^2, summed over B samples; count B.

    Chundawat et al. (arXiv 2205.08096) and UniCLUN (arXiv 2408.11374), there with divergences of classes. `weights`
    says which it is: a frozen network of the same architecture with random weights, the default, or `zero`, which
    predicts zero: for noise, and for v and velocity where latents have the mean zero, that is the mean of the target,
    the best that can be said without a look at the input. Unlike the other targets it means another thing in each
    parameterisation. Without a unit.
    """
    return distance(student.output, teacher.output).sum(), student.batch_size


def duo(student: Denoised, teacher: Denoised, *, beta: Annotated[float, Gt(0)] = 500.0) -> "tuple[Tensor, int]":
    """-log sigmoid(-beta ((e+ - e0+) - (e- - e0-))), summed over B pairs; count B, in nats. e is w times the mean over
    elements of (output - target)^2 of the student, e0 of the teacher; + is the partner, the image to be preferred, -
    the sample itself.

    Direct unlearning optimisation, Park et al. (arXiv 2407.21035), after Diffusion-DPO (arXiv 2311.12908, equation 14).
    Outputs [B, ...]; w [B] are the denoising weights, 1 in the authors' code. Default 500: theirs for nudity in Stable
    Diffusion 1.4 and 3; for violence they take 1000. Their pairs are of the safe image made from each unsafe one, under
    the empty prompt; beside it they hold the output at the last time, of which `distill` is the like.
    """
    gained = _error(student.partner) - _error(teacher.partner).detach()
    lost = _error(student) - _error(teacher).detach()
    return -log_sigmoid(-beta * (gained - lost)).sum(), student.batch_size


def _error(one: Denoised) -> "Tensor":
    return one.weights * distance(one.output, one.target)


def attention_suppression(student: Denoised, teacher: Denoised | None = None) -> "tuple[Tensor, int]":
    """a^2, summed over B samples; count B. a [B], in [0, 1]: the mean part of the cross-attention on the concept's
    tokens.

    Forget-Me-Not (arXiv 2303.17591), which squares the maps themselves, and EraseAnything (arXiv 2412.20413), which
    adds it with the weight 0.001 to `esd`. Its minimum says nothing of what is drawn instead.
    """
    return student.attention.square().sum(), student.batch_size
