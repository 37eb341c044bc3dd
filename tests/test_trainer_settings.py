"""Settings of `transformers.Trainer` in ClmulTrainer: schedulers, noise, precision, checkpointing, optimizers."""

import copy
from math import cos, pi
from typing import Any

import pytest
import torch
from tiny import tiny_gpt2
from trainer_bed import (
    TOKENIZER,
    Gradients,
    Nudge,
    adapted,
    distance,
    examples,
    lines,
    llama,
    make,
    same,
    two_roles,
    weights,
)
from transformers import SchedulerType, TrainerCallback


def cosine(share: float) -> float:
    """From 1 at the start to 0 at the end."""
    return 0.5 * (1 + cos(pi * share))


PARTS = (0, 1 / 4, 2 / 4, 3 / 4)  # of what follows one step of warmup, at the other four of five steps
SCORES = (1.0, 2.0, 0.5, 3.0, 4.0)  # after each step; the first and the third are the best so far
FLOOR = {"min_lr": 0.01}
# Parameters, and the learning rate of each of five steps as a share of the given one.
SCHEDULES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "linear": ({}, [0, *(1 - part for part in PARTS)]),
    "cosine": ({}, [0, *map(cosine, PARTS)]),
    "cosine_with_restarts": ({"num_cycles": 2}, [0, 1, 0.5, 1, 0.5]),
    "polynomial": ({"power": 2.0, "lr_end": 0.0}, [0, *((1 - part) ** 2 for part in PARTS)]),
    "constant": ({}, [1] * 5),
    "constant_with_warmup": ({}, [0, 1, 1, 1, 1]),
    "inverse_sqrt": ({}, [0, *(step**-0.5 for step in (1, 2, 3, 4))]),
    "reduce_lr_on_plateau": ({"patience": 0, "factor": 0.5}, [1, 1, 0.5, 0.5, 0.25]),
    "cosine_with_min_lr": (FLOOR, [0, *(0.1 + 0.9 * cosine(part) for part in PARTS)]),
    "cosine_warmup_with_min_lr": (FLOOR, [0.1 + 0.9 * cosine(part) for part in (*PARTS, 1)]),  # warm at the first step
    "warmup_stable_decay": ({"num_decay_steps": 2}, [0, 1, 1, 1, 0.5]),
    "greedy": ({"patience": 0, "factor": 0.5}, [1, 2, 1, 2, 1]),
}


class Rates(TrainerCallback):
    """Keeps the learning rate of each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_scheduler_sets_its_learning_rates(tmp_path, name):
    parameters, shares = SCHEDULES[name]
    rates, scores = Rates(), iter(SCORES)
    trainer = make(
        llama(),
        two_roles(),
        tmp_path,
        [rates],
        lr_scheduler_type=name,
        lr_scheduler_kwargs=parameters,
        learning_rate=0.1,
        max_steps=5,
        warmup_steps=1,
        eval_dataset=examples(2, 0),
        eval_strategy="steps",
        eval_steps=1,
        compute_metrics=lambda prediction: {"score": next(scores)},
        metric_for_best_model="score",
        greater_is_better=False,
    )
    trainer.train()
    assert rates.seen == pytest.approx([0.1 * share for share in shares], abs=1e-9)
    assert [line["learning_rate"] for line in lines(trainer)] == pytest.approx(rates.seen)


def test_neftune_moves_the_training_and_neither_teacher_nor_evaluation(tmp_path):
    found = {}
    for alpha in (None, 5.0):
        trainer = make(
            llama(),
            two_roles(),
            tmp_path,
            neftune_noise_alpha=alpha,
            eval_dataset=examples(4, 9),
            eval_on_start=True,
            max_steps=2,
        )
        trainer.train()
        found[alpha] = weights(trainer.model), lines(trainer), lines(trainer, "eval_loss")[0]["eval_loss"]
        assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
        assert not trainer.model.get_input_embeddings()._forward_hooks
    (plain, quiet, before), (noisy, moved, also_before) = found[None], found[5.0]
    assert distance(noisy, plain) > 1e-3
    assert before == also_before, "noise in the evaluation before the first step"
    # At the first step student and teacher have the same weights: what tells them apart is the student's noise.
    assert quiet[0]["loss/retain/kl"] == pytest.approx(0, abs=1e-6)
    assert moved[0]["loss/retain/kl"] > 1e-3


@pytest.mark.parametrize("build", [llama, adapted])
@pytest.mark.parametrize("teacher", ["kl", "nll"])
def test_bf16_autocast_stays_near_float32(tmp_path, build, teacher):
    model, found = build(), {}
    for bf16 in (False, True):
        saw = Gradients()
        trainer = make(copy.deepcopy(model), two_roles(), tmp_path, [Nudge(), saw], retain=teacher, bf16=bf16)
        trainer.train()
        found[bf16] = saw.steps[0], lines(trainer)[0]
        assert {g.dtype for g in saw.steps[0].values()} == {torch.float32}
    assert 1e-4 < distance(found[True][0], found[False][0]) < 0.05
    assert found[True][1]["loss"] == pytest.approx(found[False][1]["loss"], rel=0.02)


def test_second_training_has_a_new_teacher_under_autocast_too(tmp_path):
    # Accelerate leaves its autocast wrapper on the model's forward; a copy of the model must not call the original's.
    trainer = make(llama(), two_roles(), tmp_path, bf16=True, max_steps=3)
    trainer.train()
    trainer.train()
    first = lines(trainer)[0]
    assert first["loss/retain/kl"] == pytest.approx(0, abs=1e-4)
    assert lines(trainer)[-1]["loss/retain/kl"] > 1e-3


@pytest.mark.parametrize("build", [llama, adapted, lambda: tiny_gpt2(vocab=len(TOKENIZER))])
@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_gradient_checkpointing_changes_nothing(tmp_path, build, rule):
    """Trap 6. GPT-2 has dropout, whose masks have to come again in the second forward pass."""
    model, found = build(), {}
    for name in (None, "activation_checkpointing"):
        saw = Gradients()
        options = {name: True} if name else {}
        trainer = make(
            copy.deepcopy(model),
            two_roles(),
            tmp_path,
            [saw],
            retain={"nll": {}, "kl": {}},
            conflict=rule,
            max_steps=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            **options,
        )
        trainer.train()
        assert trainer.model.is_activation_checkpointing == bool(name)
        found[name] = saw.steps, weights(trainer.model)
    assert same(found[None][0][0], found["activation_checkpointing"][0][0])
    assert same(found[None][1], found["activation_checkpointing"][1])


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adafactor"},
        {"optim": "adamw_torch_fused"},
        {"optim": "adagrad"},
        {"optim": "rmsprop"},
        {"dataloader_num_workers": 1},
        {"torch_empty_cache_steps": 1},
        {"include_num_input_tokens_seen": "non_padding"},
    ],
)
def test_other_settings_run(tmp_path, options):
    trainer = make(llama(), two_roles(), tmp_path, max_steps=2, max_grad_norm=1.0, learning_rate=1e-3, **options)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    if "include_num_input_tokens_seen" in options:
        rows = two_roles()
        once = sum(len(row["input_ids"]) for role in rows.values() for row in role)
        assert trainer.state.num_input_tokens_seen == 2 * once


def test_flops_count_every_role(tmp_path):
    one = make(llama(), {"forget": examples(8, 1)}, tmp_path)
    two = make(llama(), {"forget": examples(8, 1), "retain": examples(8, 1)}, tmp_path)
    one.train()
    two.train()
    assert two.state.total_flos == 2 * one.state.total_flos > 0
