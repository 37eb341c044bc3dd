"""The moving average of the weights that train: what a request leaves behind, its checkpoints, and where it is refused."""

import json
import signal
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers.training_utils import EMAModel
from diffusion_bed import RETAIN, lora, make, rows, two_roles
from safetensors.torch import load_file
from small_run import before, execute, in_process, outcome
from test_picture_recipes import RECIPE
from trainer_bed import Stop, lines, llama, same, trained, weights
from trainer_bed import make as make_of_text
from trainer_bed import two_roles as texts
from transformers import TrainerCallback

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.runner import plan_recipe
from hf_clmul.training.averaged import FILE, put_saved
from hf_clmul.training_args import ClmulConfig

SD = tiny_pipelines.stable_diffusion
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
STEPS = {"save_strategy": "steps", "save_steps": 1}
KINDS = ["full", "adapter", "in part"]


class Seen(TrainerCallback):
    """What trains, after each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(trained(model))


def trainer_of(folder, kind="full", pipeline=None, callbacks=(), **options):
    pipeline = SD() if pipeline is None else pipeline
    extra = {"adapter": {"peft_config": lora(pipeline, lora_dropout=0.2)}, "in part": {"trainable": ".*attn2.*"}}
    options = {"max_steps": 5, "ema": 0.3, **ADAM, **extra.get(kind, {}), **options}
    return make(pipeline, two_roles(pipeline, 7, 5), folder, callbacks=list(callbacks), **options)


def by_hand(steps, decay):
    """In float64: the n-th step, counted from 0, has the decay (1 + n) / (10 + n), or `decay` where that is less; the first 0."""
    found = {}
    for n, live in enumerate(steps):
        m = min((1 + n) / (10 + n), decay) if n else 0.0
        found = {name: m * found.get(name, value.double()) + (1 - m) * value.double() for name, value in live.items()}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.15, 0.9999])
def test_what_training_leaves_is_the_average_of_what_trained(tmp_path, kind, decay):
    saw = Seen()
    trainer = trainer_of(tmp_path, kind, callbacks=[saw], ema=decay)
    before = weights(trainer.model)
    trainer.train()
    after, expected = weights(trainer.model), by_hand(saw.steps, decay)
    live = saw.steps[-1]
    assert live.keys() == expected.keys() and (kind == "full") == (live.keys() == after.keys())
    assert all(torch.allclose(after[name].double(), expected[name], atol=1e-6) for name in live)
    assert max(float((after[name] - live[name]).abs().max()) for name in live) > 1e-3
    assert all(torch.equal(after[name], before[name]) for name in before if name not in live)


def test_the_live_weights_train_as_without_it(tmp_path):
    plain, averaging = Seen(), Seen()
    trainer_of(tmp_path, callbacks=[plain], ema=None).train()
    trainer_of(tmp_path, callbacks=[averaging], ema=0.999).train()
    assert all(same(one, other) for one, other in zip(plain.steps, averaging.steps, strict=True))


def test_it_is_that_of_diffusers_and_wider_than_the_weights(tmp_path):
    """In bfloat16 the steps are smaller than what an average in that precision would notice."""
    pipeline, saw = SD(), Seen()
    pipeline.unet.to(torch.bfloat16)
    trainer = trainer_of(tmp_path, pipeline=pipeline, callbacks=[saw], ema=0.9999, max_steps=12, **STEPS)
    start = weights(trainer.model)
    trainer.train()
    theirs = EMAModel([value.float() for value in start.values()], decay=0.9999)
    for live in saw.steps:
        theirs.step([torch.nn.Parameter(value) for value in live.values()])
    saved = load_file(tmp_path / "checkpoint-12" / FILE)
    found = dict(zip(start, theirs.shadow_params, strict=True))
    assert same(saved, found) and {value.dtype for value in saved.values()} == {torch.float32}
    assert same(weights(trainer.model), {name: value.bfloat16() for name, value in found.items()})


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_resume_is_exact_and_checkpoints_hold_both(tmp_path, kind):
    through = trainer_of(tmp_path / "through", kind, **STEPS)
    through.train()
    killed, saw = trainer_of(tmp_path / "killed", kind, callbacks=[Stop(3)], **STEPS), Seen()
    killed.add_callback(saw)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer_of(tmp_path / "killed", kind, **STEPS)
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), weights(through.model)) and lines(again) == lines(through)
    folder = tmp_path / "killed" / "checkpoint-3"
    expected = by_hand(saw.steps, 0.3)
    held = load_file(folder / FILE)
    assert held.keys() == expected.keys()
    assert all(torch.allclose(held[name].double(), expected[name], atol=1e-6) for name in held)
    name = "adapter_model.safetensors" if kind == "adapter" else "diffusion_pytorch_model.safetensors"
    stored = load_file(folder / name)
    of_adapter = {name.replace(".default.", "."): value for name, value in saw.steps[-1].items()}
    assert all(torch.equal(stored[name], value) for name, value in of_adapter.items())


def test_what_a_finished_checkpoint_averaged_can_be_put_into_a_model(tmp_path):
    trainer = trainer_of(tmp_path, "adapter", **STEPS)
    trainer.train()
    other = trainer_of(tmp_path / "other", "adapter", **STEPS).model
    assert not same(weights(other), weights(trainer.model))
    put_saved(other, tmp_path / "checkpoint-5")
    assert same(weights(other), weights(trainer.model))
    put_saved(other, tmp_path / "other")  # has none
    assert same(weights(other), weights(trainer.model))


def test_evaluations_see_the_average_and_leave_the_live_weights(tmp_path):
    data = rows(SD(), RETAIN)
    measured, plain = Seen(), Seen()
    trainer = trainer_of(
        tmp_path, callbacks=[measured], ema=0.99, eval_dataset=data, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    trainer_of(tmp_path, callbacks=[plain], ema=0.99).train()
    assert all(same(one, other) for one, other in zip(plain.steps, measured.steps, strict=True))
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses[-1] == trainer.evaluate()["eval_loss"] and len(losses) == 5


def test_the_best_model_is_the_average_of_its_step(tmp_path):
    data, saw = rows(SD(), RETAIN), Seen()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(
        tmp_path, callbacks=[saw], eval_dataset=data, eval_strategy="steps", eval_steps=1, **best, **STEPS,
        learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    number = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert number < 5
    expected, after = by_hand(saw.steps[:number], 0.3), weights(trainer.model)
    assert all(torch.allclose(after[name].double(), expected[name], atol=1e-6) for name in expected)
    loss = trainer.state.log_history[
        [i for i, x in enumerate(trainer.state.log_history) if "eval_loss" in x][number - 1]
    ]
    assert trainer.evaluate()["eval_loss"] == loss["eval_loss"]


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    SD().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "r.yaml").write_text(
        RECIPE.replace("max_steps: 2", "max_steps: 3, save_steps: 1") + "diffusion: {ema: 0.9}\n"
    )
    return tmp_path / "r.yaml"


@pytest.mark.parametrize("adapter", ["null", "{r: 2, alpha: 4}"])
def test_a_run_exports_it_and_a_kill_after_the_last_step_changes_nothing(recipe, tmp_path, adapter):
    change = f"adapter={adapter}"
    execute(recipe, tmp_path / "plain", change, "diffusion.ema=null")
    execute(recipe, tmp_path / "whole", change)
    assert outcome(tmp_path / "plain")["files"] != outcome(tmp_path / "whole")["files"]
    text = recipe.read_text().replace("data:\n", f"adapter: {adapter}\ndata:\n", 1)
    recipe.write_text(text)
    stop = ("hf_clmul.run.request", "save_state", "state")  # its last checkpoint is there and its state is not
    assert in_process(before, stop, recipe, tmp_path / "killed") == -signal.SIGKILL
    (last,) = (tmp_path / "killed").rglob(f"checkpoint-3/{FILE}")
    kept = load_file(last)
    execute(recipe, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    if adapter == "null":
        assert same(load_file(tmp_path / "killed/model/unet/diffusion_pytorch_model.safetensors"), kept)


def test_the_plan_counts_it(recipe):
    averaged, plain = (plan_recipe(load_recipe(recipe, more))[0] for more in ([], ["diffusion.ema=null"]))
    assert averaged["memory_bytes"] - plain["memory_bytes"] == 4 * plain["trainable_parameters"]


def test_in_a_recipe_of_edits_alone_it_is_refused(recipe):
    edits = ["unlearning.forget={uce: {anchor: {cat: dog}}}", "unlearning.retain={}"]
    with pytest.raises(
        RecipeError, match=r"diffusion.ema: uce is an edit, which takes no step, so that there is nothing"
    ):
        load_recipe(recipe, edits)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_checkpoint_without_it_or_of_other_parameters_is_refused(tmp_path):
    trainer_of(tmp_path / "plain", ema=None, max_steps=1, **STEPS).train()
    with pytest.raises(RunError, match=f"checkpoint-1 has no {FILE}: it was made without ema"):
        trainer_of(tmp_path / "plain", **STEPS).train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(tmp_path / "part", "in part", callbacks=[Stop(1)], **STEPS).train()
    folder = tmp_path / "part" / "checkpoint-1"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    (folder / "optimizer.pt").unlink()  # which would be of other parameters too
    with pytest.raises(RunError, match="is an average of other parameters"):
        trainer_of(tmp_path / "part", trainable=".*attn1.*", **STEPS).train(resume_from_checkpoint=True)


def test_refusals_say_why(tmp_path):
    with pytest.raises(ValueError, match=r"ema=0.9 is for diffusion models: leave it out"):
        make_of_text(llama(), texts(), tmp_path, ema=0.9)
    with pytest.raises(ValueError, match=r"forget/uce is an edit, which takes no step, so that ema cannot act"):
        trainer_of(tmp_path, forget={"uce": {"anchor": {"seven": "eight"}}}, retain={})
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": rows(SD(), RETAIN),
    }
    with pytest.raises(ValueError, match=r"save_only_model keeps no average in checkpoints, of which ema would need"):
        trainer_of(tmp_path, save_only_model=True, **best, **STEPS)
    for wrong in (0.0, 1.0, 2, "much"):
        with pytest.raises(ValueError, match="ema: expected"):
            ClmulConfig(str(tmp_path), ema=wrong)
