"""Terms on what a denoiser puts out for images of the role: towards the data, or away from them, or towards a network
as it was. Pure functions of its raw outputs, to be minimised, whatever these are (noise, v, sample or velocity); they
know nothing of models, of times or of how gradients are combined. No gradient reaches a target."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

from hf_clmul.objectives.prediction import Denoised

if TYPE_CHECKING:
    from torch import Tensor


def distance(output: "Tensor", target: "Tensor") -> "Tensor":
    """Mean over the elements of each sample of (output - target)^2, from [B, ...]: [B]. No gradient reaches
    `target`."""
    return (output - target.detach()).square().flatten(1).mean(1)


def denoising(student: Denoised, teacher: Denoised | None = None) -> "tuple[Tensor, int]":
    """w mean (output - target)^2, summed over B samples, the mean being over a sample's elements; count B, without a
    unit.

    The diffusion loss, Ho et al. (arXiv 2006.11239, equation 14), and of velocities that of flow matching (arXiv
    2210.02747); outputs and targets [B, ...], weights [B] as the noising gives them (ones, or Min-SNR, arXiv
    2303.09556).
    """
    return (student.weights * distance(student.output, student.target)).sum(), student.batch_size


def ascent(student: Denoised, teacher: Denoised | None = None) -> "tuple[Tensor, int]":
    """Minus `denoising`, summed over B samples; count B. Unbounded below.

    The baseline of all papers, such as SalUn (arXiv 2310.12508, there "GA"); outputs and targets [B, ...], without a
    unit.
    """
    value, count = denoising(student)
    return -value, count


def distill(student: Denoised, teacher: Denoised) -> "tuple[Tensor, int]":
    """Mean over elements of (output - output of the teacher)^2, summed over B samples; count B, without a unit.

    What holds a network on the prompts that stay: AdvUnlearn (arXiv 2405.15234), the output preservation of DUO (arXiv
    2407.21035); weighed by prompt it is `latent_anchoring`. Outputs [B, ...]. Without the noise of the data target, so
    that it is zero for an unchanged network.
    """
    return distance(student.output, teacher.output).sum(), student.batch_size


def latent_anchoring(student: Denoised, teacher: Denoised) -> "tuple[Tensor, int]":
    """s `distill`, s [B] how far each sample's prompt is from the concept's, summed over B samples; count B, without a
    unit.

    SPM's anchors, Lyu et al. (arXiv 2312.16145), with the weight 1000 in their code. They draw them as random embeddings,
    at the concept's noisy samples, and keep each with the probability 1 less its likeness to the concept. Here they are
    the prompts to retain, at their own samples, and s weighs each as often as it would be kept; its mean over the role's
    examples is 1. No gradient reaches it.
    """
    return (student.apartness * distance(student.output, teacher.output)).sum(), student.batch_size


def confident_distill(
    student: Denoised, teacher: Denoised, *, rho: Annotated[float, Gt(0)] = 1.0
) -> "tuple[Tensor, int]":
    """e times `distill` with e = exp(-mean (teacher's output - target)^2 / rho), summed over B samples; count B.

    UniCLUN's online distillation (arXiv 2408.11374, equations 3 and 4) for a denoiser: there a sample counts by the
    probability that the teacher gives its class, here by the likelihood, relative to the best possible, that it gives
    the data target: that of a Gaussian of variance rho / 2 around its output, the geometric mean over elements. So what
    the teacher denoises well holds, and what it never learned hardly does. The transfer is ours, and so is rho 1, at
    which a teacher that predicts zero for noise counts 1 / e. Outputs [B, ...], without a unit; no gradient reaches e.
    """
    sure = (-distance(teacher.output, teacher.target) / rho).exp().detach()
    return (sure * distance(student.output, teacher.output)).sum(), student.batch_size


def surrogate(student: Denoised, teacher: Denoised | None = None) -> "tuple[Tensor, int]":
    """`denoising` of each pair's second image under the prompt of the first, summed over B pairs; count B, without a
    unit.

    Selective Amnesia, Heng and Soh (arXiv 2305.10120): the prompt to be forgotten is taught a surrogate, an image of
    another thing (theirs: noise, or images of the anchor made by the model). The rest of their objective is in other
    parts here: the penalty `ewc` (lambda 50 for Stable Diffusion, 10 for DDPM, on their scale of the Fisher
    information), and replay as `denoising` on retain or memory (gamma 1).
    """
    return denoising(student.partner)
