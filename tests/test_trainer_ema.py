"""The continual teacher in a trainer: what terms are told, exact resumes, and the way from one request to the next."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from tiny import tiny_gpt2
from trainer_bed import (
    LORA,
    QUIET,
    TOKENIZER,
    Nudge,
    Stop,
    adapted,
    by_hand,
    exact,
    examples,
    lines,
    llama,
    make,
    nudged,
    same,
    two_roles,
    weights,
    windows,
)
from transformers import TrainerCallback

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.ema import FILE, Ema, EmaState
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

HALF = {"teacher": {"ema": {"probability": 0.5, "momentum": 0.7}}}
ALWAYS = {"teacher": {"ema": {"probability": 1.0}}}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}


class Seen(TrainerCallback):
    """The trained weights at the beginning and after each step."""

    def __init__(self):
        self.steps = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.steps:
            self.steps.append(weights(model))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


def averaged(steps, seed, probability, momentum=0.999, k=0, start=None):
    """By hand, in float64, over the weights that a `Seen` saw; and the steps that counted."""
    found = {name: value.double() for name, value in (start or steps[0]).items()}
    counted = 0
    for number, live in enumerate(steps[1:], 1):
        k += 1
        if derived_seed(seed, "ema", number) / 2**32 >= probability:
            continue
        counted += 1
        m = min(1 - 1 / (k + 1), momentum)
        found = {name: m * value + (1 - m) * live[name].double() for name, value in found.items()}
    return found, counted


def close(state, expected):
    assert state.values.keys() == expected.keys()
    return all(torch.allclose(state.values[name].double(), expected[name].double(), atol=1e-6) for name in expected)


@pytest.mark.parametrize("wanted", [HALF, {"teacher": "ema"}], ids=str)
def test_after_every_step_with_a_probability_the_average_moves(tmp_path, wanted):
    saw = Seen()
    options = {"probability": 0.2} if wanted["teacher"] == "ema" else wanted["teacher"]["ema"]
    trainer = make(llama(), two_roles(), tmp_path, [saw], max_steps=8, **ADAM, **wanted)
    trainer.train()
    expected, counted = averaged(saw.steps, trainer.args.seed, **options)
    assert 0 < counted < 8
    assert trainer.teacher_state.k == 8 and close(trainer.teacher_state, expected)


def test_it_averages_where_no_term_asks_for_a_teacher_and_accumulation_does_not_hurry_it(tmp_path):
    saw = Seen()
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, **ADAM, **ALWAYS}
    trainer = make(llama(), {"learn": examples(12, 0)}, tmp_path, [saw], **options)
    trainer.train()
    expected, _ = averaged(saw.steps, trainer.args.seed, 1.0)
    assert trainer.teacher_state.k == 3 and close(trainer.teacher_state, expected)


@pytest.mark.parametrize("build", [llama, adapted])
def test_terms_are_told_what_the_average_says(tmp_path, build):
    """In the first step a copy of the model before, in the second half way to the student of then."""
    start, saw = build(), Seen()
    terms = {"forget": {"npo": {"beta": 0.2}}, "retain": {"kl": {}}}
    trainer = make(start, two_roles(16, 16), tmp_path, [Nudge(), saw], max_steps=2, conflict="sum", **terms, **ALWAYS)
    first = copy.deepcopy(start)
    trainer.train()
    teachers = [first, copy.deepcopy(first)]
    for name, p in teachers[1].named_parameters():
        if p.requires_grad:
            p.data.lerp_(saw.steps[1][name], 0.5)
    for i, (teacher, window) in enumerate(zip(teachers, windows(trainer, 8), strict=True)):
        student = copy.deepcopy(nudged(first))
        for name, p in student.named_parameters():
            p.data.copy_(saw.steps[i][name])
        for role, wanted in terms.items():
            found = by_hand(exact(student), exact(teacher), [row[role] for row in window], wanted)
            for name, value in found.items():
                assert lines(trainer)[i][f"loss/{role}/{name}"] == pytest.approx(float(value), rel=1e-4)


# ---- resume ----------------------------------------------------------------------------------------------------


MODELS = {
    "full model": (llama, {}),
    "with dropout": (lambda: tiny_gpt2(vocab=len(TOKENIZER)), {}),
    "new adapter": (llama, {"peft_config": LORA}),
    "a part": (llama, {"trainable": ".*down_proj.*"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_resume_is_exact_to_the_bit_in_student_and_teacher(tmp_path, kind):
    build, extra = MODELS[kind]
    options = {**ADAM, **HALF, **extra, "max_steps": 6, "save_steps": 1, "save_strategy": "steps",
               "retain": {"confident_mse": {}, "nll": {}}}  # fmt: skip
    start, before = build(), None
    if "peft_config" not in extra:  # handed over from an earlier request
        before = EmaState({"model.norm.weight": torch.full((32,), 0.5)} if kind == "a part" else {}, k=3)
    through = make(copy.deepcopy(start), two_roles(7, 9), tmp_path / "through", teacher_state=before, **options)
    through.train()
    for step in (3, 4):
        folder = tmp_path / str(step)
        with pytest.raises(KeyboardInterrupt):
            make(copy.deepcopy(start), two_roles(7, 9), folder, [Stop(step)], teacher_state=before, **options).train()
        again = make(copy.deepcopy(start), two_roles(7, 9), folder, teacher_state=before, **options)
        again.train(resume_from_checkpoint=True)
        assert same(weights(again.model), weights(through.model)) and lines(again) == lines(through)
        assert same(again.teacher_state.values, through.teacher_state.values)
        assert again.teacher_state.k == through.teacher_state.k == 6 + (before.k if before else 0)
    assert (tmp_path / "through" / "checkpoint-6" / FILE).is_file()
    again.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-4"))  # nothing is taken from live weights
    assert same(again.teacher_state.values, through.teacher_state.values)


def test_without_its_file_a_checkpoint_is_refused(tmp_path):
    options = {**ADAM, "max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    make(llama(), two_roles(), tmp_path, **options).train()
    assert not (tmp_path / "checkpoint-1" / FILE).exists()
    with pytest.raises(
        RunError, match="has no ema.safetensors: it was made without teacher='ema'. Start the request anew"
    ):
        make(llama(), two_roles(), tmp_path, **options, **HALF).train(resume_from_checkpoint=True)


# ---- a stream --------------------------------------------------------------------------------------------------


def test_the_average_goes_on_from_request_to_request_over_a_stack_of_adapters(tmp_path):
    """A second adapter is trained on a first one, which is frozen: in T the first keeps its average, also while T answers."""
    model, saw = adapted(), Seen()
    first = make(model, {"learn": examples(8, 0)}, tmp_path, [saw], max_steps=3, **ADAM, **ALWAYS)
    first.train()
    state = first.teacher_state
    mine = [{n: v for n, v in step.items() if n in state.values} for step in saw.steps]
    assert close(state, averaged(mine, first.args.seed, 1.0)[0])
    state.save(tmp_path / "handed")

    model = first.accelerator.unwrap_model(first.model, keep_fp32_wrapper=False)
    adapters.attach(model, LoraConfig(**LORA.to_dict()), "second", 1)
    live = {name: value for name, value in weights(model).items() if ".default." in name}
    told, saw = [], Seen()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            with trainer.teacher.answering() as teacher:
                told.append({n: p.clone() for n, p in teacher.named_parameters() if "lora_" in n})

    handed = EmaState.load(tmp_path / "handed")
    options = {**ADAM, **ALWAYS, "memory": {"confident_mse": {}}, "max_steps": 2}
    roles = {"learn": examples(8, 1), "memory": examples(4, 0)}
    trainer = make(model, roles, tmp_path, [Look(), saw], teacher_state=handed, **options)
    trainer.train()
    after = trainer.teacher_state
    assert after.k == 5 and after.values.keys() == told[0].keys()
    for step in told:
        assert all(torch.equal(step[name], state.values[name]) for name in state.values)
    assert not same(live, state.values)
    assert same({n: v for n, v in weights(trainer.model).items() if n in live}, live)  # the student's own are untouched
    new = [{n: v for n, v in step.items() if ".second." in n} for step in saw.steps]
    expected, _ = averaged(new, trainer.args.seed, 1.0, k=3)
    assert all(torch.allclose(after.values[n].double(), expected[n], atol=1e-6) for n in expected)


def test_a_step_that_a_loss_scaler_skips_is_no_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    trainer = make(llama(), two_roles(), tmp_path, max_steps=2, **ALWAYS)
    trainer.train()
    assert trainer.teacher_state.k == 0 and close(trainer.teacher_state, weights(llama()))


def test_an_edit_leaves_the_average_alone(tmp_path):
    state = EmaState({"lm_head.weight": torch.zeros(1)}, 4)
    trainer = make(llama(), {"forget": examples(4, 0)}, tmp_path, forget="task_vector", teacher_state=state, **ALWAYS)
    trainer.train()
    assert trainer.teacher_state is state


def test_a_request_that_fails_leaves_the_state_that_it_was_given(tmp_path):
    state = EmaState({}, 4)
    trainer = make(
        llama(), two_roles(), tmp_path, [Stop(1)], save_steps=1, save_strategy="steps", teacher_state=state, **ALWAYS
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.teacher_state is state


def test_what_it_cannot_do_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="teacher_state is the state of the teacher 'ema', and teacher='before_request'"
    ):
        make(llama(), two_roles(), tmp_path, teacher_state=EmaState())
    for option in ({"fsdp": True}, {"deepspeed": {"zero_optimization": {"stage": 2}}}):
        args = ClmulConfig(str(tmp_path), **QUIET, **HALF, conflict="sum")
        vars(args).update(option)
        with pytest.raises(ValueError, match="teacher='ema' keeps whole parameters, .*: use DDP, or 'before_request'"):
            ClmulTrainer(llama(), args, None, two_roles(), processing_class=TOKENIZER)


def test_no_ema_without_asking(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path)
    trainer.train()
    assert trainer.teacher_state is None and not isinstance(trainer.teacher, Ema)
