"""Rules that know their weights beforehand: by hand, and inside the trainer."""

import json

import pytest
from trainer_bed import (
    Gradients,
    adapted,
    assert_resume_is_exact,
    distance,
    exact,
    examples,
    lines,
    llama,
    make,
    resumed,
    role_gradients,
    same,
    two_roles,
    weights,
    windows,
)

from hf_clmul.errors import RunError
from hf_clmul.gradients.active import SCHEDULE
from hf_clmul.gradients.schedule import Progress, alternate, pdu

PDU = {"epsilon": 0.25, "step": 2.0, "start": 3.0, "warmup": 1.0}


def turns(roles=2, windows_per_epoch=2, windows=8, **options):
    found, weights = [], None
    for window in range(windows):
        progress = Progress(roles, window / windows_per_epoch)
        weights = alternate(weights, None if weights is None else [0.0] * roles, progress, **options)
        found.append("".join(str(int(w)) for w in weights))
    return found


# ---- by hand -------------------------------------------------------------------------------------------------------


def test_pdu_starts_waits_and_then_follows_the_loss():
    assert pdu(None, None, Progress(2, 0.0)) == [1.0, 50.0]
    assert pdu(None, None, Progress(2, 0.0), **PDU) == [1.0, 3.0]
    assert pdu([1.0, 3.0], [9.0, 4.0], Progress(2, 0.75), **PDU) == [1.0, 3.0]
    assert pdu([1.0, 3.0], [9.0, 4.0], Progress(2, 1.0), **PDU) == [1.0, 3.0 + 2 * 3.75]
    assert pdu([1.0, 3.0], [9.0, 0.125], Progress(2, 1.0), **PDU) == [1.0, 2.75]


def test_pdu_never_rewards_a_retain_loss_and_comes_back_from_zero():
    assert pdu([1.0, 0.125], [0.0, 0.125], Progress(2, 2.0), **PDU) == [1.0, 0.0]
    assert pdu([1.0, 0.0], [0.0, 0.75], Progress(2, 2.0), **PDU) == [1.0, 1.0]


def test_pdu_has_a_multiplier_for_each_kept_role():
    assert pdu(None, None, Progress(3, 0.0), **PDU) == [1.0, 3.0, 3.0]
    assert pdu([1.0, 3.0, 3.0], [0.0, 0.25, 1.25], Progress(3, 1.0), **PDU) == [1.0, 3.0, 5.0]


def test_turns_end_with_the_forget_epochs():
    assert turns(forget_epochs=1.0) == ["10", "01", "01", "01", "01", "01", "01", "01"]
    assert turns(forget_epochs=2.0) == ["10", "01", "10", "01", "01", "01", "01", "01"]
    assert turns(forget_epochs=1.5) == ["10", "01", "10", "01", "01", "01", "01", "01"]
    assert turns(3, windows=3) == ["100", "011", "100"]
    assert turns(forget_epochs=0.0, windows=2) == ["01", "01"]


# ---- in the trainer ------------------------------------------------------------------------------------------------

OPTIONS = {"retain": "nll", "per_device_train_batch_size": 2, "learning_rate": 0.01, "max_steps": 8}


def recorded(trainer, monkeypatch):
    """Trains; the roles whose losses were worked out with and without gradient, for each window, and what was advanced."""
    passes, seen = [[]], []
    role_loss, advance = trainer.role_loss, trainer.rule.advance

    def watched(model, role, *given, **named):
        loss = role_loss(model, role, *given, **named)
        passes[-1].append(role if loss.requires_grad else role.upper())
        return loss

    def advanced(losses, epoch):
        passes.append([])
        seen.append((losses, epoch))
        advance(losses, epoch)

    monkeypatch.setattr(trainer, "role_loss", watched)
    monkeypatch.setattr(trainer.rule, "advance", advanced)
    trainer.train()
    return passes[:-1], seen


