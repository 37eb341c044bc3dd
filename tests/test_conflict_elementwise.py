"""Conflict rules that need the gradients themselves: by hand on small tensors, and their promises on random
ones."""

import math

import pytest
import torch

from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.gradients.elementwise import gru, pcgrad_per_layer, sago
from hf_clmul.gradients.projection import agem, pcgrad_retain_first
from hf_clmul.gradients.window import gram_matrix, weighted_sum

EITHER = {
    "sago": sago,
    "sago sum": lambda g, gram: sago(g, gram, agreeing="sum"),
    "pcgrad_per_layer": pcgrad_per_layer,
}
either = pytest.mark.parametrize("name", EITHER)


def tensors(*gradient):
    return [None if values is None else torch.tensor(values) for values in gradient]


def lists(gradient):
    return [None if t is None else t.tolist() for t in gradient]


def random_gradients(roles, seed, layers=5):
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.randint(-4, 5, (roles, layers), generator=generator)
    return [[s * torch.randn(3, 4, generator=generator) for s in role] for role in scales.tolist()]


def copies(gradients):
    return [[None if t is None else t.clone() for t in gradient] for gradient in gradients]


def dot(one, other):
    return float(sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True)))


# ---- sago --------------------------------------------------------------------------------------------------

FORGET = [2.0, -2.0, 2.0, 0.0, 3.0, 0.0, -1e-30]
RETAIN = [1.0, 5.0, -4.0, 7.0, 0.0, 0.0, 1e-30]  # the last product underflows in float32


def test_sago_by_hand():
    gradients = [tensors(FORGET), tensors(RETAIN)]
    # agree, opposed, opposed, no forget gradient, no retain gradient, neither, opposed
    expected = torch.tensor([2.0, 5.0, -4.0, 0.0, 3.0, 0.0, 1e-30])
    assert torch.equal(sago(copies(gradients), [])[0], expected)
    expected = torch.tensor([3.0, 5.0, -4.0, 7.0, 3.0, 0.0, 1e-30])
    assert torch.equal(sago(copies(gradients), [], agreeing="sum")[0], expected)


def test_sago_takes_the_sum_of_all_kept_gradients():
    gradients = [tensors([1.0, 1.0]), tensors([-2.0, -2.0]), tensors([3.0, 1.0])]
    assert lists(sago(gradients, [])) == [[1.0, -1.0]]


