"""Training a part of a model, chosen by names: the rest costs no gradient, does not move, and has its flags back."""

import pytest
import torch
from tiny import tiny_llama
from trainer_bed import adapted, by_hand, exact, lines, llama, make, same, two_roles, weights, windows
from transformers import TrainerCallback

from hf_clmul.models.teachers import BeforeRequest
from hf_clmul.models.trainable import matching, only_trainable

DOWN = r"model\.layers\.\d+\.mlp\.down_proj\.weight"
ADAMW = {"optim": "adamw_torch", "weight_decay": 0.1, "learning_rate": 1e-2, "max_steps": 2}


def names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_flags_within_and_after():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before, down = names(model), {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    frozen = model.model.layers[0].self_attn.q_proj.weight
    frozen.grad = torch.zeros_like(frozen)
    with pytest.raises(KeyError), only_trainable(model, DOWN):
        assert names(model) == down and frozen.grad is None
        raise KeyError
    assert names(model) == before
    with only_trainable(model, None):
        assert names(model) == before


def test_a_pattern_matches_whole_names_of_what_is_trainable():
    model = tiny_llama()
    assert len(matching(model, ".*down_proj.*")) == 2
    with pytest.raises(
        ValueError, match="matches the whole name of none of the 20 trainable parameters, such as 'model.*down_proj"
    ):
        matching(model, "down_proj")
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="none of the 1 trainable parameters") as error:
        matching(model, ".*down_proj.*")
    assert str(error.value).endswith(r"as in '.*layers\.[5-7]\.mlp\.down_proj\.weight'.")
    with pytest.raises(ValueError, match=r"trainable='a\(' is not a regular expression: missing \)"):
        matching(model, "a(")


class Look(TrainerCallback):
    """What has a gradient when the optimizer steps."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
        self.flags = names(model)


PARTS = {
    "full": (llama, DOWN, 2),
    "adapter": (adapted, r".*layers\.1\..*lora_B.*", 3),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("options", [{"conflict": "sum"}, {"conflict": "gru"}, {"lookahead": {}}], ids=str)
def test_the_rest_has_no_gradient_and_does_not_move(tmp_path, kind, options):
    build, pattern, count = PARTS[kind]
    start, look = build(), Look()
    flags = names(start)
    trainer = make(start, two_roles(), tmp_path, [look], trainable=pattern, **ADAMW, **options)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    chosen = {name for name in after if not torch.equal(after[name], before[name])}
    assert len(chosen) == count and look.with_gradient == look.flags == chosen
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == count
    assert names(trainer.model) == flags


def test_flags_are_given_back_after_a_failure(tmp_path, monkeypatch):
    trainer = make(llama(), two_roles(), tmp_path, trainable=DOWN)
    before = names(trainer.model)

    def fails(*given, **named):
        assert names(trainer.model) < before
        raise MemoryError

    monkeypatch.setattr(trainer, "role_loss", fails)
    with pytest.raises(MemoryError):
        trainer.train()
    assert names(trainer.model) == before


def test_a_pattern_that_fits_nothing_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="trainable='layers.9' matches the whole name of none of the 20"):
        make(llama(), two_roles(), tmp_path, trainable="layers.9")


# ---- the teacher of a part -----------------------------------------------------------------------------------------


def test_the_teacher_keeps_that_part_only_and_answers_as_before():
    model, ids = tiny_llama(), torch.arange(1, 9)[None]
    expected = model(ids).logits.detach()
    with only_trainable(model, DOWN):
        teacher = BeforeRequest(model)
        kept = sum(value.numel() * value.element_size() for _, value in teacher.kept.values())
        assert teacher.copy is None and kept == 2 * 32 * 64 * 4
        storages = [p.data_ptr() for p in model.parameters()]
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.add_(1.0)
        now = model(ids).logits.detach()
        assert not torch.equal(now, expected)
        with teacher.answering() as answers:
            assert torch.equal(answers(ids).logits, expected)
        with pytest.raises(KeyError), teacher.answering():
            raise KeyError
        assert torch.equal(model(ids).logits, now) and [p.data_ptr() for p in model.parameters()] == storages
        teacher.release()
        assert teacher.kept == {}


def test_the_teacher_of_a_part_is_right_through_training(tmp_path):
    """In the second window the student has moved, its teacher has not."""
    terms = {"forget": {"npo": {"beta": 0.2}}, "retain": {"kl": {}}}
    trainer = make(llama(), two_roles(), tmp_path, trainable=DOWN, max_steps=1, **terms)
    trainer.train()
    student = exact(trainer.model)
    start = weights(trainer.model)
    trainer = make(llama(), two_roles(), tmp_path, trainable=DOWN, max_steps=2, **terms)
    trainer.train()
    assert not same(weights(trainer.model), start)
    (window,) = windows(trainer, 8, epoch=1)
    for role in terms:
        ((name, value),) = by_hand(student, exact(llama()), [row[role] for row in window], terms[role]).items()
        assert lines(trainer)[1][f"loss/{role}/{name}"] == pytest.approx(float(value.detach()), rel=1e-4)