@pytest.mark.parametrize(("forget_epochs", "expected"), [(1.0, "frfrrrrr"), (1.25, "frfrfrrr"), (2.0, "frfrfrfr")])
def test_turns_of_windows_cost_one_pass_each(tmp_path, monkeypatch, forget_epochs, expected):
    rule = {"alternate": {"forget_epochs": forget_epochs}}
    passes, seen = recorded(make(llama(), two_roles(), tmp_path, conflict=rule, **OPTIONS), monkeypatch)
    assert passes == [[{"f": "forget", "r": "retain"}[letter]] for letter in expected]
    assert [epoch for _, epoch in seen] == [n / 4 for n in range(1, 9)]  # at the end of each window


def test_a_turn_is_a_window_and_no_micro_batch(tmp_path, monkeypatch):
    trainer = make(
        llama(),
        two_roles(),
        tmp_path,
        conflict="alternate",
        **{**OPTIONS, "max_steps": 3},
        gradient_accumulation_steps=2,
    )
    passes, seen = recorded(trainer, monkeypatch)
    assert passes == [["forget"] * 2, ["retain"] * 2, ["forget"] * 2]
    assert [epoch for _, epoch in seen] == [0.5, 1.0, 1.5]


def test_a_role_that_sits_out_windows_is_logged_with_its_own_mean(tmp_path):
    """Of three windows two forget and one retains."""
    logged = []
    for every in (1, 3):
        options = {**OPTIONS, "max_steps": 3, "logging_steps": every}
        trainer = make(llama(), two_roles(), tmp_path, conflict="alternate", **options)
        trainer.train()
        logged.append(lines(trainer))
    first, second, third = logged[0]
    assert ["loss/forget/npo" in line for line in logged[0]] == [True, False, True]
    (line,) = logged[1]
    assert line["loss/forget/npo"] == pytest.approx((first["loss/forget/npo"] + third["loss/forget/npo"]) / 2, rel=1e-6)
    assert line["loss/retain/nll"] == pytest.approx(second["loss/retain/nll"], rel=1e-6)
    assert (line["weight/forget"], line["weight/retain"]) == pytest.approx((2 / 3, 1 / 3))


