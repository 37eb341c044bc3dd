"""SAM of the forget role inside the trainer, against autograd in float64 example by example, and what it must leave alone."""

import pytest
import torch
from torch.func import functional_call
from trainer_bed import (
    LORA,
    Gradients,
    Nudge,
    adapted,
    assert_resume_is_exact,
    by_hand,
    distance,
    exact,
    examples,
    lines,
    llama,
    make,
    nudged,
    ruled,
    same,
    two_roles,
    weights,
    windows,
)

from hf_clmul.models.trainable import only_trainable

TERMS = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}}
RHO = 0.3


def oracle(student, teacher, window):
    """{role: gradient} in float64, that of `forget` after a step of length RHO up its own slope; and both losses at w."""
    names = [name for name, p in student.named_parameters() if p.requires_grad]
    start = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters() if name in names}

    def slope(role, at):
        def model(ids):
            return functional_call(student, at, (ids,))

        (loss,) = by_hand(model, teacher, [row[role] for row in window], TERMS[role]).values()
        return loss.item(), dict(zip(names, torch.autograd.grad(loss, list(at.values())), strict=True))

    (forget, up), (retain, kept) = slope("forget", start), slope("retain", start)
    length = torch.cat([g.flatten() for g in up.values()]).norm()
    there = {name: (p + RHO * up[name] / length).detach().requires_grad_() for name, p in start.items()}
    return {"forget": slope("forget", there)[1], "retain": kept}, up, {"forget": forget, "retain": retain}


def step(tmp_path, build=llama, callbacks=(), sharp=True, **options):
    """(the trainer after one window, the gradient it gave to the optimizer, the oracle's answers)."""
    start, saw = build(), Gradients()
    before = exact(start)
    options = {"conflict": "sum", **TERMS, **options} | ({"sharpness": {"rho": RHO}} if sharp else {})
    trainer = make(start, two_roles(), tmp_path, [Nudge(), saw, *callbacks], **options)
    with only_trainable(trainer.model, trainer.args.trainable):
        student = exact(nudged(trainer.model))
    known = oracle(student, before, windows(make(build(), two_roles(), tmp_path, **TERMS), 8)[0])
    trainer.train()
    return trainer, saw.steps[0], known


@pytest.mark.parametrize("rule", ["sum", "pcgrad_retain_first", "cagrad", "gru", "alternate"])
def test_the_forget_gradient_is_that_of_the_highest_place(tmp_path, rule):
    _, found, (gradients, plain, _) = step(tmp_path, conflict=rule)
    assert distance(found, ruled(rule, gradients)) < 5e-6
    assert distance(found, ruled(rule, {**gradients, "forget": plain})) > 100 * 5e-6  # else it would not matter


@pytest.mark.parametrize("build", [llama, adapted])
def test_the_teacher_does_not_move(tmp_path, build):
    _, found, (gradients, *_) = step(tmp_path, build)
    assert distance(found, ruled("sum", gradients)) < 5e-6


def test_accumulation_changes_nothing(tmp_path):
    """The direction is that of the whole window; answers are of 1 to 12 tokens."""
    whole = step(tmp_path)[1]
    parts = step(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)[1]
    assert distance(parts, whole) < 3e-6


def test_losses_are_logged_once_as_they_are(tmp_path):
    trainer, _, (*_, losses) = step(tmp_path)
    (logged,) = lines(trainer)
    assert logged["loss/forget/npo"] == pytest.approx(losses["forget"], rel=1e-5)
    assert logged["loss/retain/nll"] == pytest.approx(losses["retain"], rel=1e-5)
    assert logged["loss"] == pytest.approx(sum(losses.values()), rel=1e-5)


def test_changes_are_measured_with_the_plain_gradients(tmp_path):
    """To first order: slope times step, where the step is the learning rate times what the optimizer was given."""
    trainer, found, (gradients, plain, _) = step(tmp_path, change_steps=1, learning_rate=1e-3)
    (logged,) = lines(trainer)
    for role, slope in (("forget", plain), ("retain", gradients["retain"])):
        change = -1e-3 * sum(float((slope[name] * found[name]).sum()) for name in found)
        assert logged[f"change/{role}"] == pytest.approx(change, rel=1e-3)


def test_only_the_forget_role_is_left(tmp_path):
    trainer = make(llama(), {"forget": two_roles()["forget"]}, tmp_path, sharpness={}, forget="npo")
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.sharpness.rho == 0.01


@pytest.mark.parametrize("build", [llama, adapted])
def test_resume_is_exact(tmp_path, build):
    options = {"sharpness": {"rho": RHO}, "max_steps": 5, "learning_rate": 1e-3, "conflict": "gru", **TERMS}
    assert_resume_is_exact(build(), tmp_path, (3,), **options)


def test_weights_come_back(tmp_path):
    trainer, *_ = step(tmp_path, learning_rate=0.0)
    assert same(weights(trainer.model), weights(nudged(llama())))


def test_a_loss_scale_changes_nothing(tmp_path):
    """Trap 9: it cancels out of the direction."""
    after = []
    for scale in (None, 2.0**10):
        trainer = make(
            llama(), two_roles(16, 16), tmp_path, sharpness={"rho": RHO}, max_steps=3, learning_rate=0.01, **TERMS
        )
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        trainer.train()
        after.append(weights(trainer.model))
    assert distance(*after) < 1e-7


HALF = "sharpness moves the weights a little and back, which bfloat16 weights round away: load the model in float32"
REFUSED = {
    "weights rounded": (lambda: llama().to(torch.bfloat16), two_roles, {}, HALF),
    "look ahead too": (llama, two_roles, {"lookahead": {}}, "sharpness and lookahead both choose where a gradient is taken"),
    "nothing to forget": (llama, lambda: {"learn": examples(2, 0)}, {}, "sharpness is of the forget role, but the roles are learn"),
    "no length": (llama, two_roles, {"sharpness": {"rho": 0.0}}, "sharpness.rho: expected a number above 0, found 0.0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_remedy(tmp_path, kind):
    build, roles, options, message = REFUSED[kind]
    with pytest.raises(ValueError) as error:
        make(build(), roles(), tmp_path, **{"sharpness": {}, **options})
    assert message in str(error.value)


def test_bf16_weights_are_fine_where_only_a_float32_adapter_trains(tmp_path):
    make(llama().to(torch.bfloat16), two_roles(), tmp_path, sharpness={}, peft_config=LORA)
