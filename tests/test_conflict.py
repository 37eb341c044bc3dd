"""Conflict rules: one matrix by hand for every rule, and the theory of each on random gradients.

A rule sees inner products only: an orthogonal change of basis cannot change its weights.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
from conflict_bed import RULES, VARIANTS, gram_of, independent_gradients, random_gradients, update_of

from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_parameters
from hf_clmul.gradients.projection import pcgrad, pcgrad_retain_first

bisector, agem, blur, bome, cagrad = (RULES[name] for name in ("bisector", "agem", "blur", "bome", "cagrad"))

# ---- what the papers promise: assertions for the rules of today and of tomorrow ----------------------------


def keeps_retaining(share, roles=(2, 3, 4), draw=random_gradients):
    """To first order each kept role's loss falls at least `share` times as fast as under its own gradient."""

    def assertion(rule):
        for m in roles:
            for gradients in draw(m):
                update, rounding = update_of(rule, gradients)
                kept = gradients[1:]
                assert (kept @ update >= share * (kept**2).sum(1) - rounding[1:]).all()

    return assertion


def raises_no_loss(roles=(2, 3, 4), draw=random_gradients):
    """To first order no role's loss rises: <g, g_i> >= 0."""

    def assertion(rule):
        for m in roles:
            for gradients in draw(m):
                update, rounding = update_of(rule, gradients)
                assert (gradients @ update >= -rounding).all()

    return assertion


def forgets_whatever_is_kept(rule):
    """<g, f> is what gradient descent on the forget loss alone would give."""
    for m in (2, 3, 4):
        for gradients in random_gradients(m):
            update, rounding = update_of(rule, gradients)
            assert abs(gradients[0] @ update - gradients[0] @ gradients[0]) <= rounding[0]


def forgets_at_least(eta):
    """The forget loss falls at least eta times as fast as under its own gradient; faster only where f is left out."""

    def assertion(rule):
        for m in (2, 3, 4):
            for gradients in random_gradients(m):
                update, rounding = update_of(rule, gradients)
                gained = gradients[0] @ update - eta * gradients[0] @ gradients[0]
                assert gained >= -rounding[0]
                assert gained <= rounding[0] or rule(gram_of(gradients))[0] == 0

    return assertion


def stays_nearest(rule):
    """No vector that meets the constraints is nearer to f: what was added is at right angles to the
    update."""
    for m in (2, 3, 4):
        for gradients in random_gradients(m):
            update, rounding = update_of(rule, gradients)
            assert abs((update - gradients[0]) @ update) <= rounding.sum() + 1e-10 * (gradients[0] @ gradients[0])


def equals_the_algorithm_on_vectors(algorithm):
    def assertion(rule):
        for m in (2, 3, 4):
            for gradients in random_gradients(m):
                error = update_of(rule, gradients)[0] - algorithm(gradients)
                assert np.linalg.norm(error) <= 1e-9 * np.abs(gradients).max()

    return assertion


def projected(gradient, others):
    for other in others:
        if gradient @ other < 0:
            gradient = gradient - (gradient @ other) / (other @ other) * other
    return gradient


def pcgrad_on_vectors(gradients):
    """Algorithm 1 of arXiv 2001.06782 as written there, with the roles' order for its random one."""
    m = len(gradients)
    return sum(projected(gradients[i], [gradients[j] for j in range(m) if j != i]) for i in range(m))


def retain_first_on_vectors(gradients):
    return projected(gradients[0], gradients[1:]) + gradients[1:].sum(0)


def blur_on_vectors(gradients):
    """Equation of arXiv 2506.08164: the retain gradient's part at right angles to f, and f."""
    f, kept = gradients[0], gradients[1:].sum(0)
    return kept - (kept @ f) / (f @ f) * f + f


def erasediff_on_vectors(gradients):
    """The weight of the forget loss in EraseDiff's code, on the gradients."""
    f, kept = gradients[0], gradients[1:].sum(0)
    cosine = (f @ kept) / (np.linalg.norm(f) * np.linalg.norm(kept))
    return kept + max(0.0, 0.5 - cosine) * f


def scales_by(degree):
    """The update of t times the gradients is t^degree times the update, from 1e-12 to 1e12."""

    def assertion(rule):
        for m in (2, 3):
            for gradients in independent_gradients(m, count=20, decades=1):
                weights = np.array(rule(gram_of(gradients)))
                for exponent in (-12, -4, 4, 12):
                    again = np.array(rule(gram_of(gradients * 10.0**exponent)))
                    expected = weights * 10.0 ** (exponent * (degree - 1))
                    assert np.allclose(again, expected, rtol=1e-7, atol=1e-12 * np.abs(expected).max())

    return assertion


