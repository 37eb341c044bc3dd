"""SAM of one role on losses of two weights, by hand, and weights that come back."""

import weakref

import pytest
import torch
from torch import nn

from hf_clmul.gradients.sharpness import at_highest
from hf_clmul.gradients.window import GradientWindow


class Toy:
    """The passes over one loss of two weights, which start at (3, 4). `calls`: at which weights it was asked for."""

    def __init__(self, loss, fails=False):
        self.loss, self.fails = loss, fails
        self.weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        self.window = GradientWindow([self.weight])
        self.displaced = self.window.displaced
        self.calls = []

    def gradient(self, role, again=False):
        self.calls.append((role, self.weight.tolist(), again))
        if again and self.fails:
            raise MemoryError
        self.loss(self.weight).backward()
        return self.window.take()


def bowl(w):
    return (w**2).sum() / 2


def stretched(w):
    return (w**2 * torch.tensor([1.0, 9 / 4])).sum() / 2


# The bowl's slope is w, of norm 5, so that rho 1 leads to w (1 + 1/5). The other's is (3, 9), of norm 3 sqrt 10: rho
# sqrt 10 leads to (3 + 1, 4 + 3), where it is (4, 63/4).
BY_HAND = {
    "bowl": (bowl, 1.0, [3.6, 4.8], [3.6, 4.8]),
    "stretched": (stretched, 10**0.5, [4.0, 7.0], [4.0, 15.75]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    loss, rho, place, slope = BY_HAND[name]
    toy = Toy(loss)
    (found,) = at_highest("forget", rho, toy)
    assert found.tolist() == pytest.approx(slope, rel=1e-6)
    (first, second) = toy.calls
    assert first == ("forget", [3.0, 4.0], False)
    assert second[0] == "forget" and second[1] == pytest.approx(place, rel=1e-6) and second[2]
    assert toy.weight.tolist() == [3.0, 4.0]


def test_the_first_gradient_is_let_go_before_the_second_is_worked_out():
    """It is as large as all that trains."""
    toy, held = Toy(bowl), []
    plain = toy.gradient

    def gradient(role, again=False):
        if again:
            assert [first() for first in held] == [None]
        found = plain(role, again)
        held.append(weakref.ref(found[0]))
        return found

    toy.gradient = gradient
    at_highest("forget", 1.0, toy)
    assert len(held) == 2


def test_where_nothing_is_to_be_raised_it_is_the_plain_gradient():
    """At a place of zero slope there is no direction, and 0 / 0 would be the weights' end."""
    toy = Toy(lambda w: (w * 0.0).sum())
    (found,) = at_highest("forget", 0.5, toy)
    assert found.tolist() == [0.0, 0.0] and len(toy.calls) == 1


def test_an_overflow_moves_nothing():
    toy = Toy(lambda w: (w * float("inf")).sum())
    (found,) = at_highest("forget", 0.5, toy)
    assert not torch.isfinite(found).any()
    assert [place for _, place, _ in toy.calls] == [[3.0, 4.0], [3.0, 4.0]]


def test_weights_come_back_after_a_pass_that_fails():
    toy = Toy(bowl, fails=True)
    with pytest.raises(MemoryError):
        at_highest("forget", 1.0, toy)
    assert toy.calls[1][1] != [3.0, 4.0] and toy.weight.tolist() == [3.0, 4.0]