@pytest.mark.parametrize("agreeing", ["forget", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_coordinate_of_sago_works_against_retaining(agreeing, dtype):
    for seed in range(20):
        forget, retain = ([t.to(dtype) for t in role] for role in random_gradients(2, seed))
        update = sago(copies([forget, retain]), [], agreeing=agreeing)
        assert all((u.double() * r.double() >= 0).all() for u, r in zip(update, retain, strict=True))
        assert all(u.dtype == dtype for u in update)


# ---- pcgrad_per_layer --------------------------------------------------------------------------------------


def test_pcgrad_per_layer_by_hand():
    # First tensor: <f, r> = -2, <r, r> = 2, so f + 2 r. Second: no conflict, f + r.
    gradients = [tensors([2.0, 0.0], [1.0]), tensors([-1.0, 1.0], [4.0])]
    assert lists(pcgrad_per_layer(copies(gradients), [])) == [[0.0, 2.0], [5.0]]
    # Over both tensors <f, r> = 2: there is no conflict to see.
    weights = pcgrad_retain_first(gram_matrix(gradients))
    assert weights == [1.0, 1.0]


def test_pcgrad_per_layer_keeps_its_promise_in_every_tensor():
    for seed in range(20):
        for roles in (2, 3):
            gradients = random_gradients(roles, seed)
            update = pcgrad_per_layer(copies(gradients), [])
            for u, *parts in zip(update, *gradients, strict=True):
                whole = pcgrad_retain_first(gram_matrix([[t] for t in parts]))
                terms = [w * t.double() for w, t in zip(whole, parts, strict=True)]
                assert (u - sum(terms)).norm() <= 1e-6 * sum(t.norm() for t in terms)
                if roles == 2:
                    f, r = (t.double() for t in parts)
                    assert float((u * r).sum() - (r * r).sum()) >= -1e-5 * float((f.norm() + r.norm()) * r.norm())


@either
def test_missing_gradients_count_as_zero(name):
    gradients = [tensors([1.0, 2.0], None, None), tensors(None, [3.0], None)]
    assert lists(EITHER[name](gradients, [])) == [[1.0, 2.0], [3.0], None]


@either
def test_a_role_of_zeros_leaves_the_other(name):
    gradients = [tensors([1.0, -2.0]), tensors([0.0, 0.0])]
    assert lists(EITHER[name](gradients, [])) == [[1.0, -2.0]]


# ---- gru ---------------------------------------------------------------------------------------------------


def test_gru_by_hand_over_two_windows():
    # q = 0.5 (0, -4) = (0, -2); <f, q> = -4, <q, q> = 4: f + q
    update, state = gru([tensors([1.0, 2.0]), tensors([0.0, -4.0])], [], None, gamma=0.5)
    assert (lists(update), lists(state)) == ([[1.0, 0.0]], [[0.0, -2.0]])
    # q = 0.5 (4, 4) + 0.5 (0, -2) = (2, 1); <f, q> = -5, <q, q> = 5: f + q. Against r itself there is no conflict.
    update, state = gru([tensors([-3.0, 1.0]), tensors([4.0, 4.0])], [], state, gamma=0.5)
    assert (lists(update), lists(state)) == ([[-1.0, 2.0]], [[2.0, 1.0]])
    # q = 0.5 (0, 0) + 0.5 (2, 1): no conflict, f
    update, state = gru([tensors([1.0, 1.0]), tensors([0.0, 0.0])], [], state, gamma=0.5)
    assert (lists(update), lists(state)) == ([[1.0, 1.0]], [[1.0, 0.5]])


def test_gru_with_a_cosine_clip_leaves_a_part_of_a_strong_conflict():
    # cos = -0.8: f - |f| / |q| * (-0.5) q = (3, -4) + 5 / 2 * 0.5 (0, 2)
    given = [tensors([3.0, -4.0]), tensors([0.0, 2.0])]
    assert lists(gru(copies(given), [], None, gamma=1.0, cos_clip=-0.5)[0]) == [pytest.approx([3.0, -1.5])]
    assert lists(gru(copies(given), [], None, gamma=1.0, cos_clip=-0.9)[0]) == [pytest.approx([3.0, 0.0])]
    assert lists(gru(copies(given), [], None, gamma=1.0)[0]) == [pytest.approx([3.0, 0.0])]


def test_gru_without_memory_is_agem():
    for seed in range(20):
        gradients = random_gradients(2, seed)
        update, state = gru(copies(gradients), [], None, gamma=1.0)
        weights = agem(gram_matrix(gradients))
        expected = [weighted_sum(parts, weights) for parts in zip(*copies(gradients), strict=True)]
        size = math.sqrt(dot(gradients[0], gradients[0]))
        off = [u - e for u, e in zip(update, expected, strict=True)]
        assert math.sqrt(dot(off, off)) <= 1e-6 * size
        assert all(torch.equal(q, r) for q, r in zip(state, gradients[1], strict=True))


def test_gru_never_works_against_its_average_which_holds_all_kept_gradients():
    state, expected = None, [torch.zeros(3, 4, dtype=torch.float64) for _ in range(5)]
    for seed in range(20):
        gradients = random_gradients(3, seed)
        update, state = gru(copies(gradients), [], state)
        for q, one, two in zip(expected, *gradients[1:], strict=True):
            q.mul_(0.2).add_(0.8 * (one.double() + two.double()))
        assert all(torch.allclose(s.double(), q, rtol=1e-4, atol=1e-9) for s, q in zip(state, expected, strict=True))
        sizes = math.sqrt(dot(gradients[0], gradients[0]) * dot(state, state))
        assert dot(update, state) >= -1e-6 * sizes


def test_gru_with_missing_gradients():
    update, state = gru([tensors([1.0], None, None), tensors([-2.0], [1.0], None)], [], None, gamma=1.0)
    # <f, q> = -2, <q, q> = 5: f + 0.4 q
    assert lists(update) == [pytest.approx([0.2]), pytest.approx([0.4]), None]
    update, state = gru([tensors([1.0], None, None), tensors(None, None, [1.0])], [], state, gamma=0.5)
    assert lists(state) == [[-1.0], [0.5], [0.5]]


def test_gru_ignores_a_conflict_with_rounding_noise():
    update, _ = gru([tensors([11.0]), tensors([-4e-8])], [], None)
    assert lists(update) == [[11.0]]


def test_the_state_is_not_the_update():
    """The optimizer clips and changes the update in place."""
    for forget, retain in (([1.0], [-1.0]), (None, [1.0]), ([1.0], [1.0])):
        (update,), (state,) = gru([tensors(forget), tensors(retain)], [], None)
        assert update is None or update.data_ptr() != state.data_ptr()


def test_the_table_says_what_each_needs():
    needs = {name: CONFLICT_RULES[name].needs for name in ("sago", "pcgrad_per_layer", "gru")}
    assert needs == {"sago": {"gradients"}, "pcgrad_per_layer": {"gradients"}, "gru": {"gradients", "state"}}
