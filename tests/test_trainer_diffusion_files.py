"""ClmulTrainer on diffusers' pipelines: checkpoints, adapters, evaluation, and the defaults of Trainer that are wrong for a
denoiser."""

import json

import pytest
import tiny_pipelines
import torch
from diffusers import UNet2DConditionModel
from diffusion_bed import RETAIN, lora, make, rows, two_roles
from huggingface_hub import ModelCard
from pipeline_probe import probe
from safetensors.torch import load_file
from trainer_bed import Gradients, Stop, distance, lines, same, trained, weights
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.models.diffusion.lora_files import FILE

SD = tiny_pipelines.stable_diffusion
BOTH = {"forget": {"esd": {}}, "retain": {"denoising": {}, "distill": {}}}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


def watched(trainer):
    """Keeps the sum of every noisy sample that a step is made from."""
    trainer.seen, step = [], trainer.training_step

    def kept(model, inputs, *args):
        trainer.seen.append([float(noisy.sum()) for noisy in inputs["forget"]["noisy"]])
        return step(model, inputs, *args)

    trainer.training_step = kept
    return trainer


# ---- resume --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "adapter", "in part"])
def test_resume_in_the_middle_of_an_epoch_is_exact(tmp_path, kind):
    """Seven steps at once, and killed after the fifth, in the second epoch of four; nothing is seen twice."""

    def trainer(name, callbacks=()):
        pipeline = SD()
        extra = {"adapter": {"peft_config": lora(pipeline, lora_dropout=0.2)}, "in part": {"trainable": ".*attn2.*"}}
        return watched(make(
            pipeline, two_roles(pipeline, 7, 5), tmp_path / name, callbacks=list(callbacks), max_steps=7,
            per_device_train_batch_size=2, save_strategy="steps", save_steps=1, prompt_drop=0.3, **BOTH, **ADAM,
            **extra.get(kind, {}),
        ))  # fmt: skip

    through = trainer("through")  # it seeds the dropout to come
    through.train()
    killed = trainer("killed", [Stop(5)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer("killed")
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), weights(through.model)) and lines(again) == lines(through)
    assert killed.seen + again.seen == through.seen
    assert len({noisy for step in through.seen for noisy in step}) == 13  # one step is of one; no noise comes twice


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path / "full", save_strategy="steps", save_steps=1)
    trainer.train()
    (tmp_path / "full" / "checkpoint-1" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RunError, match="holds no diffusion_pytorch_model.safetensors: it is not a checkpoint"):
        make(SD(), two_roles(pipeline), tmp_path / "full", max_steps=2).train(resume_from_checkpoint=True)


# ---- what is written -----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model_that_its_class_loads(tmp_path):
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    assert {"config.json", "diffusion_pytorch_model.safetensors"} <= {file.name for file in folder.iterdir()}
    assert not (folder / "model.safetensors").exists()
    loaded = UNet2DConditionModel.from_pretrained(folder)
    assert same(weights(loaded), weights(pipeline.unet)) and not same(weights(loaded), weights(SD().unet))
    config = json.loads(json.dumps({k: v for k, v in pipeline.unet.config.items() if not k.startswith("_")}))
    assert {name: loaded.config[name] for name in config} == config


def test_a_checkpoint_of_several_files_is_resumed(tmp_path, monkeypatch):
    """As diffusers writes models of more than 10 GB."""
    save = UNet2DConditionModel.save_pretrained
    monkeypatch.setattr(
        UNet2DConditionModel, "save_pretrained", lambda self, to: save(self, to, max_shard_size="100KB")
    )
    trainers = [make(p := SD(), two_roles(p), tmp_path, max_steps=2, save_strategy="steps", save_steps=1) for _ in "ab"]
    trainers[0].train()
    folder = tmp_path / "checkpoint-1"
    assert not (folder / "diffusion_pytorch_model.safetensors").exists() and len([*folder.glob("*.safetensors")]) > 1
    trainers[1].train(resume_from_checkpoint=str(folder))
    assert same(weights(trainers[0].model), weights(trainers[1].model))


def test_a_checkpoint_of_an_adapter_holds_it_alone_and_pipelines_load_it(tmp_path):
    pipeline = SD()
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, peft_config=lora(pipeline), save_strategy="steps", save_steps=1, **ADAM
    )
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    held = load_file(folder / "adapter_model.safetensors")
    assert len(held) == len(trained(trainer.model)) > 10 and all("lora_" in name for name in held)
    assert {file.name for file in folder.glob("*.safetensors")} == {"adapter_model.safetensors", FILE}
    fresh = SD()
    fresh.load_lora_weights(folder)
    assert torch.equal(probe(fresh), probe(pipeline))
    assert not torch.equal(probe(fresh), probe(SD()))


