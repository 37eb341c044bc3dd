"""The window: taking gradients out of `.grad`, the Gram matrix, combining; each by hand on small tensors."""

import math

import pytest
import torch
from torch import nn

from hf_clmul.gradients.conflict import CONFLICT_RULES, pcgrad_retain_first
from hf_clmul.gradients.window import GradientWindow, agreed, gram_matrix, is_finite, statistics

CPU = torch.device("cpu")


def parameters(*gradients):
    """One parameter for each gradient, a list of numbers or None."""
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros(2 if gradient is None else len(gradient))))
        made[-1].grad = None if gradient is None else torch.tensor(gradient)
    return made


def tensors(*gradients):
    return [None if gradient is None else torch.tensor(gradient) for gradient in gradients]


# Over three parameters; None where a role does not reach one.
FORGET, RETAIN = ([2.0, 0.0], [1.0], None), ([-1.0, 1.0], None, [3.0])


def test_take_moves_gradients_out_and_leaves_none_behind():
    window = GradientWindow(parameters(*FORGET))
    taken = window.take()
    assert [None if t is None else t.tolist() for t in taken] == [[2.0, 0.0], [1.0], None]
    assert [p.grad for p in window.parameters] == [None, None, None]


@pytest.mark.parametrize("clone", [True, False])
def test_only_a_clone_survives_when_the_storage_is_used_again(clone):
    """Trap 4: with `gradient_as_bucket_view` the next backward pass writes into the same storage."""
    (parameter,) = parameters([1.0, 2.0])
    storage = parameter.grad
    (taken,) = GradientWindow([parameter], clone=clone).take()
    storage.fill_(9.0)
    assert taken.tolist() == ([1.0, 2.0] if clone else [9.0, 9.0])


def test_combine_is_the_weighted_sum_and_counts_missing_gradients_as_zero():
    window = GradientWindow(parameters([0.0, 0.0], [0.0], [0.0], [0.0]))
    window.take()
    window.combine([[*tensors(*FORGET), None], [*tensors(*RETAIN), None]], [1.0, 2.0])
    # (2, 0) + 2 (-1, 1); 1 * 1; 2 * 3; nothing
    grads = [None if p.grad is None else p.grad.tolist() for p in window.parameters]
    assert grads == [[0.0, 2.0], [1.0], [6.0], None]


def test_combine_of_three_roles_weights_each_of_them():
    window = GradientWindow(parameters(None))
    window.combine([tensors([1.0, 10.0]), tensors(None), tensors([100.0, 1.0])], [2.0, 5.0, 0.5])
    assert window.parameters[0].grad.tolist() == [52.0, 20.5]


def test_gram_matrix_by_hand():
    # <f, f> = 4 + 1; <f, r> = -2; <r, r> = 2 + 9
    assert gram_matrix([tensors(*FORGET), tensors(*RETAIN)]) == [[5.0, -2.0], [-2.0, 11.0]]


def test_gram_matrix_of_matrices_and_half_precision():
    one = [torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16), None]
    other = [torch.full((2, 2), 300.0, dtype=torch.float16), torch.ones(3)]
    # 90000 * 4 = 360000 is beyond float16, whose largest number is 65504.
    assert gram_matrix([one, other]) == [[30.0, 3000.0], [3000.0, 360003.0]]


def test_gram_matrix_of_roles_that_reach_nothing():
    assert gram_matrix([[None, None], [None, torch.ones(2)]]) == [[0.0, 0.0], [0.0, 2.0]]


def test_gram_matrix_divides_by_the_scale_squared():
    """Trap 9: gradients under a loss scaler are S times too large, inner products S squared times."""
    scaled = [[None if t is None else 1024.0 * t for t in tensors(*role)] for role in (FORGET, RETAIN)]
    assert gram_matrix(scaled, loss_scale=1024.0) == [[5.0, -2.0], [-2.0, 11.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_overflow_in_one_gradient_is_seen(bad):
    assert is_finite(gram_matrix([tensors(*FORGET), tensors(*RETAIN)]))
    assert not is_finite(gram_matrix([tensors(*FORGET), tensors([0.0, bad], None, [3.0])], loss_scale=1024.0))


def test_a_window_from_backward_passes_to_the_update():
    """f = (2, 0) and r = (-1, 1) as gradients of two losses; retain-first PCGrad makes (0, 2) of them."""
    weight = nn.Parameter(torch.zeros(2))
    window = GradientWindow([weight])
    roles = []
    for direction in ([2.0, 0.0], [-1.0, 1.0]):
        for _ in range(2):  # two micro-batches accumulate
            (weight @ torch.tensor(direction) / 2).backward()
        roles.append(window.take())
    window.combine(roles, pcgrad_retain_first(gram_matrix(roles)))
    assert weight.grad.tolist() == [0.0, 2.0]


def test_every_rule_takes_what_gram_matrix_gives():
    gram = gram_matrix([tensors(*FORGET), tensors(*RETAIN)])
    for rule in CONFLICT_RULES.values():
        assert "gram" not in rule.needs or len(rule.function(gram)) == 2


def test_agreed_on_one_process_gives_the_weights_back():
    weights = [1.0, 1 / 3]
    found = agreed(weights, CPU)
    assert found == weights and found is not weights


def test_agreed_broadcasts_from_rank_0_in_double_precision(monkeypatch):
    """Trap 10, with the process group faked; tests on real ranks are in `test_ranks.py`."""
    import torch.distributed as dist

    seen = []

    def broadcast(tensor, src):
        seen.append((src, tensor.dtype))
        tensor.copy_(torch.tensor([0.25, 0.1], dtype=torch.float64))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    assert agreed([1.0, 1 / 3], CPU) == [0.25, 0.1]
    assert seen == [(0, torch.float64)]


def test_statistics_by_hand():
    # norms 5 and 2; cosine -3 / (5 * 2)
    assert statistics([[25.0, -3.0], [-3.0, 4.0]], ["forget", "retain"]) == {
        "grad_norm/forget": 5.0,
        "grad_norm/retain": 2.0,
        "cosine/forget/retain": -0.3,
        "conflict_rate": 1.0,
    }


def test_statistics_without_conflict_of_one_role_and_of_a_zero_gradient():
    assert statistics([[4.0]], ["learn"]) == {"grad_norm/learn": 2.0, "conflict_rate": 0.0}
    found = statistics([[4.0, 0.0], [0.0, 0.0]], ["forget", "retain"])
    assert (found["cosine/forget/retain"], found["conflict_rate"]) == (0.0, 0.0)


def test_statistics_of_three_roles_name_every_pair_and_see_a_conflict_in_any():
    gram = [[1.0, -0.1, 0.0], [-0.1, 1.0, 0.5], [0.0, 0.5, 1.0]]
    found = statistics(gram, ["forget", "retain", "memory"])
    cosines = {k: v for k, v in found.items() if k.startswith("cosine")}
    assert cosines == {
        "cosine/forget/retain": -0.1,
        "cosine/forget/memory": 0.0,
        "cosine/retain/memory": 0.5,
    }
    assert found["conflict_rate"] == 1.0


def test_statistics_of_an_overflow_do_not_fail():
    found = statistics([[math.inf, math.nan], [math.nan, 1.0]], ["forget", "retain"])
    assert math.isinf(found["grad_norm/forget"]) and math.isnan(found["cosine/forget/retain"])