def treats_alike(first, roles=(2, 3, 4)):
    """Permuting the roles from number `first` on permutes the weights."""

    def assertion(rule):
        for m in roles:
            for gradients in independent_gradients(m, count=10, decades=1):
                weights = np.array(rule(gram_of(gradients)))
                for order in itertools.permutations(range(first, m)):
                    order = [*range(first), *order]
                    assert np.allclose(rule(gram_of(gradients[order])), weights[order], rtol=1e-6, atol=1e-9)

    return assertion


def is_the_shortest_in_the_hull(rule):
    """The optimality condition of the min-norm point: <g, g_i> >= <g, g>, weights on the simplex."""
    for m in (2, 3, 4):
        for gradients in random_gradients(m):
            weights = np.array(rule(gram_of(gradients)))
            assert (weights >= 0).all() and math.isclose(weights.sum(), 1)
            update, rounding = update_of(rule, gradients)
            assert (gradients @ update >= update @ update - rounding).all()


def vanishes_at_pareto_stationary_points(rule):
    rng = np.random.default_rng(0)
    for m in (2, 3, 4):
        for _ in range(50):
            gradients = rng.normal(size=(m, 5))
            gradients[0] = -rng.uniform(0.1, 2, size=m - 1) @ gradients[1:]  # zero is in the hull
            update, _ = update_of(rule, gradients)
            assert np.linalg.norm(update) <= 1e-7 * np.abs(gradients).max()


def has_equal_projections(rule):
    for m in (2, 3, 4):
        for gradients in independent_gradients(m):
            projections = gradients @ update_of(rule, gradients)[0] / np.linalg.norm(gradients, axis=1)
            assert projections.min() > 0 and np.allclose(projections, projections[0], rtol=1e-6)


def adds_up_to_one(rule):
    for gradients in random_gradients(2):
        assert math.isclose(sum(rule(gram_of(gradients))), 1)


def solves_the_bargain(rule):
    """G w = 1 / w (arXiv 2202.01017), so that <g, g_i> w_i = 1 for every role and |g|^2 = m."""
    for m in (2, 3, 4):
        for gradients in independent_gradients(m):
            weights = np.array(rule(gram_of(gradients)))
            shares = weights * (gradients @ (weights @ gradients))
            assert (weights > 0).all() and np.allclose(shares, 1, rtol=1e-6)


def adds_unit_vectors(rule):
    for m in (2, 3, 4):
        for gradients in random_gradients(m):
            expected = (gradients / np.linalg.norm(gradients, axis=1, keepdims=True)).sum(0)
            assert np.allclose(update_of(rule, gradients)[0], expected, atol=1e-9)


def is_best_for_the_worst_role(rule, c=0.5):
    """Duality: the worst role's gain equals the bound <g_w, g_0> + c |g_0| |g_w|, which no vector in the
    ball of radius c |g_0| around the mean can exceed; the update lies on its border."""
    for m in (2, 3, 4):
        for gradients in independent_gradients(m):
            mean = gradients.mean(0)
            weights = np.array(rule(gram_of(gradients)))
            extra = weights - 1 / m
            radius = c * np.linalg.norm(mean)
            assert extra.min() >= -1e-12
            assert math.isclose(np.linalg.norm(extra @ gradients), radius, rel_tol=1e-7)
            g_w = extra / extra.sum() @ gradients
            bound = g_w @ mean + radius * np.linalg.norm(g_w)
            gain = (gradients @ (weights @ gradients)).min()
            assert abs(gain - bound) <= 1e-9 * np.linalg.norm(g_w) * np.linalg.norm(mean) + 1e-12 * abs(bound)


def balances_principal_directions(rule):
    """G^(1/2) w = sqrt(lambda_min) (1/m, ..., 1/m): applying G^(1/2) undoes the rule."""
    for m in (2, 3, 4):
        for gradients in independent_gradients(m, decades=1):
            _, strengths, right = np.linalg.svd(gradients.T, full_matrices=False)
            balanced = (right.T * strengths) @ right @ rule(gram_of(gradients))
            assert np.allclose(balanced, strengths.min() / m, rtol=1e-6)


