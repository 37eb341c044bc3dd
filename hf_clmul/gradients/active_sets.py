"""Small quadratic programs on Gram matrices, solved exactly by trying every set of active constraints: 2^m
tiny linear systems for m roles. No torch, no rule. Everything is in units of the gradients' lengths, so
that scale cannot matter."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

Gram = Sequence[Sequence[float]]
SINGULAR = 1e-12
"""Smallest eigenvalue of the cosines below which gradients count as linearly dependent."""
NOISE = 2.0**-46
"""A squared norm below this part of another's is float32 rounding: such a gradient has no direction to
conflict with, and counts as zero. (A KL to the model itself has a gradient like that, at the first step of a
request.)"""
ROUNDING = 1e-12
KINK = 1e-6


def lengths_and_cosines(gram: Gram) -> "tuple[np.ndarray, np.ndarray]":
    """Lengths [m] of the gradients and cosines [m, m] between them.

    A gradient that is zero, or noise beside the longest one, has length 0 and is orthogonal to all.
    """
    import numpy as np

    m = len(gram)
    squares = [gram[i][i] for i in range(m)]
    lengths = [math.sqrt(square) if square > NOISE * max(squares) else 0.0 for square in squares]
    cosines = np.eye(m)
    for i in range(m):
        for j in range(m):
            if i != j and lengths[i] > 0 and lengths[j] > 0:
                # One division after the other: the product of two lengths can underflow.
                cosines[i, j] = min(1.0, max(-1.0, gram[i][j] / lengths[i] / lengths[j]))
    return np.array(lengths), cosines


def multipliers(cosines: "np.ndarray", slopes: "np.ndarray") -> "np.ndarray":
    """The v [n] >= 0 with s = cosines v + slopes >= 0 and v_j s_j = 0 for all j.

    With slopes_j = <g, u_j>, g + sum of v_j u_j is the nearest vector to g that has no negative inner
    product with any of the unit vectors u_j.
    """
    import numpy as np

    scale = max(float(np.abs(slopes).max(initial=0.0)), math.ulp(0.0))

    def candidates() -> "Iterator[tuple[float, np.ndarray]]":
        yield max(0.0, -float(slopes.min(initial=0.0))) / scale, np.zeros_like(slopes)
        for face, values, _ in _faces(cosines):
            if values[0] <= SINGULAR:
                continue  # some optimum has independent active constraints
            v = np.zeros_like(slopes)
            v[face] = np.linalg.solve(cosines[np.ix_(face, face)], -slopes[face])
            yield max(0.0, -v.min(), -(cosines @ v + slopes).min()) / scale, v

    return _least_violation(candidates())[1]


def shortest_in_hull(cosines: "np.ndarray", lengths: "np.ndarray") -> "np.ndarray":
    """Weights w [m] >= 0 with sum 1 of the shortest vector sum of w_i g_i. All lengths must be positive."""
    import numpy as np

    inverse = lengths.min() / lengths

    def candidates() -> "Iterator[tuple[float, np.ndarray]]":
        for face, values, vectors in _faces(cosines):
            u, target = np.zeros_like(inverse), inverse  # u_i is w_i times the length of g_i, up to a factor
            if values[0] > SINGULAR:
                u[face] = np.linalg.solve(cosines[np.ix_(face, face)], inverse[face])
            elif values[1] > SINGULAR:  # they can cancel each other: zero is the shortest, if it is in the hull
                u[face], target = vectors[:, 0] * math.copysign(1.0, vectors[:, 0].sum()), 0.0
            else:
                continue  # a smaller set will do
            slack = cosines @ u - target
            yield max(0.0, -u.min(), -slack.min()) / np.abs(u).max(initial=math.ulp(0.0)), u

    w = _least_violation(candidates())[1] / lengths
    return w / w.sum()


def penalised_in_hull(
    cosines: "np.ndarray", lengths: "np.ndarray", slopes: "np.ndarray", radius: float
) -> "np.ndarray":
    """Weights w [m] >= 0 with sum 1 that minimise <g_w, g_0> + radius |g_w|, where g_w = sum of w_i g_i and
    slopes_i = <g_i, g_0> over the length of g_i.

    `radius` must be positive. On a face the minimum solves a quadratic equation for its multiplier. All
    zeros if the minimum is at g_w = 0, where the sum has a kink.
    """
    import numpy as np

    inverse = lengths.min() / lengths
    scale = max(float(np.abs(slopes).max()), math.ulp(0.0))

    def candidates() -> "Iterator[tuple[float, np.ndarray]]":
        for face, values, _ in _faces(cosines):
            if values[0] <= SINGULAR:
                continue
            solved = np.linalg.solve(cosines[np.ix_(face, face)], np.stack([inverse[face], slopes[face]], 1))
            alpha, beta = inverse[face] @ solved
            root = beta**2 - alpha * (slopes[face] @ solved[:, 1] - radius**2)
            if not root > 0:
                continue  # on this face the sum falls without end towards the border, or is flat
            multiplier = (beta + math.sqrt(root)) / alpha
            u = np.zeros_like(inverse)
            u[face] = multiplier * solved[:, 0] - solved[:, 1]  # its length is the radius
            slack = slopes + cosines @ u - multiplier * inverse
            yield max(0.0, -u.min(), -slack.min()) / scale, u

    violation, u = _least_violation(candidates())
    w = u / lengths
    return w / w.sum() if violation < KINK else 0 * w


def _faces(cosines: "np.ndarray") -> "Iterator[tuple[list[int], np.ndarray, np.ndarray]]":
    """Every non-empty set of roles, small ones first, with the eigenvalues and eigenvectors of its
    cosines."""
    import numpy as np

    m = len(cosines)
    for size in range(1, m + 1):
        for face in map(list, combinations(range(m), size)):
            yield face, *np.linalg.eigh(cosines[np.ix_(face, face)])


def _least_violation(candidates: "Iterable[tuple[float, np.ndarray]]") -> "tuple[float, np.ndarray]":
    # What is within rounding of an optimum is one; of these the first has the fewest active constraints.
    violation, found = min(candidates, key=lambda candidate: max(candidate[0], ROUNDING))
    return violation, found.clip(min=0.0)
