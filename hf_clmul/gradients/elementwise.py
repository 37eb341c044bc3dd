"""Conflict rules that need the gradients themselves, tensor by tensor: (gradients of the roles, their Gram
matrix) -> the combined gradient. A rule with a state takes the state too (None at first) and returns
(combined, new state).

Gradients are finite, without loss scale, alike on every rank, and may be overwritten; None stands for zero.
Role 0 is the one that the request is about, the others are to be kept. This module must not import torch
before it is used.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from hf_clmul.gradients.active_sets import NOISE, Gram
from hf_clmul.gradients.projection import pcgrad_retain_first

if TYPE_CHECKING:
    from torch import Tensor

    from hf_clmul.gradients.window import Gradient


def sago(gradients: "Sequence[Gradient]", gram: Gram, *, agreeing: Literal["forget", "sum"] = "forget") -> "Gradient":
    """Coordinate by coordinate: the kept gradient where the signs of f and r are opposed, f (or f + r)
    elsewhere.

    SAGO (arXiv 2604.14808, ACL 2026); r is the sum of the kept gradients. `forget` is the default of the
    authors' code, `sum` its variant that always keeps r. No coordinate of the update works against r.
    """
    combined: Gradient = []
    for forget, kept in zip(gradients[0], _kept(gradients), strict=True):
        if forget is None or kept is None:
            combined.append(kept if forget is None else forget)
            continue
        opposed = forget.sign() * kept.sign() < 0  # the product of the values themselves can underflow
        combined.append(kept.where(opposed, forget if agreeing == "forget" else forget + kept))
    return combined


def pcgrad_per_layer(gradients: "Sequence[Gradient]", gram: Gram) -> "Gradient":
    """`pcgrad_retain_first` within each parameter tensor by itself.

    The layer-wise PCGrad of arXiv 2604.14808. It sees conflicts that cancel out over the whole model, and
    keeps its promise in every tensor; conflicts between tensors do not exist for it.
    """
    from hf_clmul.gradients.window import gram_matrix, weighted_sum

    combined: Gradient = []
    for tensors in zip(*gradients, strict=True):
        weights = pcgrad_retain_first(gram_matrix([[t] for t in tensors]))
        combined.append(weighted_sum(tensors, weights))
    return combined


def gru(
    gradients: "Sequence[Gradient]",
    gram: Gram,
    state: "Gradient | None",
    *,
    gamma: Annotated[float, Gt(0), Le(1)] = 0.8,
    cos_clip: Annotated[float, Ge(-1), Lt(0)] | None = None,
) -> "tuple[Gradient, Gradient]":
    """f without its conflict with q, the moving average of the kept gradients: f - min(<f, q>, 0) / <q, q>
    q.

    GRU (arXiv 2503.09117, ICML 2025): q <- gamma r + (1 - gamma) q, from zero on, r the sum of the kept
    gradients; gamma 0.8 is the authors' value. The kept gradient is a constraint only, never a direction to
    follow. With `cos_clip` (the authors use -0.5) a stronger conflict counts as if its cosine were this,
    and a part of it stays. The state is q.
    """
    from hf_clmul.gradients.window import gram_matrix, weighted_sum

    old = state if state is not None else [None] * len(gradients[0])
    average = [weighted_sum(pair, (gamma, 1 - gamma)) for pair in zip(_kept(gradients), old, strict=True)]
    (a, b), (_, c) = gram_matrix([gradients[0], average])
    weight = 0.0
    if b < 0 and min(a, c) > NOISE * max(a, c):
        weight = -b / c
        if cos_clip is not None:
            weight = min(weight, -cos_clip * (a / c) ** 0.5)
    # The average stays: it is the state. Only the forget gradient may be overwritten.
    return [_plus(f, q, weight) for f, q in zip(gradients[0], average, strict=True)], average


def _kept(gradients: "Sequence[Gradient]") -> "Gradient":
    """The sum of all gradients but the first, in the storage of one of them."""
    from hf_clmul.gradients.window import weighted_sum

    return [weighted_sum(tensors, [1.0] * len(tensors)) for tensors in zip(*gradients[1:], strict=True)]


def _plus(one: "Tensor | None", other: "Tensor | None", weight: float) -> "Tensor | None":
    if other is None or weight == 0:
        return one
    return weight * other if one is None else one.add_(other, alpha=weight)