THEORY = {
    "pcgrad": (
        raises_no_loss(roles=(2,)), treats_alike(0, roles=(2,)), scales_by(1),
        equals_the_algorithm_on_vectors(pcgrad_on_vectors),
    ),
    "pcgrad_retain_first": (
        keeps_retaining(1.0, roles=(2,)), scales_by(1),
        equals_the_algorithm_on_vectors(retain_first_on_vectors),
    ),
    "agem": (keeps_retaining(0.0), stays_nearest, treats_alike(1), scales_by(1)),
    "upgrad": (raises_no_loss(), treats_alike(0), scales_by(1)),
    "blur": (
        forgets_whatever_is_kept, treats_alike(1), scales_by(1),
        equals_the_algorithm_on_vectors(blur_on_vectors),
    ),
    "bome projection": (forgets_at_least(0.5), treats_alike(1), scales_by(1)),
    "bome cosine": (equals_the_algorithm_on_vectors(erasediff_on_vectors), treats_alike(1), scales_by(1)),
    "mgda": (
        raises_no_loss(), is_the_shortest_in_the_hull, vanishes_at_pareto_stationary_points,
        treats_alike(0), scales_by(1),
    ),
    "cagrad": (is_best_for_the_worst_role, treats_alike(0), scales_by(1)),
    "aligned_mtl": (balances_principal_directions, treats_alike(0), scales_by(1)),
    "bisector imtl": (has_equal_projections, adds_up_to_one, scales_by(1), treats_alike(0)),
    "bisector nash": (
        raises_no_loss(draw=independent_gradients), solves_the_bargain, scales_by(0), treats_alike(0),
    ),
    "bisector unit": (adds_unit_vectors, scales_by(0), treats_alike(0)),
}  # fmt: skip


def test_every_rule_has_its_theory():
    assert set(THEORY) == set(VARIANTS)
    assert {name for name, rule in CONFLICT_RULES.items() if not rule.needs} == {"sum"}
    elementwise = {name for name, rule in CONFLICT_RULES.items() if "gradients" in rule.needs}
    assert elementwise == {"pcgrad_per_layer", "gru", "sago"}  # in test_conflict_elementwise.py


@pytest.mark.parametrize("name", CONFLICT_RULES)
def test_row_in_the_page_of_methods(name, repo):
    page = (repo / "docs/methods.md").read_text().splitlines()
    (row,) = (line for line in page if line.startswith(f"| `{name}`"))
    assert CONFLICT_RULES[name].paper.removeprefix("arXiv ") in row
    for parameter, (_, default) in rule_parameters(name).items():
        shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
        assert f"`{parameter}` {shown}" in row


@pytest.mark.parametrize(("name", "promise"), [(name, p) for name, theory in THEORY.items() for p in theory])
def test_theory(name, promise):
    promise(VARIANTS[name])


@pytest.mark.parametrize("promise", [p for theory in THEORY.values() for p in theory])
def test_another_rule_breaks_the_promise(promise):
    """Else the assertions above could not fail."""
    with pytest.raises(AssertionError):
        promise(lambda gram: [1.0 + i * math.sqrt(gram[i][i]) for i in range(len(gram))])


# ---- parameters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.1, 1.0, 3.0])
def test_margin_of_agem(margin):
    keeps_retaining(margin, roles=(2,))(partial(agem, margin=margin))
    keeps_retaining(margin, roles=(3, 4), draw=independent_gradients)(partial(agem, margin=margin))


@pytest.mark.parametrize("gamma", [0.1, 2.5])
def test_gamma_of_blur_is_the_speed_of_forgetting(gamma):
    for gradients in random_gradients(3):
        update, rounding = update_of(partial(blur, gamma=gamma), gradients)
        assert abs(gradients[0] @ update - gamma * gradients[0] @ gradients[0]) <= rounding[0]


@pytest.mark.parametrize("eta", [0.0, 0.1, 2.0])
def test_eta_of_bome_is_the_least_speed_of_forgetting(eta):
    forgets_at_least(eta)(partial(bome, eta=eta))


@pytest.mark.parametrize("c", [0.1, 0.9, 0.99])
def test_c_of_cagrad(c):
    is_best_for_the_worst_role(partial(cagrad, c=c), c)


def test_cagrad_with_c_0_is_the_mean():
    for gradients in random_gradients(3):
        assert cagrad(gram_of(gradients), c=0.0) == [1 / 3] * 3


# ---- by hand -----------------------------------------------------------------------------------------------

# f = (2, 0) and r = (-1, 1): a = 4, b = -2, c = 2
CONFLICTING = [[4.0, -2.0], [-2.0, 2.0]]
S2, S5 = math.sqrt(2), math.sqrt(5)