def test_pdu_sees_the_mean_of_a_window_once(tmp_path, monkeypatch):
    """Whatever it is made of. A term's weight belongs to the loss."""
    runs = []
    for batch, accumulate in ((8, 1), (2, 4)):
        trainer = make(
            llama(), two_roles(), tmp_path, conflict={"pdu": {"warmup": 0.0, "start": 1.0}}, forget="npo", max_steps=3,
            learning_rate=0.01, retain={"nll": {"weight": 0.5}, "kl": {}}, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        _, seen = recorded(trainer, monkeypatch)
        runs.append((seen, lines(trainer)))
    (whole, logged), (parts, _) = runs
    assert len(whole) == len(parts) == 3
    weight = 1.0
    for (losses, _), (other, _), line in zip(whole, parts, logged, strict=True):
        assert losses == pytest.approx(other, rel=1e-5)
        assert losses[1] == pytest.approx(0.5 * line["loss/retain/nll"] + line["loss/retain/kl"], rel=1e-6)
        assert line["weight/retain"] == pytest.approx(weight)
        weight = max(0.0, weight + losses[1] - 0.3)


def test_a_multiplier_of_zero_comes_back(tmp_path, monkeypatch):
    """The role's loss is worked out all the same, without gradient."""
    rule = {"pdu": {"warmup": 0.0, "start": 0.0}}
    trainer = make(llama(), two_roles(), tmp_path, conflict=rule, **{**OPTIONS, "max_steps": 2})
    passes, _ = recorded(trainer, monkeypatch)
    first, second = lines(trainer)
    assert [sorted(names) for names in passes] == [["RETAIN", "forget"], ["forget", "retain"]]
    assert (first["weight/retain"], second["weight/retain"]) == (0.0, pytest.approx(first["loss/retain/nll"] - 0.3))


THREE = {
    **{role: {"nll": {}} for role in ("retain", "memory")},
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 0.0,
}


def three_roles():
    return {**two_roles(), "memory": examples(8, 5)}


def gradients_of(model, trainer):
    """Of each role, in float64: 8 examples of each are a window, and nothing moves."""
    terms = {"forget": {"grad_ascent": {}}, "retain": {"nll": {}}, "memory": {"nll": {}}}
    return role_gradients(exact(model), None, windows(trainer, 8)[0], terms)


def test_pdu_follows_the_loss_of_each_of_two_kept_roles(tmp_path):
    saw, rule = Gradients(), {"pdu": {"warmup": 0.0, "start": 3.0, "step": 2.0}}
    trainer = make(llama(), three_roles(), tmp_path, [saw], conflict=rule, forget="grad_ascent", **THREE)
    trainer.train()
    found, losses = gradients_of(llama(), trainer)
    after = [1.0, 3 + 2 * (losses["retain/nll"] - 0.3), 3 + 2 * (losses["memory/nll"] - 0.3)]
    assert abs(after[1] - after[2]) > 0.01
    for chosen, line, update in zip(([1.0, 3.0, 3.0], after), lines(trainer), saw.steps, strict=True):
        assert [line[f"weight/{role}"] for role in found] == pytest.approx(chosen, rel=1e-5)
        expected = {name: sum(w * g[name] for w, g in zip(chosen, found.values(), strict=True)) for name in update}
        assert distance(update, expected) < 5e-6


def test_turns_of_one_and_of_two_kept_roles(tmp_path, monkeypatch):
    saw = Gradients()
    trainer = make(llama(), three_roles(), tmp_path, [saw], conflict="alternate", forget="grad_ascent", **THREE)
    passes, _ = recorded(trainer, monkeypatch)
    assert passes == [["forget"], ["retain", "memory"]]
    found, _ = gradients_of(llama(), trainer)
    forgetting, keeping = saw.steps
    assert distance(forgetting, found["forget"]) < 5e-6
    kept = {name: found["retain"][name] + found["memory"][name] for name in keeping}
    assert distance(keeping, kept) < 5e-6


@pytest.mark.parametrize(
    "rule", [{"pdu": {"warmup": 0.25, "start": 2.0}}, {"alternate": {"forget_epochs": 1.5}}], ids=str
)
@pytest.mark.parametrize("build", [llama, adapted])
def test_resume_is_exact(tmp_path, build, rule):
    options = {**OPTIONS, "conflict": rule, "max_steps": 6}
    start = build()
    through = assert_resume_is_exact(start, tmp_path, (3, 4), **options)
    checkpoint = tmp_path / "3" / "checkpoint-3"
    state = json.loads((checkpoint / SCHEDULE).read_text())
    assert len(state) == 2
    (checkpoint / SCHEDULE).write_text(json.dumps([weight + 1 for weight in state]))
    other = resumed(start, checkpoint, **options)
    assert not same(weights(other.model), weights(through.model))  # else the state would not matter here
    (checkpoint / SCHEDULE).unlink()
    with pytest.raises(RunError, match="has no conflict_weights.json: it was made without conflict='(pdu|alternate)'"):
        resumed(start, checkpoint, **options)


def test_a_second_training_starts_from_the_first_weights(tmp_path):
    rule = {"pdu": {"warmup": 0.0, "start": 2.0}}
    trainer = make(llama(), two_roles(), tmp_path, conflict=rule, **{**OPTIONS, "max_steps": 2})
    trainer.train()
    assert trainer.rule.scheduled[1] > 3
    trainer.train()
    assert [line["weight/retain"] for line in lines(trainer)][0] == 2.0


def test_with_one_role_there_is_no_schedule(tmp_path):
    trainer = make(
        llama(),
        {"forget": examples(8, 1)},
        tmp_path,
        conflict="alternate",
        **{**OPTIONS, "retain": None, "max_steps": 2},
    )
    trainer.train()
    assert all("loss/forget/npo" in line and "weight/forget" not in line for line in lines(trainer))
