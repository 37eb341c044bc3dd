"""Conflict rules that look for one direction good for all roles. Pure functions of the Gram matrix; no torch.

No role comes first here: permuting the roles permutes the weights. f and r are the gradients of two roles,
a, b, c their inner products <f, f>, <f, r>, <r, r>.
"""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Lt

from hf_clmul.gradients.active_sets import Gram, lengths_and_cosines, penalised_in_hull, shortest_in_hull

if TYPE_CHECKING:
    import numpy as np

DEPENDENT = 1e-6
"""An eigenvalue of the cosines below this is rounding of gradients in float32; so is 1 + cosine of two
opposed ones."""
NEWTON_STEPS = 100


def mgda(gram: Gram) -> list[float]:
    """The shortest vector in the convex hull of the gradients.

    For two roles w_f = (c - b) / (a + c - 2b), but within [0, 1], and w_r = 1 - w_f.

    Désidéri (Comptes Rendus Mathématique 350, 2012), Sener and Koltun (arXiv 1810.04650, equation 3). It
    conflicts with no gradient and is zero exactly at Pareto-stationary points. A role with zero gradient is
    such a point: all weights are then 0.
    """
    lengths, cosines = lengths_and_cosines(gram)
    if not lengths.all():
        return [0.0] * len(gram)
    return shortest_in_hull(cosines, lengths).tolist()


def bisector(gram: Gram, *, length: Literal["imtl", "nash", "unit"] = "nash") -> list[float]:
    """The bisector of the angle between the gradients: for two roles f / |f| + r / |r|, times a length.

    `imtl`: w adds up to 1, w = (|r|, |f|) / (|f| + |r|) (IMTL-G, Liu et al., ICLR 2021).
    `nash`: G w = 1 / w, that is w = (1 / |f|, 1 / |r|) / sqrt(1 + cos), an update of length sqrt(2)
    (Nash-MTL, arXiv 2202.01017; for two roles also MUNBa, arXiv 2411.15537).
    `unit`: w = (1 / |f|, 1 / |r|), an update of length sqrt(2 + 2 cos) (NGDiff, arXiv 2410.22086).

    From three roles on the directions differ: equal projections on all gradients (imtl), the Nash
    bargaining solution (nash), the sum of unit gradients (unit). The length of `nash` and `unit` does not
    depend on the gradients, so that the learning rate alone sets the step; they leave a zero gradient out,
    while `imtl` becomes zero with it. Exactly opposed gradients have no bisector: the update is zero up to
    rounding, which `nash` magnifies at most a thousandfold.
    """
    lengths, cosines = lengths_and_cosines(gram)
    some = lengths > 0
    if length == "imtl" and not some.all():
        return [0.0] * len(gram)
    weights = 0 * lengths
    weights[some] = _along_units(cosines[some][:, some], length) / lengths[some]
    if length == "imtl":
        # From three roles on the sum can be negative, and dividing by it would turn descent into ascent.
        total = abs(weights.sum())
        weights = weights / total if total > 0 else weights
    return weights.tolist()


def cagrad(gram: Gram, *, c: Annotated[float, Ge(0), Lt(1)] = 0.5) -> list[float]:
    """Of all vectors within c |g_0| of the mean g_0 the best for the worst role: g_0 + c |g_0| g_w / |g_w|.

    Liu et al. (arXiv 2110.14048, algorithm 1, without rescaling): g_w = sum of w_i g_i, with w on the
    simplex and minimal <g_w, g_0> + c |g_0| |g_w|, is found face by face. c 0 is the mean; below 1
    the method converges to a minimum of the mean, and 0.5 is the middle of that range. A zero gradient only
    counts in the mean. Where g_w is zero, no vector within reach helps the worst role: the mean is taken.
    """
    import numpy as np

    m = len(gram)
    lengths, cosines = lengths_and_cosines(gram)
    some = lengths > 0
    weights = np.full(m, 1 / m)
    if not some.any():
        return weights.tolist()
    cosines, lengths = cosines[some][:, some], lengths[some] / lengths.max()
    slopes = cosines @ lengths / m
    radius = c * math.sqrt(max(lengths @ slopes / m, 0.0))
    if radius > 0:
        w = penalised_in_hull(cosines, lengths, slopes, radius)
        u = w * lengths
        size = math.sqrt(max(u @ cosines @ u, 0.0))
        if size > math.sqrt(DEPENDENT) * np.abs(u).max():
            weights[some] += radius / size * w
    return weights.tolist()


def aligned_mtl(gram: Gram) -> list[float]:
    """The mean of the gradients, whose principal directions were all given the strength of the weakest one.

    Senushkin et al. (arXiv 2305.19000, algorithm 1): w = sqrt(lambda_min) G^(-1/2) (1/m, ..., 1/m). For two
    roles, with s = sqrt(ac - b^2) and lambda_max the larger eigenvalue: w = (c + s - b, a + s - b) / (2
    sqrt((a + c + 2s) lambda_max)). Directions in which the gradients do not differ (eigenvalue of their
    cosines below 1e-6) are left out: parallel ones give w = (a + b, b + c) / (2 (a + c)). A zero gradient
    only counts in the 1/m.
    """
    import numpy as np

    lengths, cosines = lengths_and_cosines(gram)
    some = lengths > 0
    weights = np.full(len(gram), 1 / len(gram))
    if some.any():
        values, vectors = np.linalg.eigh(cosines[some][:, some])
        independent = values > DEPENDENT
        # G = A A^T. A's singular values keep twice the digits of G's eigenvalues, for lengths decades apart.
        scaled = (lengths[some] / lengths.max())[:, None] * vectors[:, independent]
        left, strengths, _ = np.linalg.svd(scaled * np.sqrt(values[independent]), full_matrices=False)
        weights[some] = left @ (strengths[-1] / strengths * (left.T @ weights[some]))
    return weights.tolist()


def _along_units(cosines: "np.ndarray", length: str) -> "np.ndarray":
    """Weights [m] of unit gradients, for each length of `bisector`."""
    import numpy as np

    ones = np.ones(len(cosines))
    if length == "unit" or len(cosines) < 2:
        return ones
    if len(cosines) == 2:
        return ones if length == "imtl" else ones / math.sqrt(max(1 + cosines[0, 1], DEPENDENT))
    return np.linalg.pinv(cosines, hermitian=True) @ ones if length == "imtl" else _bargain(cosines)


def _bargain(cosines: "np.ndarray") -> "np.ndarray":
    """The u [m] > 0 with cosines u = 1 / u: where u^T cosines u / 2 - sum of log u is least (Newton)."""
    import numpy as np

    values = np.linalg.eigvalsh(cosines)
    shifted = cosines + max(0.0, DEPENDENT - values[0]) * np.eye(len(cosines))
    u = np.ones(len(cosines))
    for _ in range(NEWTON_STEPS):
        gradient = shifted @ u - 1 / u
        step = np.linalg.solve(shifted + np.diag(u**-2), gradient)
        decrement = math.sqrt(max(gradient @ step, 0.0))
        # The damped step of a self-concordant function stays inside u > 0 and always descends.
        u = u - step / (1 + decrement)
        if decrement < 1e-14:
            break
    return u
