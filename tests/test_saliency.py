"""Which weights matter, by hand: what is marked, what is drawn anew, what is held."""

import math

import pytest
import torch
from torch import nn

from hf_clmul.gradients.saliency import Held, connection_scores, gradient_scores, top, trim


def marked(scores, fraction):
    return [mask.int().tolist() for mask in top([torch.tensor(s) for s in scores], fraction)]


@pytest.mark.parametrize(
    ("scores", "fraction", "expected"),
    [
        ([[3.0, 0.5, 1.0], [2.0]], 0.5, [[1, 0, 0], [1]]),  # over all tensors together
        ([[3.0, 0.5, 1.0], [2.0]], 0.75, [[1, 0, 1], [1]]),
        ([[1.0, 1.0, 1.0, 0.5]], 0.25, [[1, 1, 1, 0]]),  # ties at the threshold
        ([[0.0, 0.0, 0.0, 5.0]], 0.75, [[0, 0, 0, 1]]),  # zeros never
        ([[1.0, 2.0, 3.0, 4.0]], 0.1, [[0, 0, 0, 0]]),  # rounds to no entry
        ([[1.0, 2.0, 3.0, 4.0]], 0.2, [[0, 0, 0, 1]]),
        ([[[1.0, 4.0], [2.0, 3.0]]], 0.5, [[[0, 1], [0, 1]]]),
    ],
)
def test_what_is_marked(scores, fraction, expected):
    assert marked(scores, fraction) == expected


def test_scores():
    gradients, weights = [torch.tensor([1.0, -2.0, 3.0])], [torch.tensor([-4.0, 5.0, 0.0])]
    assert [s.tolist() for s in gradient_scores(gradients)] == [[1.0, 2.0, 3.0]]
    assert [s.tolist() for s in connection_scores(gradients, weights)] == [[4.0, 10.0, 0.0]]


def parameters():
    """A matrix, a LoRA's two, and a vector, all of ones, and masks that mark about half of each."""
    generator = torch.Generator().manual_seed(3)
    names = {
        "mlp.weight": (300, 25),
        "q.lora_A.default.weight": (4, 100),
        "q.lora_B.default.weight": (50, 4),
        "norm.weight": (40,),
    }
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in names.items()]
    return named, [torch.rand(p.shape, generator=generator) < 0.5 for _, p in named]


def test_trimming_draws_matrices_within_kaimings_bound_and_lets_vectors_be():
    named, masks = parameters()
    drawn = trim(named, masks, torch.Generator().manual_seed(0))
    assert drawn == sum(int(mask.sum()) for mask in masks[:3])
    (_, matrix), (_, a), (_, b), (_, vector) = named
    for (_, p), mask in zip(named, masks, strict=True):
        assert torch.equal(p[~mask], torch.ones_like(p[~mask]))
    assert torch.equal(vector, torch.ones(40)) and masks[3].any()
    assert not b[masks[2]].any()  # what a LoRA's B was when it was made
    for p, mask, inputs in ((matrix, masks[0], 25), (a, masks[1], 100)):
        fresh, bound = p.detach()[mask], 1 / math.sqrt(inputs)  # sqrt(6 / ((1 + 5) * inputs))
        assert 0.9 * bound < fresh.abs().max() <= bound
        assert abs(float(fresh.mean())) < 4 * bound / math.sqrt(3 * len(fresh))
        assert float(fresh.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_trimming_is_seeded_and_draws_the_same_for_any_choice():
    found = []
    for seed in (0, 0, 1):
        named, masks = parameters()
        trim(named, masks, torch.Generator().manual_seed(seed))
        found.append(named[0][1].detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    named, masks = parameters()
    trim(named, [torch.ones_like(mask) for mask in masks], torch.Generator().manual_seed(0))
    assert torch.equal(named[0][1][masks[0]], found[0][masks[0]])


def test_held_entries_come_back():
    weight = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    held = Held([weight], [torch.tensor([[True, False], [False, True]])])
    with torch.no_grad():
        weight.mul_(10)
    held.restore()
    assert weight.tolist() == [[10.0, 2.0], [3.0, 40.0]]
