"""Every conflict rule inside the trainer: the update of a window, the state of a stateful rule, its
checkpoint."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer_bed import (
    Gradients,
    Nudge,
    adapted,
    assert_resume_is_exact,
    distance,
    exact,
    inner,
    lines,
    llama,
    make,
    nudged,
    resumed,
    role_gradients,
    ruled,
    same,
    two_roles,
    weights,
    windows,
)

from hf_clmul.errors import RunError
from hf_clmul.gradients.active import STATE as RULE_STATE
from hf_clmul.gradients.active import active_rule
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.gradients.window import load_gradient, save_gradient

WANTED = [
    *CONFLICT_RULES,
    {"agem": {"margin": 0.5}},
    {"bisector": {"length": "imtl"}},
    {"gru": {"cos_clip": -0.05}},
]
TERMS = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}}


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_every_rule_makes_the_update(tmp_path, wanted):
    """The trainer's gradient is the rule's on gradients worked out example by example in float64."""
    start, saw = llama(), Gradients()
    before = exact(start)
    trainer = make(start, two_roles(), tmp_path, [Nudge(), saw], conflict=wanted, **TERMS)
    student = exact(nudged(trainer.model))
    trainer.train()
    by_role, _ = role_gradients(student, before, windows(trainer, 8)[0], TERMS)
    update, rule = ruled(wanted, by_role), active_rule(wanted)
    assert inner(by_role["forget"], by_role["retain"]) < 0
    # sago: a gradient that rounds to the other sign of zero changes its whole coordinate
    tolerance = 1e-3 if rule.name == "sago" else 5e-6
    assert distance(saw.steps[0], update) < tolerance
    logged = lines(trainer)[0]
    assert ("weight/forget" in logged) == (rule.name not in ("sum", "gru", "sago", "pcgrad_per_layer"))
    assert ("cosine/forget/retain" in logged) == rule.compares


@pytest.mark.parametrize("build", [llama, adapted])
def test_gru_resumes_exactly_with_its_moving_average(tmp_path, build):
    options = {"conflict": {"gru": {"gamma": 0.3}}, "max_steps": 5, "learning_rate": 1e-3, "forget": "grad_ascent",
               "retain": "nll"}  # fmt: skip
    start = build()
    through = assert_resume_is_exact(start, tmp_path, (2, 4), **options)
    checkpoint = tmp_path / "4" / "checkpoint-4"
    state = load_file(checkpoint / RULE_STATE)
    save_file({name: -tensor for name, tensor in state.items()}, checkpoint / RULE_STATE)
    other = resumed(start, checkpoint, **options)
    assert not same(weights(other.model), weights(through.model))  # else the state would not matter here
    (checkpoint / RULE_STATE).unlink()
    with pytest.raises(
        RunError, match="has no conflict_state.safetensors: it was made without conflict='gru'. Start the"
    ):
        resumed(start, checkpoint, **options)


def test_a_checkpoint_behind_windows_that_overflowed_holds_that_there_is_no_state_yet(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    fresh, loaded = active_rule("gru"), active_rule("gru")
    fresh.save(tmp_path)
    loaded.load(tmp_path, parameters)
    updates = []
    for rule in (fresh, loaded):
        gradients = [[torch.tensor([1.0, 2.0]), None], [torch.tensor([-1.0, 0.0]), torch.tensor([3.0])]]
        updates.append(rule.combined(gradients, [[5.0, -1.0], [-1.0, 10.0]]))
    for one, other in zip(*updates, strict=True):
        assert torch.equal(one, other)
    assert fresh.state is not None and same(*(dict(enumerate(rule.state)) for rule in (fresh, loaded)))


def test_a_second_training_starts_without_the_state_of_the_first(tmp_path):
    trainer = make(llama(), {**two_roles()}, tmp_path, conflict="gru", forget="grad_ascent", retain="nll", max_steps=2)
    trainer.train()
    old = trainer.rule.state
    assert old is not None and not (tmp_path / "checkpoint-2").exists()
    trainer.train()
    assert trainer.rule.state is not old


def test_a_checkpoint_holds_a_state_only_where_there_is_one(tmp_path):
    for rule, there in (("gru", True), ("agem", False)):
        make(llama(), two_roles(), tmp_path / rule, conflict=rule, save_strategy="steps", save_steps=1).train()
        assert (tmp_path / rule / "checkpoint-1" / RULE_STATE).is_file() == there


def test_a_state_of_other_parameters_is_refused(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    file = tmp_path / RULE_STATE
    gradient = [torch.arange(6.0).reshape(3, 2).T, None]  # not contiguous
    save_gradient(gradient, file)
    one, two = load_gradient(file, parameters)
    assert torch.equal(one, gradient[0]) and two is None
    for others in (parameters[::-1], []):
        with pytest.raises(RunError, match="is for other parameters: resume with the model and adapter that made it"):
            load_gradient(file, others)


@pytest.mark.parametrize("rule", ["gru", "sago", "pcgrad_per_layer", "bisector"])
def test_a_loss_scale_changes_nothing(tmp_path, rule):
    """Trap 9, with a scale that changes on the way: 2^10, then 2^11 from the second step on."""
    after = []
    for scale in (None, 2.0**10):
        trainer = make(
            llama(), two_roles(16, 16), tmp_path, retain="nll", conflict=rule, max_steps=3, learning_rate=0.01
        )
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        trainer.train()
        after.append(weights(trainer.model))
    assert trainer.accelerator.scaler.get_scale() == 2.0**13
    assert distance(*after) < 1e-7


@pytest.mark.parametrize("rule", ["gru", "sago", "mgda"])
def test_an_overflow_reaches_the_scaler_and_leaves_the_state_alone(tmp_path, rule):
    trainer = make(llama(), two_roles(16, 16), tmp_path, retain="nll", conflict=rule)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = weights(trainer.model)
    trainer.train()
    assert same(weights(trainer.model), before) and trainer.accelerator.optimizer_step_was_skipped
    assert trainer.rule.state is None


def test_a_role_of_zero_gradients_does_not_stop_training(tmp_path):
    """A KL to the model itself: the first window's retain gradient is noise, later ones are not."""
    for rule in CONFLICT_RULES:
        trainer = make(llama(), two_roles(), tmp_path, conflict=rule, retain="kl", max_steps=3)
        trainer.train()
        assert all(math.isfinite(line["grad_norm"]) for line in lines(trainer))


@pytest.mark.parametrize("wanted", ["sago", "agem"])
def test_with_one_role_there_is_no_rule(tmp_path, wanted):
    trainer = make(llama(), {"forget": two_roles()["forget"]}, tmp_path, conflict=wanted)
    assert trainer.rule.function is None
    trainer.train()
