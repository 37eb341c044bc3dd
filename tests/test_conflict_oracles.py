"""Conflict rules against other people's solvers: SciPy on the vectors themselves, and TorchJD on the Gram
matrix.

Lengths differ by several decades. TorchJD's own thresholds are switched off: by default they turn conflict
resolution off for gradients as small as those of a LoRA.
"""

import math

import numpy as np
import pytest
from conflict_bed import RULES, gram_of, independent_gradients, random_gradients
from scipy.optimize import minimize, nnls

# ---- SciPy -------------------------------------------------------------------------------------------------


def nearest_without_conflict(gradient, others):
    """The vector nearest to `gradient` that conflicts with none of `others`: least squares over their
    cone."""
    units = others / np.linalg.norm(others, axis=1, keepdims=True)
    return gradient + units.T @ nnls(units.T, -gradient)[0]


@pytest.mark.parametrize("roles", [2, 3, 4])
def test_agem_is_a_least_squares_problem(roles):
    for gradients in random_gradients(roles, count=60):
        update = RULES["agem"](gram_of(gradients)) @ gradients
        expected = nearest_without_conflict(gradients[0], gradients[1:])
        assert np.linalg.norm(update - expected) <= 1e-7 * np.linalg.norm(gradients[0])


@pytest.mark.parametrize("eta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("roles", [2, 3, 4])
def test_bome_is_a_least_squares_problem(roles, eta):
    """The nearest x to the kept sum with <x, f> >= eta <f, f>; x - eta f is without conflict."""
    for gradients in random_gradients(roles, count=60):
        f, kept = gradients[0], gradients[1:].sum(0)
        update = np.array(RULES["bome"](gram_of(gradients), eta=eta)) @ gradients
        expected = eta * f + nearest_without_conflict(kept - eta * f, gradients[:1])
        assert np.linalg.norm(update - expected) <= 1e-7 * (np.linalg.norm(kept) + eta * np.linalg.norm(f))


@pytest.mark.parametrize("roles", [2, 3, 4])
def test_upgrad_is_one_least_squares_problem_for_each_role(roles):
    for gradients in random_gradients(roles, count=60):
        update = RULES["upgrad"](gram_of(gradients)) @ gradients
        expected = np.mean([nearest_without_conflict(g, gradients) for g in gradients], axis=0)
        assert np.linalg.norm(update - expected) <= 1e-7 * np.abs(gradients).max()


@pytest.mark.parametrize("roles", [2, 3, 4])
def test_mgda_is_a_least_squares_problem(roles):
    """min |g_u|^2 + (sum of u - 1)^2 over u >= 0 has the direction of the min-norm point."""
    for gradients in independent_gradients(roles, count=60, decades=1):
        scale = np.abs(gradients).max()
        rows = np.vstack([gradients.T / scale, np.ones(roles)])
        u = nnls(rows, np.eye(len(rows))[-1])[0]
        expected = u / u.sum() @ gradients
        assert np.linalg.norm(RULES["mgda"](gram_of(gradients)) @ gradients - expected) <= 1e-7 * scale


@pytest.mark.parametrize("roles", [2, 3, 4])
def test_no_vector_in_cagrads_ball_is_better_for_the_worst_role(roles):
    """Maximises the gain of the worst role over the ball, from several starts."""
    rng = np.random.default_rng(roles)
    for gradients in independent_gradients(roles, count=8, decades=0):
        mean = gradients.mean(0)
        radius = 0.5 * np.linalg.norm(mean)
        gain = (gradients @ (RULES["cagrad"](gram_of(gradients)) @ gradients)).min()
        constraints = [
            {"type": "ineq", "fun": lambda x, m=mean, r=radius: r**2 - ((x[:-1] - m) ** 2).sum()},
            {"type": "ineq", "fun": lambda x, g=gradients: g @ x[:-1] - x[-1]},
        ]
        best = -math.inf
        for _ in range(3):
            start = np.append(mean + 0.1 * radius * rng.normal(size=len(mean)), gain - 1)
            found = minimize(lambda x: -x[-1], start, method="SLSQP", constraints=constraints)
            best = max(best, found.x[-1]) if found.success else best
        assert gain == pytest.approx(best, rel=1e-4, abs=1e-6)


# ---- TorchJD -----------------------------------------------------------------------------------------------


def weighting(name):
    """TorchJD's weighting for one of our rules, its thresholds and regularisation off."""
    reason = "the oracle is not installed: pip install 'torchjd[quadprog-projector,cagrad]==0.18.0'"
    aggregation = pytest.importorskip("torchjd.aggregation", reason=reason)
    makers = {
        "pcgrad": lambda: aggregation.PCGradWeighting(),
        "upgrad": lambda: aggregation.UPGradWeighting(projector=_projector()),
        "mgda": lambda: aggregation.MGDAWeighting(epsilon=1e-14, max_iters=1000),
        "bisector": lambda: aggregation.IMTLGWeighting(),
        "aligned_mtl": lambda: aggregation.AlignedMTLWeighting(),
        "cagrad": lambda: aggregation.CAGradWeighting(c=0.5, norm_eps=0.0),
    }
    try:
        return makers[name]()
    except ImportError as error:
        pytest.skip(f"{reason} ({error})")


def _projector():
    from torchjd.linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)


# Rule, our parameters, roles, and the largest error of the update beside the longest gradient in it. Solvers that iterate
# (quadprog with a regularised matrix, Clarabel, Frank-Wolfe) are less exact than a formula.
COMPARED = [
    ("pcgrad", {}, 2, 1e-12),  # from three roles on TorchJD draws an order at random
    *[("upgrad", {}, roles, 1e-4) for roles in (2, 3, 4)],
    ("mgda", {}, 2, 1e-10),
    *[("bisector", {"length": "imtl"}, roles, 1e-6) for roles in (2, 3)],
    *[("aligned_mtl", {}, roles, 1e-6) for roles in (2, 3, 4)],
    *[("cagrad", {"c": 0.5}, roles, 1e-3) for roles in (2, 3)],
]


@pytest.mark.parametrize(("name", "parameters", "roles", "tolerance"), COMPARED)
def test_torchjd_agrees(name, parameters, roles, tolerance):
    oracle = weighting(name)
    import torch

    for gradients in independent_gradients(roles, count=20 if name == "cagrad" else 100):
        gram = gram_of(gradients)
        ours = RULES[name](gram, **parameters)
        theirs = oracle(torch.tensor(gram, dtype=torch.float64)).numpy()
        if name == "bisector" and (gradients @ (theirs @ gradients)).max() < 0:
            theirs = -theirs  # from three roles on its weights can add up to 1 and raise every loss
        scale = np.linalg.norm(gradients * np.abs(theirs)[:, None], axis=1).max()
        assert np.linalg.norm((ours - theirs) @ gradients) <= tolerance * scale


@pytest.mark.parametrize("roles", [3, 4])
def test_torchjds_search_for_the_shortest_vector_finds_none_that_is_shorter(roles):
    """Frank-Wolfe comes near the min-norm point, from above, and slowly."""
    oracle = weighting("mgda")
    import torch

    for gradients in independent_gradients(roles, count=20, decades=1):
        gram = gram_of(gradients)
        ours = np.linalg.norm(RULES["mgda"](gram) @ gradients)
        theirs = np.linalg.norm(oracle(torch.tensor(gram, dtype=torch.float64)).numpy() @ gradients)
        assert ours <= theirs * (1 + 1e-12) and theirs <= 1.05 * ours