BY_HAND = {
    ("pcgrad", ()): (1.5, 2),  # 1 + 2/4, 1 + 2/2
    ("pcgrad_retain_first", ()): (1, 2),  # 1 + 2/2: f + 2 r = (0, 2), and <g, r> = 2 = <r, r>
    ("agem", ()): (1, 1),  # 2/2: f + r = (1, 1), and <g, r> = 0
    ("agem", (("margin", 0.5),)): (1, 1.5),  # (1 / 2, 3 / 2), and <g, r> = 1 = <r, r> / 2
    ("blur", ()): (1.5, 1),  # 1 + 2/4: 1.5 f + r = (2, 1), and <g, f> = 4 = <f, f>
    ("blur", (("gamma", 0.25),)): (0.75, 1),
    ("bome", ()): (1, 1),  # 0.5 + 2/4: f + r = (1, 1), and <g, f> = 2 = 0.5 <f, f>
    ("bome", (("eta", 0.1),)): (0.6, 1),
    ("bome", (("agreement", "cosine"),)): (0.5 + 1 / S2, 1),  # -2 / (2 sqrt 2) = -1 / sqrt 2
    ("upgrad", ()): (0.75, 1),  # half of pcgrad
    ("mgda", ()): (0.4, 0.6),  # (2 + 2) / (4 + 2 + 4): (0.2, 0.6), <g, f> = <g, r> = 0.4 = |g|^2
    ("bisector", (("length", "imtl"),)): (S2 / (2 + S2), 2 / (2 + S2)),  # |f| = 2, |r| = sqrt 2
    ("bisector", (("length", "unit"),)): (1 / 2, 1 / S2),
    # cos = -2 / (2 sqrt 2) = -1 / sqrt 2
    ("bisector", (("length", "nash"),)): (1 / (2 * math.sqrt(1 - 1 / S2)), 1 / (S2 * math.sqrt(1 - 1 / S2))),
    # g_0 = (1/2, 1/2) gains nothing for r: w = (0, 1), and c |g_0| / |r| = 1/2 * (1 / sqrt 2) / sqrt 2 = 1/4.
    ("cagrad", ()): (0.5, 0.75),
    # s = sqrt(4 * 2 - 4) = 2 and lambda_max = 3 + sqrt 5: (6, 8) / (2 sqrt(10 (3 + sqrt 5)))
    ("aligned_mtl", ()): (3 / math.sqrt(30 + 10 * S5), 4 / math.sqrt(30 + 10 * S5)),
}


def test_each_rule_is_worked_out_by_hand():
    assert {name for name, _ in BY_HAND} == set(RULES)
    given = {(name, parameter) for name, parameters in BY_HAND for parameter, _ in parameters}
    known = {(name, parameter) for name in RULES for parameter in rule_parameters(name)}
    assert known - given == {("cagrad", "c")}  # by its own theory above


@pytest.mark.parametrize(("name", "parameters"), BY_HAND)
def test_two_roles_in_conflict_by_hand(name, parameters):
    found = RULES[name](CONFLICTING, **dict(parameters))
    assert found == pytest.approx(BY_HAND[name, parameters], rel=1e-12)


def test_three_roles_by_hand():
    # f = (1, 0), r = (-1, 1), m = (-1, -1): f + 1/2 r = (1/2, 1/2), times m: -1; + 1/2 m = (0, 0).
    gram = gram_of(np.array([[1.0, 0.0], [-1.0, 1.0], [-1.0, -1.0]]))
    assert pcgrad_retain_first(gram) == [1.0, 1.5, 1.5]
    # r + f = (0, 1), times m: -1; r + f + 1/2 m. In the same way m + f + 1/2 r. In all 3 f + 2 r + 2 m.
    assert pcgrad(gram) == [3.0, 2.0, 2.0]
    # Only 0 has no negative product with r and m and is reached from f: f + 1/2 r + 1/2 m = 0.
    assert agem(gram) == pytest.approx([1.0, 0.5, 0.5])
    # 0 = 2 f + r + m is in the hull.
    assert RULES["mgda"](gram) == pytest.approx([0.5, 0.25, 0.25])
    # <f, r> = <f, m> = -1
    assert blur(gram) == pytest.approx([3.0, 1.0, 1.0])
    # r + m = (-2, 0): twice f's length, opposed
    assert bome(gram) == pytest.approx([2.5, 1.0, 1.0])
    assert bome(gram, agreement="cosine") == pytest.approx([1.5, 1.0, 1.0])


def test_bome_leaves_forgetting_to_the_kept_roles_where_they_do_enough():
    gram = gram_of(np.array([[1.0, 0.0], [1.0, 1.0]]))  # <f, r> / <f, f> = 1, cosine 1 / sqrt 2: both above 0.5
    assert bome(gram) == bome(gram, agreement="cosine") == [0.0, 1.0]
    assert bome(gram, eta=1.5) == pytest.approx([0.5, 1.0])


def test_kept_gradients_that_cancel_out_have_no_cosine():
    gram = gram_of(np.array([[1.0, 1.0], [2.0, 1.0], [-2.0, -1.0]]))
    assert bome(gram, agreement="cosine") == [0.5, 1.0, 1.0]
