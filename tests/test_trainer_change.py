"""The diagnostics of a step: what the optimizer's change means for each role, to first order."""

import pytest
import torch
from trainer_bed import (
    Gradients,
    Nudge,
    adapted,
    combined,
    distance,
    exact,
    examples,
    inner,
    lines,
    llama,
    make,
    nudged,
    role_gradients,
    same,
    two_roles,
    weights,
    windows,
)

TERMS = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}}


def one_step(tmp_path, **options):
    """(the trainer, {role: gradient} in float64, the weights before and after)."""
    start = llama()
    before = exact(start)
    options = {"change_steps": 1, **TERMS, **options}
    trainer = make(start, two_roles(), tmp_path, [Nudge()], **options)
    student = nudged(trainer.model)
    trainer.train()
    by_role, _ = role_gradients(exact(student), before, windows(trainer, 8)[0], TERMS)
    return trainer, by_role, weights(student), weights(trainer.model)


@pytest.mark.parametrize("rule", ["sum", "pcgrad", "pcgrad_retain_first"])
def test_with_sgd_it_is_the_learning_rate_times_the_inner_product_with_the_update(tmp_path, rule):
    trainer, by_role, *_ = one_step(tmp_path, conflict=rule)
    update = combined(by_role, rule)
    for role, gradient in by_role.items():
        # A change of weights is a difference of float32 numbers, of some 1e-3 of them.
        assert lines(trainer)[0][f"change/{role}"] == pytest.approx(-0.1 * inner(gradient, update), rel=1e-3)


def test_of_one_role_it_is_the_squared_norm(tmp_path):
    trainer = make(llama(), {"learn": examples(8, 1)}, tmp_path, change_steps=1)
    trainer.train()
    (line,) = lines(trainer)
    assert line["change/learn"] == pytest.approx(-0.1 * line["grad_norm/learn"] ** 2, rel=1e-3)


def test_with_adamw_it_is_measured_on_the_weights(tmp_path):
    options = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
    trainer, by_role, before, after = one_step(tmp_path, conflict="pcgrad_retain_first", **options)
    update = combined(by_role, "pcgrad_retain_first")
    for role, gradient in by_role.items():
        measured = sum(
            float((g * (after[name].double() - before[name].double())).sum()) for name, g in gradient.items()
        )
        # AdamW's first step: lr * update / |update|, and the decay lr * 0.1 of matrices (vectors are left out)
        signs = sum(
            float((g * (-1e-3 * update[name].sign() - 1e-4 * (before[name].ndim > 1) * before[name])).sum())
            for name, g in gradient.items()
        )
        assert lines(trainer)[0][f"change/{role}"] == pytest.approx(measured, rel=1e-4)
        assert measured == pytest.approx(signs, rel=1e-2)


def test_only_every_so_many_steps(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path, change_steps=2, max_steps=5, conflict="sum")
    trainer.train()
    assert ["change/forget" in line for line in lines(trainer)] == [True, False, True, False, True]
    assert ["cosine/forget/retain" in line for line in lines(trainer)] == [True, False, True, False, True]
    never = make(llama(), two_roles(), tmp_path, max_steps=2)
    never.train()
    assert not any(name.startswith(("change/", "plain_")) for line in lines(never) for name in line)
    with pytest.raises(ValueError, match="change_steps=-1 is negative: give a number of steps, or 0 for never"):
        make(llama(), two_roles(), tmp_path, change_steps=-1)


WAYS = {
    "sum": {"conflict": "sum"},
    "gram rule": {"conflict": "pcgrad"},
    "state": {"conflict": "gru"},
    "weights known beforehand": {"conflict": {"pdu": {"start": 2.0}}},  # a power of two: no rounding
    "look ahead": {"conflict": "pcgrad_retain_first", "lookahead": {"alpha": 0.05}},
    "adapter": {"conflict": "sum", "build": adapted},
}


@pytest.mark.parametrize("way", WAYS)
def test_training_is_the_same_to_the_bit_with_and_without(tmp_path, way):
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 3, **TERMS, **WAYS[way]}
    build, after = options.pop("build", llama), []
    for every in (0, 1):
        trainer = make(build(), two_roles(), tmp_path, change_steps=every, **options)
        trainer.train()
        after.append(weights(trainer.model))
    assert same(*after)


def test_with_several_micro_batches_only_rounding_differs(tmp_path):
    options = {"conflict": "sum", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **TERMS}
    steps = []
    for every in (0, 1):
        saw = Gradients()
        make(llama(), two_roles(), tmp_path, [saw], change_steps=every, **options).train()
        steps.append(saw.steps[0])
    assert 0 < distance(*steps) < 1e-6


def test_with_a_look_ahead_the_plain_gradients_are_measured_too(tmp_path):
    """`change` and `plain_cosine` are of the weights before the step; `cosine` is of the gradients that it yields."""
    trainer, by_role, before, after = one_step(tmp_path, conflict="sum", lookahead={"alpha": 0.1})
    line = lines(trainer)[0]
    f, r = by_role["forget"], by_role["retain"]
    plain = inner(f, r) / (inner(f, f) * inner(r, r)) ** 0.5
    assert line["plain_cosine/forget/retain"] == pytest.approx(plain, rel=1e-4)
    assert abs(line["cosine/forget/retain"] - plain) > 0.1
    for role, gradient in by_role.items():
        moved = {name: (after[name] - before[name]).double() for name in after}
        assert line[f"change/{role}"] == pytest.approx(inner(gradient, moved), rel=1e-4)


def test_a_loss_scale_changes_nothing_even_where_it_grows_with_the_step(tmp_path):
    found = []
    for scale in (None, 2.0**10):
        trainer = make(llama(), two_roles(), tmp_path, change_steps=1, max_steps=2, **TERMS)
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        trainer.train()
        found.append(
            [{n: v for n, v in line.items() if n.startswith(("change/", "plain_"))} for line in lines(trainer)]
        )
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4) and len(one) == 3


def test_a_step_that_the_scaler_skips_is_not_measured(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path, change_steps=1, **TERMS)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert trainer.accelerator.optimizer_step_was_skipped
    assert not [name for name in lines(trainer)[0] if name.startswith(("change/", "plain_"))]
