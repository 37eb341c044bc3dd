"""Conflict rules that take out of a gradient what works against another one. Pure functions of the Gram
matrix; no torch.

Row and column 0 belong to the role that the request is about (`learn` or `forget`); the others are to be
kept. Below: f is gradient 0, r the kept one, and for two roles a = <f, f>, b = <f, r>, c = <r, r>.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

from hf_clmul.gradients.active_sets import NOISE, Gram, lengths_and_cosines, multipliers

if TYPE_CHECKING:
    import numpy as np


def _project(gram: Gram, start: int, others: Sequence[int]) -> list[float]:
    """Coefficients [m] of gradient `start` after taking out, one after the other, its conflict with each of
    `others`."""
    coefficients = [0.0] * len(gram)
    coefficients[start] = 1.0
    for j in others:
        dot = sum(c * row[j] for c, row in zip(coefficients, gram, strict=True))
        small, large = sorted((gram[j][j], gram[start][start]))
        if dot < 0 and small > NOISE * large:
            coefficients[j] -= dot / gram[j][j]
    return coefficients


def pcgrad(gram: Gram) -> list[float]:
    """Every gradient is projected off those it conflicts with, then all are added.

    Yu et al. (arXiv 2001.06782, algorithm 1). For two roles w = (1 - min(b, 0) / a, 1 - min(b, 0) / c); the
    paper's random order matters from three roles on, and is replaced by the roles' order so that ranks and
    resumes agree.
    """
    m = len(gram)
    rows = [_project(gram, i, [j for j in range(m) if j != i]) for i in range(m)]
    return [sum(column) for column in zip(*rows, strict=True)]


def pcgrad_retain_first(gram: Gram) -> list[float]:
    """Only the gradient of role 0 is projected; the kept roles' gradients stay whole. Two roles: w = (1, 1
    - min(b, 0) / c).

    The asymmetric form of PCGrad for unlearning (arXiv 2604.14808, over all parameters at once): to first
    order, plain gradient descent with this update does not raise the retain loss.
    """
    kept = range(1, len(gram))
    return [w + (i > 0) for i, w in enumerate(_project(gram, 0, kept))]


def agem(gram: Gram, *, margin: Annotated[float, Ge(0)] = 0.0) -> list[float]:
    """The vector nearest to f with <g, g_j> >= margin <g_j, g_j> for every kept role j. Two: w = (1, max(0,
    margin - b / c)).

    A-GEM (arXiv 1812.00420, equation 11) for one kept role, GEM (arXiv 1706.08840, equation 11) for
    several: the kept gradients are constraints, never directions to follow. With margin 0, as in the
    papers, the constraint holds with equality, and an optimizer that rescales coordinates can undo it; a
    margin in units of the kept role's own descent is ours. With margin 1 the promise is that of
    `pcgrad_retain_first`. A zero kept gradient constrains nothing. If a margin above 0 cannot be met,
    because kept gradients are opposed to each other, the constraints are met as far as possible.
    """
    lengths, cosines = lengths_and_cosines(gram)
    kept = [j for j in range(1, len(gram)) if lengths[j] > 0]
    slopes = cosines[0, kept] * lengths[0] - margin * lengths[kept]
    weights = [1.0] + [0.0] * (len(gram) - 1)
    if kept:
        found = multipliers(cosines[kept][:, kept], slopes) / lengths[kept]
        for j, v in zip(kept, found, strict=True):
            weights[j] = float(v)
    return weights


def upgrad(gram: Gram) -> list[float]:
    """The mean of the gradients, each first replaced by the nearest vector that conflicts with none of
    them.

    Quinton and Rey (arXiv 2406.16232, definition 3 with equal preferences). For two roles half of `pcgrad`;
    for more, unlike `pcgrad`, the update never conflicts with any of them, whatever their order.
    """
    m = len(gram)
    lengths, cosines = lengths_and_cosines(gram)
    weights = [1.0 / m] * m
    some = [i for i in range(m) if lengths[i] > 0]
    unit = cosines[some][:, some]
    for row, i in zip(unit, some, strict=True):
        for v, j in zip(multipliers(unit, row), some, strict=True):
            weights[j] += float(v * (lengths[i] / lengths[j])) / m
    return weights


def blur(gram: Gram, *, gamma: Annotated[float, Gt(0)] = 1.0) -> list[float]:
    """gamma f, plus the kept gradients made orthogonal to f: w = (gamma - sum of <f, g_j> / <f, f>, 1, ...,
    1).

    BLUR (arXiv 2506.08164): forgetting is the lower level of two and comes first, retaining moves only
    where it does not matter to forgetting, so that <g, f> = gamma <f, f> always. gamma 1 is the authors'
    value for MUSE. Unlike all other rules it also takes out agreement. A zero f leaves the kept gradients
    whole.
    """
    lengths, cosines = lengths_and_cosines(gram)
    shared = cosines[0, 1:] @ lengths[1:] / lengths[0] if lengths[0] > 0 else 0.0
    return [float(gamma - shared), *[1.0] * (len(gram) - 1)]


def bome(
    gram: Gram,
    *,
    eta: Annotated[float, Ge(0)] = 0.5,
    agreement: Literal["projection", "cosine"] = "projection",
) -> list[float]:
    """lambda f, plus the kept gradients: w = (lambda, 1, ..., 1) with lambda = max(0, eta - agreement of the two).

    `projection`: with r the sum of the kept gradients lambda = max(0, eta - <f, r> / <f, f>), so that g is the vector
    nearest to r with <g, f> >= eta <f, f>: forgetting is the lower level of two, and a share of its own descent is
    promised to it. BOME (arXiv 2209.08709), with phi = eta |f|^2 and the 0.5 of the authors' code. Unlike `blur` it
    leaves alone what already agrees.
    `cosine`: lambda = max(0, eta - <f, r> / (|f| |r|)), the option of EraseDiff's code (arXiv 2401.05779), there with
    eta 0.1; lambda then does not depend on the gradients' lengths, and nothing is promised of the speed of forgetting.

    A zero gradient agrees with nothing: lambda is eta.
    """
    lengths, cosines = lengths_and_cosines(gram)
    if agreement == "cosine":
        found = _cosine_to_sum(lengths, cosines)
    else:
        found = cosines[0, 1:] @ lengths[1:] / lengths[0] if lengths[0] > 0 else 0.0
    return [max(0.0, eta - float(found)), *[1.0] * (len(gram) - 1)]


def _cosine_to_sum(lengths: "np.ndarray", cosines: "np.ndarray") -> float:
    """Between gradient 0 and the sum of the others; 0 where either is zero, or they cancel out but for rounding."""
    longest = lengths[1:].max(initial=0.0)
    if longest == 0:
        return 0.0
    shares = lengths[1:] / longest
    squared = float(shares @ cosines[1:, 1:] @ shares)
    if squared <= NOISE:
        return 0.0
    return min(1.0, max(-1.0, float(cosines[0, 1:] @ shares) / math.sqrt(squared)))
