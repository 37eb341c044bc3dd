"""LUR on losses of one weight, by hand: every mode, either role inside, two roles and three; and weights that come back."""

import pytest
import torch
from torch import nn

from hf_clmul.gradients.lookahead import looked_ahead
from hf_clmul.gradients.window import GradientWindow, total


def cube(w):
    return w**3


def square(w):
    return w**2


def far(w):
    return (w - 2) ** 2 / 2


BOTH = {"forget": cube, "retain": square}
THREE = {**BOTH, "memory": far}


class Toy:
    """The passes over losses of one weight, which starts at 1. `calls`: what was asked for, and at which weight."""

    def __init__(self, losses):
        self.losses = losses
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.window = GradientWindow([self.weight])
        self.displaced = self.window.displaced
        self.calls = []

    def gradient(self, role, again=False):
        self.calls.append((role, self.weight.item(), again))
        self.losses[role](self.weight).sum().backward()
        return self.window.take()

    def curvature(self, role, direction):
        self.calls.append((role, self.weight.item(), "curvature"))
        (g,) = torch.autograd.grad(self.losses[role](self.weight).sum(), [self.weight], create_graph=True)
        (g * direction[0]).sum().backward()
        return self.window.take()


def ahead(losses, inner, mode, alpha=0.25):
    toy = Toy(losses)
    found = looked_ahead(list(losses), inner, mode, alpha, toy, total)
    assert toy.weight.item() == 1.0
    return [g.item() for (g,) in found], toy


# At w = 1 with alpha = 1/4. Inner w^2: slope 2, so w' = 1/2, where w^3 has 3/4; H = 2, so exact 2 - 1/4 * 2 * 3/4; cross
# is the slope at 1 - 3/16, which is the same, as w^2 has no third derivative. Inner w^3: slope 3, w' = 1/4, where w^2 has
# 1/2; H = 6, so exact 3 - 1/4 * 6 * 1/2; cross 3 (1 - 1/8)^2, off by alpha^2 / 2 * 6 * (1/2)^2.
BY_HAND = {
    ("retain", "first_order"): [0.75, 2.0],
    ("retain", "cross"): [0.75, 1.625],
    ("retain", "exact"): [0.75, 1.625],
    ("forget", "first_order"): [3.0, 0.5],
    ("forget", "cross"): [2.296875, 0.5],
    ("forget", "exact"): [2.25, 0.5],
}


@pytest.mark.parametrize(("inner", "mode"), BY_HAND)
def test_two_roles(inner, mode):
    assert ahead(BOTH, inner, mode)[0] == BY_HAND[inner, mode]


@pytest.mark.parametrize(("inner", "other"), [("retain", "forget"), ("forget", "retain")])
def test_exact_is_the_gradient_of_the_objective(inner, other):
    w = torch.tensor([1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(BOTH[inner](w).sum(), w, create_graph=True)
    objective = BOTH[inner](w) + BOTH[other](w - 0.25 * slope)
    assert sum(ahead(BOTH, inner, "exact")[0]) == torch.autograd.grad(objective.sum(), w)[0].item()


@pytest.mark.parametrize("mode", ["first_order", "cross", "exact"])
def test_three_roles_stay_in_their_order_and_are_looked_at_from_one_place(mode):
    """All outer roles at 1/2: slopes 3/4 and -3/2. The inner one feels their sum, -3/4: 2 (1 + 3/16)."""
    found, toy = ahead(THREE, "retain", mode)
    assert found == [0.75, 2.0 if mode == "first_order" else 2.375, -1.5]
    assert toy.calls[:3] == [("retain", 1.0, False), ("forget", 0.5, False), ("memory", 0.5, False)]


def test_how_many_passes_each_mode_takes():
    for mode, further in (
        ("first_order", []),
        ("cross", [("retain", 0.8125, True)]),
        ("exact", [("retain", 1.0, "curvature")]),
    ):
        assert ahead(BOTH, "retain", mode)[1].calls[2:] == further


def test_cross_is_off_by_alpha_squared_and_first_order_by_alpha():
    def error(mode, alpha):
        return abs(ahead(BOTH, "forget", mode, alpha)[0][0] - ahead(BOTH, "forget", "exact", alpha)[0][0])

    assert error("cross", 0.25) / error("cross", 0.125) == pytest.approx(4 * (0.5 / 1.25) ** 2)  # o is 2 (1 - 3 alpha)
    assert error("first_order", 0.25) / error("first_order", 0.125) == pytest.approx(2 * 0.5 / 1.25)


# ---- weights that move and come back -------------------------------------------------------------------------------


def window():
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(5, 7, generator=generator)), nn.Parameter(torch.randn(3, generator=generator))]
    return GradientWindow(weights), [torch.randn(5, 7, generator=generator), None]


def test_displaced_weights_come_back_bit_for_bit_where_adding_back_would_not():
    found, gradient = window()
    before = [p.detach().clone() for p in found.parameters]
    with found.displaced(gradient, -0.3):
        assert torch.equal(found.parameters[0], torch.add(before[0], gradient[0], alpha=-0.3))
        assert torch.equal(found.parameters[1], before[1])
        added_back = found.parameters[0] + 0.3 * gradient[0]
    assert all(torch.equal(p, b) for p, b in zip(found.parameters, before, strict=True))
    assert not torch.equal(added_back, before[0])


def failing(window, gradient):
    with window.displaced(gradient, 1.0):
        raise KeyboardInterrupt


def out_of_memory(window, gradient):
    """The second weight cannot be moved when the first one was."""
    with window.displaced([gradient[0], torch.zeros(4)], 1.0):
        raise AssertionError("never reached")


@pytest.mark.parametrize(("act", "error"), [(failing, KeyboardInterrupt), (out_of_memory, RuntimeError)])
def test_they_come_back_whatever_happens(act, error):
    found, gradient = window()
    before = [p.detach().clone() for p in found.parameters]
    with pytest.raises(error):
        act(found, gradient)
    assert all(torch.equal(p, b) for p, b in zip(found.parameters, before, strict=True))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    found, gradient = window()
    gradient[0][0, 0] = bad
    before = found.parameters[0].detach().clone()
    with found.displaced(gradient, 1.0):
        assert torch.equal(found.parameters[0], before)


def test_a_small_step_is_lost_in_bfloat16():
    """Trap 17: its last digit is 2^-7 of a number."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.linspace(1, 2, 64).to(dtype))
        found = GradientWindow([weight])
        before = weight.detach().clone()
        with found.displaced([torch.ones(64, dtype=dtype)], 1e-4):
            moved[dtype] = int((weight != before).sum())
    assert moved == {torch.float32: 64, torch.bfloat16: 0}


def test_masked_entries_are_not_moved():
    weight = nn.Parameter(torch.ones(3))
    masked = GradientWindow([weight], masks=[torch.tensor([True, False, True])])
    (weight * 2).sum().backward()
    gradient = masked.take()
    with masked.displaced(gradient, -0.25):
        assert weight.tolist() == [0.5, 1.0, 0.5]
