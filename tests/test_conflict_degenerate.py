"""Conflict rules on degenerate matrices: no conflict, gradients on a line, zero, noise, extreme scales, rounding."""

import math
import subprocess
import sys

import numpy as np
import pytest
from conflict_bed import RULES, VARIANTS, every_variant, gram_of

from hf_clmul.gradients.active_sets import NOISE

S2 = math.sqrt(2)
SUMMING = ("pcgrad", "pcgrad_retain_first")


@pytest.mark.parametrize("name", SUMMING)
@pytest.mark.parametrize("roles", [1, 2, 3, 4])
def test_without_conflict_a_projection_is_the_sum(name, roles):
    gradients = np.abs(np.random.default_rng(0).normal(size=(roles, 5)))  # all in one orthant
    assert RULES[name](gram_of(gradients)) == [1.0] * roles
    assert RULES[name](np.eye(roles).tolist()) == [1.0] * roles  # orthogonal is no conflict


def test_without_conflict_upgrad_is_the_mean_and_agem_the_forget_gradient():
    gradients = np.abs(np.random.default_rng(0).normal(size=(3, 5)))
    assert RULES["upgrad"](gram_of(gradients)) == [1 / 3] * 3
    assert RULES["agem"](gram_of(gradients)) == [1.0, 0.0, 0.0]


# f and r on a line, as weights; a, b, c = 4, +-2, 1
PARALLEL = {  # f = 2 r
    "pcgrad": (1, 1), "pcgrad_retain_first": (1, 1), "agem": (1, 0), "upgrad": (0.5, 0.5),
    "blur": (0.5, 1),  # 1 - 2/4: what r has of f is taken out
    "bome projection": (0, 1), "bome cosine": (0, 1),  # 0.5 - 2/4, and 0.5 - 1 is below zero
    "mgda": (0, 1),  # the shorter one
    "cagrad": (0.5, 1.25),  # g_0 = 1.5 r; worst for r, + 0.5 * 1.5 r
    "aligned_mtl": (0.6, 0.3),  # (4 + 2, 2 + 1) / (2 * 5)
    "bisector imtl": (1 / 3, 2 / 3), "bisector nash": (0.5 / S2, 1 / S2), "bisector unit": (0.5, 1),
}  # fmt: skip
OPPOSED = {  # f = -2 r
    "pcgrad": (1.5, 3), "upgrad": (0.75, 1.5),  # 1.5 f + 3 r = 0: nothing is left of either
    "pcgrad_retain_first": (1, 3),  # f + 3 r = r
    "agem": (1, 2),  # 0
    "blur": (1.5, 1),  # 1.5 f + r = f
    "bome projection": (1, 1), "bome cosine": (1.5, 1),  # 0.5 + 2/4, 0.5 + 1
    "mgda": (1 / 3, 2 / 3),  # 0
    "cagrad": (0.5, 0.75),  # g_0 = -r / 2, + 0.5 * r / 2
    "aligned_mtl": (0.2, -0.1),  # (4 - 2, -2 + 1) / (2 * 5): half the sum, -r / 2
    "bisector imtl": (1 / 3, 2 / 3), "bisector unit": (0.5, 1),  # 0
    "bisector nash": (500, 1000),  # 0, but for rounding
}  # fmt: skip


@every_variant
def test_parallel_gradients(name):
    assert VARIANTS[name]([[4.0, 2.0], [2.0, 1.0]]) == pytest.approx(PARALLEL[name])


@every_variant
def test_opposed_gradients(name):
    assert VARIANTS[name]([[4.0, -2.0], [-2.0, 1.0]]) == pytest.approx(OPPOSED[name])


# Weights where r is zero, and where f is: what stands for the other one is the update.
ZERO = {
    "pcgrad": (1, 1), "pcgrad_retain_first": (1, 1), "agem": (1, None), "blur": (1, 1), "upgrad": (0.5, 0.5),
    "bome projection": (0.5, 1), "bome cosine": (0.5, 1),
    "mgda": (0, 0), "bisector imtl": (0, 0),  # a role that has nothing to gain stops them
    "cagrad": (0.75, 0.75), "aligned_mtl": (0.5, 0.5), "bisector nash": (0.5, 0.5), "bisector unit": (0.5, 0.5),
}  # fmt: skip


