"""The salient part in training: chosen from the forget data, held through weight decay, momentum and resume."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file
from small_run import execute, write_recipe
from trainer_bed import (
    LORA,
    Gradients,
    Stop,
    adapted,
    answer,
    by_hand,
    distance,
    exact,
    examples,
    inner,
    lines,
    llama,
    make,
    role_gradients,
    same,
    trained,
    two_roles,
    weights,
    windows,
)

from hf_clmul.errors import RunError
from hf_clmul.gradients.saliency import Held
from hf_clmul.training.salient import FILE

HALF = {"train": 0.5}
TERMS = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}}
MOVING = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2, "max_steps": 3, "per_device_train_batch_size": 2,
          **TERMS}  # fmt: skip


def forget_gradient(model, rows):
    """Of the mean log-probability of the answers' tokens, over all examples, in float64."""
    student = exact(model)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    total = by_hand(student, None, rows, {"grad_ascent": {}})["grad_ascent"]
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def largest(scores, fraction):
    every = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values
    threshold = every[round(fraction * len(every)) - 1]
    return {name: (s >= threshold) & (s > 0) for name, s in scores.items()}


def share_of_differences(one, other):
    return sum(int((one[n] != other[n]).sum()) for n in one) / sum(m.numel() for m in one.values())


def masks(trainer):
    return trainer.salient._masks


@pytest.mark.parametrize("build", [llama, adapted])
@pytest.mark.parametrize("size", [8, 3])
def test_the_weights_of_the_largest_gradient_train(tmp_path, build, size):
    start = build()
    trainer = make(
        start, two_roles(), tmp_path, saliency=HALF, per_device_train_batch_size=size, learning_rate=0.0, **TERMS
    )
    expected = largest(
        {n: g.abs() for n, g in forget_gradient(start, trainer.train_dataset.roles["forget"]).items()}, 0.5
    )
    trainer.train()
    assert masks(trainer).keys() == expected.keys()
    assert share_of_differences(masks(trainer), expected) < 1e-3  # the order of the nearly equal is rounding


@pytest.mark.parametrize("build", [llama, adapted])
@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_the_others_do_not_move_by_a_bit(tmp_path, build, rule):
    trainer = make(build(), two_roles(), tmp_path, saliency=HALF, conflict=rule, **MOVING)
    before = trained(trainer.model)
    trainer.train()
    after, mask = trained(trainer.model), masks(trainer)
    assert same({n: w[~mask[n]] for n, w in after.items()}, {n: w[~mask[n]] for n, w in before.items()})
    moved = sum(int((after[n] != before[n])[mask[n]].sum()) for n in after)
    assert moved > 0.95 * sum(int(m.sum()) for m in mask.values())


def test_a_zero_gradient_alone_would_not_hold_them(tmp_path, monkeypatch):
    monkeypatch.setattr(Held, "restore", lambda self: None)
    trainer = make(llama(), two_roles(), tmp_path, saliency=HALF, **MOVING)
    before = trained(trainer.model)
    trainer.train()
    assert not same(
        *({n: w[~masks(trainer)[n]] for n, w in found.items()} for found in (trained(trainer.model), before))
    )


def test_the_conflict_rule_sees_what_trains(tmp_path):
    start, saw = llama(), Gradients()
    before = exact(start)
    trainer = make(start, two_roles(), tmp_path, [saw], saliency=HALF, conflict="pcgrad", **TERMS)
    trainer.train()
    by_role, _ = role_gradients(before, before, windows(trainer, 8)[0], TERMS)
    f, r = ({n: g * masks(trainer)[n] for n, g in by_role[role].items()} for role in ("forget", "retain"))
    line = lines(trainer)[0]
    assert line["grad_norm/forget"] == pytest.approx(math.sqrt(inner(f, f)), rel=1e-5)
    assert line["cosine/forget/retain"] == pytest.approx(inner(f, r) / math.sqrt(inner(f, f) * inner(r, r)), rel=1e-4)
    b = min(inner(f, r), 0.0)
    wanted = {n: (1 - b / inner(f, f)) * f[n] + (1 - b / inner(r, r)) * r[n] for n in f}
    assert distance(saw.steps[0], wanted) < 5e-6


def test_change_is_that_of_what_trains(tmp_path):
    """The held part is put back before the change is measured."""
    trainer = make(
        llama(), two_roles(), tmp_path, saliency=HALF, change_steps=1, **{**MOVING, "max_steps": 1, "weight_decay": 0.5}
    )
    before = exact(trainer.model)
    start = weights(trainer.model)
    trainer.train()
    by_role, _ = role_gradients(before, before, windows(trainer, 2)[0], TERMS)
    moved = {n: (w - start[n]).double() for n, w in weights(trainer.model).items()}
    assert lines(trainer)[0]["change/retain"] == pytest.approx(inner(by_role["retain"], moved), rel=1e-4)


# ---- resume --------------------------------------------------------------------------------------------------------

BOTH = {"train": 0.5, "trim": 0.1}


@pytest.mark.parametrize("build", [llama, adapted])
def test_resume_is_exact_and_trims_no_second_time(tmp_path, monkeypatch, build):
    options = {**MOVING, "saliency": BOTH, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    start = build()
    through = make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "through", **options)
    through.train()
    with pytest.raises(KeyboardInterrupt):
        make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "stopped", [Stop(3)], **options).train()
    resumed = make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "stopped", **options)
    monkeypatch.setattr(resumed.salient, "choose", None)  # whoever calls it fails
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(through.model)) and lines(resumed) == lines(through)
    assert same(masks(resumed), masks(through))
    (tmp_path / "stopped" / "checkpoint-3" / FILE).unlink()
    bare = make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "stopped", **options)
    with pytest.raises(
        RunError, match="has no saliency.safetensors: it was made without `saliency.train`. Start the request"
    ):
        bare.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-3"))


