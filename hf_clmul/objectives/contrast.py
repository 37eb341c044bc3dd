"""Terms on how the sequences of a batch lie to each other: pooled hidden states, drawn together and apart. Pure functions of
predictions, to be minimised; they know nothing of models or of how gradients are combined. Importing this module does not
import torch."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt

from hf_clmul.objectives.prediction import Prediction
from hf_clmul.objectives.representation import Layer

if TYPE_CHECKING:
    from torch import Tensor

DEEP = 3 / 4
"""A layer that has read the whole sequence and does not yet spell out the next token: ours, as the papers have images."""
SIZE = 64
"""Components of a feature: those of UniCLUN's head."""
Temperature = Annotated[float, Gt(0)]
Seed = Annotated[int, Ge(0)]


def projection(width: int, seed: int) -> "Tensor":
    """A random matrix [width, SIZE] of normal numbers in float64: the same for a seed on every device and rank."""
    import torch

    return torch.randn(width, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(prediction: Prediction, layer: float, seed: int) -> "Tensor":
    """Of each sequence the mean of its hidden states at supervised positions, projected, of length 1: [B, SIZE]."""
    states = prediction.hidden[layer]
    sums = states.new_zeros(prediction.batch_size, states.shape[-1]).index_add(0, prediction.rows, states)
    pooled = sums / prediction.sequence_lengths()[:, None]
    projected = pooled @ projection(states.shape[-1], seed).to(pooled)
    return projected / projected.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def same_class(prediction: Prediction) -> "Tensor":
    """Which pairs of sequences share a class, each with itself in any case: bool [B, B]."""
    itself = prediction.rows.new_ones(prediction.batch_size).diag().bool()
    if prediction.classes is None:
        return itself
    classes = prediction.classes
    return itself | ((classes[:, None] == classes) & (classes >= 0))


def _from_positives(similarities: "Tensor", positives: "Tensor") -> "Tensor":
    """Minus the log-probability of a positive among all candidates, averaged over an anchor's positives, summed over
    anchors [A, B]."""
    logps = similarities.log_softmax(-1).masked_fill(~positives, 0.0)
    return -(logps.sum(-1) / positives.sum(-1)).sum()


def contrastive_distill(
    student: Prediction,
    teacher: Prediction,
    *,
    layer: Layer = DEEP,
    temperature: Temperature = 0.07,
    seed: Seed = 0,
) -> "tuple[Tensor, int]":
    """Each teacher's feature finds the student's of its class: sum over B anchors of the mean over positives p of
    -log softmax_j(t_i s_j / temperature)_p; count B.

    UniCLUN (arXiv 2408.11374, L_cd), after OCD-Net (IJCAI 2022). t_i, s_j [64]: hidden states [N, H] of teacher and student,
    averaged over a sequence's supervised positions, projected, of length 1; candidates are the batch's B sequences, positives
    those of the anchor's class with the anchor itself, without classes itself alone. No gradient reaches the teacher. In nats.
    Temperature and size are the authors' code's, which weighs the term 0.1 and trains an MLP as its head: here the projection
    is random and fixed, so that nothing but the model has to be kept.
    """
    anchors, candidates = features(teacher, layer, seed).detach(), features(student, layer, seed)
    return _from_positives(anchors @ candidates.T / temperature, same_class(student)), student.batch_size


def sup_con(
    student: Prediction,
    teacher: None = None,
    *,
    layer: Layer = DEEP,
    temperature: Temperature = 0.07,
    seed: Seed = 0,
) -> "tuple[Tensor, int]":
    """Sequences of a class draw together: sum over B anchors of the mean over positives p of
    -log softmax_j(s_i s_j / temperature)_p, j and p other than i; count B.

    Supervised contrastive learning, Khosla et al. (arXiv 2004.11362, equation 2), as in UniCLUN (arXiv 2408.11374, L_scl, weight
    0.3 in the authors' code; their second views, rotated images, have no like in text). Features s_i [64] as in
    `contrastive_distill`; in nats. An anchor whose class nobody else has adds 0.
    """
    found, positives = features(student, layer, seed), same_class(student).fill_diagonal_(False)
    anchors = positives.any(-1)
    similarities = (found @ found.T / temperature).fill_diagonal_(float("-inf"))
    return _from_positives(similarities[anchors], positives[anchors]), student.batch_size