@every_variant
def test_a_zero_gradient_conflicts_with_nothing(name):
    retain_is_zero, forget_is_zero = ZERO[name]
    assert VARIANTS[name]([[4.0, 0.0], [0.0, 0.0]])[0] == pytest.approx(retain_is_zero)
    found = VARIANTS[name]([[0.0, 0.0], [0.0, 4.0]])[1]
    assert found == pytest.approx(forget_is_zero or 0.0)


@every_variant
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_zero_gradient_among_three_leaves_the_others_as_they_are(name, zero):
    gradients = np.array([[1.0, 0.0, 0.5], [-1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
    gradients[zero] = 0.0
    rest = [i for i in range(3) if i != zero]
    weights = np.array(VARIANTS[name](gram_of(gradients)))[rest]
    if name in ("mgda", "bisector imtl"):
        assert (weights == 0).all()
    elif name in ("agem", "blur", "bome projection", "bome cosine", "pcgrad_retain_first") and zero == 0:
        assert (weights == (0 if name == "agem" else 1)).all()
    elif name == "cagrad":
        assert (weights >= 1 / 3).all()  # the mean is one of three, and shorter: so is the ball around it
    else:
        share = 2 / 3 if name in ("upgrad", "aligned_mtl") else 1  # means of three
        assert weights == pytest.approx(share * np.array(VARIANTS[name](gram_of(gradients[rest]))))


@every_variant
def test_rounding_noise_counts_as_a_zero_gradient(name):
    """At the first step of a request the KL to the model itself has a gradient of float32 noise."""
    tiny = 0.5 * math.sqrt(NOISE)
    zero = VARIANTS[name]([[4.0, 0.0], [0.0, 0.0]])
    for cosine in (-1.0, 0.3):
        noise = VARIANTS[name]([[4.0, 4 * tiny * cosine], [4 * tiny * cosine, 4 * tiny**2]])
        assert noise == pytest.approx(zero)


@pytest.mark.parametrize("name", ["pcgrad", "pcgrad_retain_first", "agem", "upgrad", "mgda", "cagrad"])
def test_a_small_gradient_is_still_a_gradient(name):
    """No rule may switch itself off for a retain gradient a million times shorter than the forget
    gradient."""
    small = 1e-6
    for scale in (1e-20, 1.0, 1e20):
        against = RULES[name]([[scale, -0.34 * small * scale], [-0.34 * small * scale, small**2 * scale]])
        beside = RULES[name]([[scale, 0.0], [0.0, small**2 * scale]])
        assert not np.allclose(against, beside, rtol=1e-9, atol=0)


@every_variant
@pytest.mark.parametrize("roles", [1, 2, 3, 4])
def test_any_matrix_gives_finite_weights(name, roles):
    """Zero, singular, of extreme scale, and not quite a Gram matrix, after rounding or underflow."""
    rule, rng = VARIANTS[name], np.random.default_rng(roles)
    grams = [np.zeros((roles, roles)), np.ones((roles, roles)), np.eye(roles) - 0.0]
    alternating = np.array([(-1.0) ** i for i in range(roles)])
    grams += [
        np.outer(alternating, alternating),
        -1e-9 * np.ones((roles, roles)) + np.diag([1.0] + [0.0] * (roles - 1)),
    ]
    for _ in range(100):
        gradients = rng.normal(size=(roles, rng.integers(1, 4))) * 10.0 ** rng.integers(-9, 10, size=(roles, 1))
        gradients[rng.random(roles) < 0.2] = 0.0
        exact = gradients @ gradients.T
        grams += [exact, exact.astype(np.float32).astype(float), exact * 1e-290, exact * 1e280]
    for gram in grams:
        weights = rule(np.clip(gram, -1e300, 1e300).tolist())
        assert len(weights) == roles and all(map(math.isfinite, weights))


def test_importing_the_rules_does_not_import_torch_or_numpy():
    code = "import sys, hf_clmul.gradients.conflict; print({'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