class Best(TrainerCallback):
    """Keeps the weights of each step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_is_really_loaded(tmp_path, adapter):
    """Ascent makes each step worse than the one before."""
    pipeline, best = SD(), Best()
    trainer = make(
        pipeline, {"forget": rows(pipeline, RETAIN)}, tmp_path, callbacks=[best], max_steps=3, forget="ascent",
        eval_dataset=rows(pipeline, RETAIN), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, learning_rate=0.5, peft_config=lora(pipeline) if adapter else None,
    )  # fmt: skip
    trainer.train()
    losses = [line["eval_loss"] for line in lines(trainer, "eval_loss")]
    number = losses.index(min(losses))
    assert losses == sorted(losses) and len(set(losses)) == 3 and number == 0
    assert same(weights(trainer.model), best.steps[0]) and not same(best.steps[0], best.steps[2])


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_is_one_fixed_loss_however_it_is_cut(tmp_path):
    pipeline = SD()
    data, found = rows(pipeline, RETAIN, 5), []
    for size in (5, 2):
        trainer = make(
            pipeline, two_roles(pipeline), tmp_path, eval_dataset={"kept": data}, per_device_eval_batch_size=size
        )
        first, second = trainer.evaluate(), trainer.evaluate()
        assert first["eval_kept_loss"] == second["eval_kept_loss"] < 10
        found += [
            first["eval_kept_loss"],
            trainer.evaluate(data)["eval_loss"],
            trainer.predict(data).metrics["test_loss"],
        ]
    assert found == pytest.approx([found[0]] * 6, rel=1e-6)
    batch = trainer.data_collator.collate(trainer.family.encoded(data, "data"))
    with torch.no_grad():
        said = pipeline.unet(batch["noisy"], batch["times"], batch["conditioning"]["encoder_hidden_states"]).sample
    assert found[0] == pytest.approx(float(((said - batch["target"]) ** 2).mean()), rel=1e-6)


# ---- what else is wrong by default ---------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    found = []
    for checkpointing in (False, True):
        for adapter in (False, True):
            pipeline, saw = SD(), Gradients()
            trainer = make(
                pipeline, two_roles(pipeline), tmp_path, callbacks=[saw], activation_checkpointing=checkpointing,
                peft_config=lora(pipeline, init_lora_weights=False) if adapter else None, **BOTH,
            )  # fmt: skip
            trainer.train()
            assert pipeline.unet.is_gradient_checkpointing == checkpointing
            found.append(saw.steps[0])
    for plain, checkpointed in zip(found[:2], found[2:], strict=True):
        assert plain and distance(checkpointed, plain) < 1e-6


class Board:
    """What TensorBoard's callback writes to."""

    def __init__(self):
        self.texts, self.scalars = {}, {}

    def add_text(self, name, text, *step):
        self.texts[name] = text

    def add_scalar(self, name, value, step):
        self.scalars[name] = value

    def flush(self):
        pass

    close = flush


@pytest.mark.parametrize("adapter", [False, True])
def test_tensorboard_is_told_the_config(tmp_path, adapter):
    """Its callback by itself: the package need not be there."""
    callback = TensorBoardCallback.__new__(TensorBoardCallback)
    callback.tb_writer = board = Board()
    callback.logging_dir = str(tmp_path)
    pipeline = SD()
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, callbacks=[callback], peft_config=lora(pipeline) if adapter else None
    )
    trainer.train()
    assert '"cross_attention_dim": 16' in board.texts["model_config"]
    assert board.scalars["train/loss/forget/esd"] == lines(trainer)[0]["loss/forget/esd"]


@pytest.mark.parametrize("adapter", [False, True])
def test_clipping_clips(tmp_path, adapter):
    """diffusers' script for text-to-image LoRA clips an iterator that is used up, and so nothing."""
    pipeline = SD()
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, max_grad_norm=1e-3, learning_rate=0.5, **BOTH,
        peft_config=lora(pipeline, init_lora_weights=False) if adapter else None,
    )  # fmt: skip
    before = trained(trainer.model)
    trainer.train()
    after = trained(trainer.model)
    moved = torch.cat([(after[name].double() - before[name].double()).flatten() for name in before]).norm()
    assert lines(trainer)[0]["grad_norm"] > 0.01
    assert float(moved) == pytest.approx(0.5 * 1e-3, rel=1e-2)  # the weights' own rounding is of this order


def test_the_model_card_names_the_right_library(tmp_path):
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, eval_dataset=rows(pipeline, RETAIN))
    trainer.train()
    trainer.evaluate()
    for _ in range(2):  # the second finds the first
        trainer.create_model_card(tags=["mine"])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "diffusers"
        assert {"mine", "unlearning"} <= set(card.data.tags)
        assert "library_name: transformers" not in (tmp_path / "README.md").read_text()


def test_counting_tokens_does_not_warn_of_missing_inputs(tmp_path, caplog):
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, include_num_input_tokens_seen="all")
    trainer.train()
    assert not [record for record in caplog.records if "main_input_name" in record.getMessage()]


@pytest.mark.parametrize("adapter", [False, True])
def test_bf16_autocast_stays_near_float32(tmp_path, adapter):
    found = {}
    for bf16 in (False, True):
        pipeline, saw = SD(), Gradients()
        extra = {"peft_config": lora(pipeline, init_lora_weights=False)} if adapter else {}
        trainer = make(
            pipeline, two_roles(pipeline), tmp_path, callbacks=[saw], eval_dataset=rows(pipeline, RETAIN), bf16=bf16,
            forget="ascent", retain="denoising", **extra,
        )  # fmt: skip
        trainer.train()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        found[bf16] = saw.steps[0], trainer.evaluate()["eval_loss"]
    assert 1e-5 < distance(found[True][0], found[False][0]) < 0.1
    assert found[True][1] == pytest.approx(found[False][1], rel=0.02)


def test_half_precision_weights_are_not_trained(tmp_path):
    remedy = "Train them in float32.*with `training: {bf16: true}`"
    half = SD().to(torch.float16)
    with pytest.raises(RecipeError, match=rf"float16, such as conv_in.weight\. {remedy}"):
        make(half, two_roles(SD()), tmp_path)
    pipeline = SD()
    config = lora(pipeline)
    trainer = make(pipeline, two_roles(pipeline), tmp_path, peft_config=config)
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            p.data = p.data.half()
    with pytest.raises(RecipeError, match=rf"float16, such as .*lora_A.*\. {remedy}"):
        type(trainer)(trainer.model, trainer.args, train_dataset=two_roles(pipeline), family=trainer.family)