def test_a_checkpoint_has_masks_only_where_there_are_some(tmp_path):
    for name, wanted in (("masks", HALF), ("trim", {"trim": 0.1}), ("none", None)):
        options = {"save_strategy": "steps", "save_steps": 1, "saliency": wanted}
        make(llama(), two_roles(), tmp_path / name, **options).train()
        assert (tmp_path / name / "checkpoint-1" / FILE).is_file() == (name == "masks")


# ---- trimming ------------------------------------------------------------------------------------------------------


def trimmed(tmp_path, build=llama, seed=2, **options):
    """(weights before, weights after training that changes nothing, the trainer)."""
    trainer = make(
        build(), two_roles(), tmp_path, saliency={"trim": 0.1}, learning_rate=0.0, seed=seed, **{**TERMS, **options}
    )
    before = weights(trainer.model)
    trainer.train()
    return before, weights(trainer.model), trainer


def test_what_is_trimmed_has_the_largest_gradient_times_weight(tmp_path):
    before, after, trainer = trimmed(tmp_path)
    start = llama()
    found = forget_gradient(start, trainer.train_dataset.roles["forget"])
    scores = {name: (g * dict(start.named_parameters())[name]).abs().detach() for name, g in found.items()}
    expected = {n: m & (m.ndim > 1) for n, m in largest(scores, 0.1).items()}
    assert share_of_differences({n: after[n] != before[n] for n in expected}, expected) < 1e-3
    assert same(trimmed(tmp_path)[1], after) and not same(trimmed(tmp_path, seed=3)[1], after)
    assert masks(trainer) is None  # everything trains


def test_of_a_lora_only_the_adapter_is_trimmed(tmp_path):
    before, after, _ = trimmed(tmp_path, adapted)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name for name in changed)
    for name in (n for n in changed if "lora_B" in n):
        assert not after[name][after[name] != before[name]].any()


def test_the_teacher_is_the_model_before_trimming(tmp_path):
    before, after, trainer = trimmed(tmp_path)
    student, teacher = exact(trainer.model), exact(llama())
    rows = [row["forget"] for row in windows(trainer, 8)[0]]
    expected = float(by_hand(student, teacher, rows, TERMS["forget"])["npo"])
    assert lines(trainer)[0]["loss/forget/npo"] == pytest.approx(expected, rel=1e-5)
    of_itself = float(by_hand(student, student, rows, TERMS["forget"])["npo"])  # 2 / 0.2 * log 2
    assert of_itself == pytest.approx(10 * math.log(2)) and abs(expected - of_itself) > 0.1
    assert answer(teacher, rows[0])[1].sum() != answer(student, rows[0])[1].sum()


# ---- refused, and in a recipe --------------------------------------------------------------------------------------


def test_without_forget_data_it_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="saliency is measured on what is to be forgotten, but train_dataset has no `forget`"
    ):
        make(llama(), {"learn": examples(2, 0)}, tmp_path, saliency=HALF)


@pytest.mark.parametrize("wanted", [HALF, {"trim": 0.1}], ids=str)
def test_an_adapter_that_has_learned_nothing_is_refused(tmp_path, wanted):
    """B is zero: A has no gradient, B has no weight. One nonzero entry of one B is enough to begin with."""
    trainer = make(llama(), two_roles(), tmp_path, peft_config=LORA, saliency=wanted, **TERMS)
    with pytest.raises(ValueError, match="'default' has learned nothing yet: .* Give an adapter that has learned, or"):
        trainer.train()
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_B" in name)[0, 0] = 0.1
    trainer.train()
    assert trainer.state.global_step == 1


def test_sharded_models_are_refused(tmp_path):
    from hf_clmul.gradients.active import active_rule
    from hf_clmul.training.refusals import _of_arguments
    from hf_clmul.training_args import ClmulConfig

    args = ClmulConfig(str(tmp_path), use_cpu=True, saliency=HALF)
    assert "saliency looks at whole parameters" in _of_arguments(args, active_rule("sum"), sharded=True)[0]
    assert "'sago' works on whole gradients" in _of_arguments(args, active_rule("sago"), sharded=True)[0]
    assert _of_arguments(args, active_rule("sago"), sharded=False) == []


def test_a_recipe_with_a_salient_part_a_pattern_and_a_look_ahead(tmp_path):
    recipe = write_recipe(tmp_path, "lora")
    execute(
        recipe, tmp_path / "out", "unlearning.saliency={train: 0.25}", "unlearning.trainable='.*lora_B.*'",
        "unlearning.lookahead={alpha: 0.05, mode: first_order}", "learning.trainable='.*(down_proj|o_proj).*'",
    )  # fmt: skip
    unlearned = load_file(tmp_path / "out/requests/01-unlearn-one/state/adapter_model.safetensors")
    recipe.write_text("".join(line for line in recipe.read_text().splitlines(True) if "- unlearn:" not in line))
    execute(recipe, tmp_path / "learned", "learning.trainable='.*(down_proj|o_proj).*'")  # its state is gone above
    learned = load_file(tmp_path / "learned/requests/00-learn-people/state/adapter_model.safetensors")
    trained = {name for name, value in learned.items() if "lora_B" in name and value.any()}
    assert {name.split(".")[-3] for name in trained} == {"down_proj", "o_proj"}
    moved = {name: int((unlearned[name] != learned[name]).sum()) for name in learned}
    assert all("lora_B" in name for name, count in moved.items() if count)
    whole = sum(value.numel() for name, value in learned.items() if "lora_B" in name)
    assert 0.2 * whole < sum(moved.values()) <= 0.25 * whole + 1
