"""A resumed run ends bit for bit like one that was never stopped, and its teacher is the model before the request."""

import copy
import shutil

import pytest
import torch
from peft import PeftModel
from tiny import tiny_gpt2
from trainer_bed import LORA, TOKENIZER, Stop, adapted, examples, lines, llama, make, same, two_roles, weights
from transformers import TrainerCallback

from hf_clmul.errors import RunError

# 7 pairs in batches of 2: an epoch is 4 micro-batches, 2 windows when two are accumulated; dropout where the name says so.
MODELS = {
    "full model": (llama, {}),
    "full model with dropout": (lambda: tiny_gpt2(vocab=len(TOKENIZER)), {"learning_rate": 1e-2}),
    "new adapter": (llama, {"peft_config": LORA}),
    "adapter trained in place, with dropout": (lambda: adapted(lora_dropout=0.2), {}),
}
COMMON = {"per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 1, "save_strategy": "steps", "optim": "adamw_torch",
          "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_resume_is_exact_in_the_middle_of_an_epoch_and_at_its_end(tmp_path, kind, accumulate):
    build, extra = MODELS[kind]
    options = {**COMMON, **extra, "gradient_accumulation_steps": accumulate}
    start = build()
    through = make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "through", **options)
    through.train()
    expected, tail = weights(through.model), lines(through)
    for step in (3, 4):  # 4 ends an epoch; with accumulation 3 and 4 are the middle and the end of the second one
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            make(copy.deepcopy(start), two_roles(7, 9), folder, [Stop(step)], **options).train()
        resumed = make(copy.deepcopy(start), two_roles(7, 9), folder, **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert same(weights(resumed.model), expected)
        assert lines(resumed) == tail
    assert not same(expected, weights(start))


@pytest.mark.parametrize("kind", MODELS)
def test_teacher_after_a_resume_is_the_model_before_the_request(tmp_path, kind):
    """Trap 11."""
    build, extra = MODELS[kind]
    start, seen = build().eval(), []
    ids = torch.arange(1, 9)[None]

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            with trainer.teacher.answering() as teacher:
                seen.append(teacher(ids).logits)
            seen.append(model.eval()(ids).logits.detach())

    expected = start(ids).logits.detach()
    options = {**COMMON, **extra}
    trainer = make(copy.deepcopy(start), two_roles(), tmp_path, [Stop(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = make(copy.deepcopy(start), two_roles(), tmp_path, [Look()], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    teacher, student = seen
    assert torch.equal(teacher, expected)
    assert not torch.equal(student, expected)  # the checkpoint is in the student


def test_same_trainer_cannot_resume_once_its_weights_have_moved(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path, **COMMON)
    trainer.train()
    with pytest.raises(ValueError, match="trained its model already.*make a new ClmulTrainer"):
        trainer.train(resume_from_checkpoint=True)
    # Without a teacher there is nothing to be wrong about.
    trainer = make(llama(), {"learn": examples(8, 0)}, tmp_path / "learn", **COMMON)
    trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "learn" / "checkpoint-3"))
    assert trainer.state.global_step == 6


def test_partners_after_a_resume_are_those_of_the_run_that_was_stopped(tmp_path, monkeypatch):
    """Trap 13: batches are compared, not only what became of them."""

    def recorded(step=None, resume=False):
        batches = []
        trainer = make(llama(), two_roles(7, 9), tmp_path, [Stop(step)] if step else [], **COMMON)
        original = trainer.training_step

        def training_step(model, inputs, num_items_in_batch=None):
            batches.append({role: batch["input_ids"].tolist() for role, batch in inputs.items()})
            return original(model, inputs, num_items_in_batch)

        monkeypatch.setattr(trainer, "training_step", training_step)
        if step:
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return batches

    through = recorded()
    shutil.rmtree(tmp_path)
    assert recorded(step=3) + recorded(resume=True) == through
    assert through[0]["retain"] != through[4]["retain"]  # another epoch, other partners


def stacked():
    """Two adapters; the second one is active and trains."""
    model = adapted()
    model.add_adapter("second", LORA)
    model.set_adapter("second")
    return model


def test_with_several_adapters_the_active_one_alone_is_trained_saved_and_resumed(tmp_path):
    """Traps 7 and 12: the stock trainer would save and load every adapter, and the teacher's copy with them."""
    options = {**COMMON, "retain": "kl"}
    start = stacked()
    first = {name: p for name, p in weights(start).items() if ".default." in name}
    through = make(copy.deepcopy(start), two_roles(), tmp_path / "through", **options)
    through.train()
    with pytest.raises(KeyboardInterrupt):
        make(copy.deepcopy(start), two_roles(), tmp_path / "stopped", [Stop(3)], **options).train()
    resumed = make(copy.deepcopy(start), two_roles(), tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)

    for trainer in (through, resumed):
        model, after = trainer.model, weights(trainer.model)
        assert same({name: after[name] for name in first}, first)
        assert list(model.peft_config) == ["default", "second"] and model.active_adapters == ["second"]
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            n for n in after if ".second." in n
        }
    assert same(weights(resumed.model), weights(through.model))
    saved = sorted(path.name for path in (tmp_path / "through" / "checkpoint-6").iterdir())
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(saved)
    assert not {"default", "second", "before_request"} & set(saved)
    alone = PeftModel.from_pretrained(llama(), tmp_path / "through" / "checkpoint-6")
    base = PeftModel.from_pretrained(llama(), tmp_path / "through" / "checkpoint-3")
    ids = torch.arange(1, 9)[None]
    assert torch.equal(alone(ids).logits, through.model.eval()(ids).logits)
    assert not torch.equal(alone(ids).logits, base(ids).logits)


def test_flags_that_the_user_set_survive_teacher_and_training(tmp_path):
    """Trap 7: only the B matrices train; PEFT's switches would let the A matrices go."""
    model = adapted()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    before = weights(model)
    trainer = make(model, two_roles(), tmp_path, max_steps=2)
    trainer.train()
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("lora_B" in name for name in moved)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == {
        n for n in after if "lora_B" in n
    }
    assert list(trainer.model.peft_config) == ["default"]


@pytest.mark.parametrize("options", [{"peft_config": LORA}, {}])
def test_teacher_answers_without_dropout_and_the_student_keeps_it(tmp_path, options):
    model = llama() if options else adapted(lora_dropout=0.5)
    seen = []
    trainer = make(model, two_roles(), tmp_path, conflict="sum", **options)
    trainer.model.register_forward_pre_hook(
        lambda module, given: seen.append((module.training, torch.is_grad_enabled()))
    )
    trainer.train()
    assert seen == [(False, False), (True, True)] * 2  # teacher and student, for each role


def test_checkpoint_of_another_adapter_or_of_a_full_model_is_refused(tmp_path):
    make(llama(), two_roles(), tmp_path / "full", **{**COMMON, "max_steps": 1}).train()
    make(llama(), two_roles(), tmp_path / "other", peft_config=LORA, **{**COMMON, "max_steps": 1}).train()
    fewer = adapted(target_modules=["q_proj"])
    with pytest.raises(RunError, match="does not fit adapter 'default'"):
        make(fewer, two_roles(), tmp_path, **COMMON).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1")
        )
    with pytest.raises(RunError, match="does not fit adapter 'default'"):
        make(adapted(r=2), two_roles(), tmp_path, **COMMON).train(
            resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-1")
        )
    with pytest.raises(RunError, match="holds no adapter_model.safetensors: it is not a checkpoint of this trainer"):
        make(adapted(), two_roles(), tmp_path, **COMMON).train(
            resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-1")
        )
