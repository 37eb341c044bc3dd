"""ClmulTrainer on every kind of pipeline, what it refuses to train, and the documented examples."""

import json
import re

import pytest
import tiny_pipelines
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from diffusion_bed import FORGET, RETAIN, lora, make, rows, two_roles
from peft import get_peft_model
from PIL import Image
from pipeline_probe import probe
from trainer_bed import QUIET, lines, same, weights
from transformers import TrainerCallback

from hf_clmul.models.diffusion.loading import save_pipeline
from hf_clmul.models.diffusion.lora_files import FILE, save_lora
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

SD = tiny_pipelines.stable_diffusion
BOTH = {"forget": {"esd": {}}, "retain": {"denoising": {}, "distill": {}}}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2}


# ---- all kinds of pipelines ----------------------------------------------------------------------------------------

LORA_KINDS = {
    "stable_diffusion_xl": tiny_pipelines.stable_diffusion_xl,
    "stable_diffusion_3": tiny_pipelines.stable_diffusion_3,
    "flux": tiny_pipelines.flux,
}


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_a_trained_adapter_gives_the_same_output_in_a_fresh_pipeline(tmp_path, kind):
    """Two steps; written at the end, read by diffusers' own loader. Alpha is not the rank."""
    pipeline, fresh = LORA_KINDS[kind](), LORA_KINDS[kind]()
    config = lora(pipeline, r=3, lora_alpha=8)
    trainer = make(pipeline, two_roles(pipeline), tmp_path, peft_config=config, max_steps=2, **BOTH, **ADAM)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    before = probe(fresh)
    fresh.load_lora_weights(tmp_path / "saved")
    assert torch.equal(probe(fresh), probe(pipeline))
    assert (probe(fresh) - before).abs().max() > 1e-3
    save_lora(type(pipeline), tmp_path / "again", trainer.model, "default")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "saved" / FILE).read_bytes()


FULL_KINDS = {
    "class conditional": (lambda: tiny_pipelines.ddpm(classes=10), (("7",), ("1", "9")), {"relabel": {"anchor": "8"}}),
    "unconditional": (tiny_pipelines.ddpm, (("",), ("",)), {"ascent": {}}),
    "dit": (tiny_pipelines.dit, (("class 8", "7"), ("1", "class 9")), {"esd": {}}),
    "flux": (tiny_pipelines.flux, (FORGET, RETAIN), {"esd": {}}),
}


@pytest.mark.parametrize("kind", FULL_KINDS)
def test_a_model_trained_whole_is_saved_and_loaded_as_a_pipeline(tmp_path, kind):
    build, captions, forget = FULL_KINDS[kind]
    pipeline, fresh = build(), build()
    trainer = make(
        pipeline, two_roles(pipeline, captions=captions), tmp_path, max_steps=2, forget=forget,
        retain={"denoising": {}, "distill": {}}, learning_rate=1e-2, optim="adamw_torch",
    )  # fmt: skip
    trainer.train()
    assert all(line["loss/retain/denoising"] > 0 for line in lines(trainer))
    save_pipeline(pipeline, tmp_path / "saved")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    changed, loaded = (getattr(p, trainer.family.architecture.component) for p in (pipeline, again))
    assert same(weights(changed), weights(loaded))
    assert not same(weights(changed), weights(getattr(fresh, trainer.family.architecture.component)))


def test_a_dit_in_memory_drops_no_labels(tmp_path):
    """Its own dropping, on while it trains, draws numbers that no resume would draw again."""
    found = []
    for seed in (1, 2):
        pipeline = tiny_pipelines.dit()
        roles = two_roles(pipeline, captions=(("7",), ("1",)))
        trainer = make(pipeline, roles, tmp_path, forget="ascent", retain="denoising", callbacks=[Drawn(seed)])
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)


class Drawn(TrainerCallback):
    """Numbers that somebody else draws."""

    def __init__(self, seed):
        self.seed = seed

    def on_step_begin(self, *args, **kwargs):
        torch.manual_seed(self.seed)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_terms_that_compare_prompts_need_prompts(tmp_path):
    pipeline, classes = tiny_pipelines.ddpm(), tiny_pipelines.ddpm(classes=10)
    with pytest.raises(
        ValueError, match=r"forget/esd asks .* another prompt \(empty\), which this DDPMPipeline cannot"
    ):
        make(pipeline, two_roles(pipeline), tmp_path, forget="esd")
    with pytest.raises(ValueError, match=r"forget/relabel asks .* \(anchor\)"):
        make(pipeline, two_roles(pipeline), tmp_path, forget={"relabel": {"anchor": "a red one"}})
    with pytest.raises(ValueError, match=r"forget/esd asks .* \(empty\)"):
        make(classes, two_roles(classes, captions=(("7",), ("1",))), tmp_path, forget="esd")
    with pytest.raises(ValueError, match=r"prompt_drop=0.1 shows images without their prompt"):
        make(classes, two_roles(classes, captions=(("7",), ("1",))), tmp_path, forget="ascent", prompt_drop=0.1)


def test_models_that_are_no_whole_pipeline_are_refused(tmp_path):
    pipeline = SD()
    data = two_roles(pipeline)

    def refused(model, message, **options):
        with pytest.raises(ValueError, match=message):
            make(model, data, tmp_path, **options)

    refused(pipeline.unet, "a UNet2DConditionModel, a part of a pipeline: give the whole pipeline")
    refused(get_peft_model(SD().unet, lora(pipeline)), "a PeftModel, a part of a pipeline: .*before.family")
    refused({"unet": pipeline.unet}, "model is a dict: give a Hub id or folder, .* or a pipeline of diffusers")
    unknown = type("MyPipeline", (type(pipeline),), {})(**pipeline.components, requires_safety_checker=False)
    refused(unknown, "its pipeline class is 'MyPipeline', which is not known.*Known are: StableDiffusionPipeline")
    wrong = SD()
    wrong.text_encoder = tiny_pipelines.stable_diffusion_xl().text_encoder_2
    refused(wrong, "its text_encoder is a CLIPTextModelWithProjection; a StableDiffusionPipeline needs a CLIPTextModel")
    wrong = tiny_pipelines.stable_diffusion_3()
    wrong.text_encoder = SD().text_encoder
    refused(
        wrong, "its text_encoder is a CLIPTextModel; a StableDiffusion3Pipeline needs a CLIPTextModelWithProjection"
    )
    gone = SD()
    gone.scheduler = None
    refused(gone, "has no scheduler. Every pipeline needs one")


def test_a_denoiser_that_somebody_else_changed_is_refused(tmp_path):
    data = two_roles(SD())
    for change, message in (
        (lambda p: p.unet.add_adapter(lora(p)), "the pipeline's unet has an adapter already.*fuse_lora"),
        (lambda p: get_peft_model(p.unet, lora(p)), "the pipeline's unet has an adapter already"),
        (lambda p: add_hook_to_module(p.unet, ModelHook()), "unet has a hook of accelerate.*remove_all_hooks"),
    ):
        pipeline = SD()
        change(pipeline)
        with pytest.raises(ValueError, match=message):
            make(pipeline, data, tmp_path)
    hooked = SD()
    add_hook_to_module(hooked.text_encoder, ModelHook())  # that of an encoder does no harm
    make(hooked, data, tmp_path).train()


def test_a_second_request_goes_on_with_the_first_ones_adapter(tmp_path):
    pipeline = SD()
    first = make(pipeline, two_roles(pipeline), tmp_path, peft_config=lora(pipeline), **ADAM)
    first.train()
    before = probe(pipeline)
    second = ClmulTrainer(
        first.model, ClmulConfig(output_dir=str(tmp_path), **{**QUIET, "max_steps": 1}), family=first.family,
        train_dataset={"learn": rows(pipeline, RETAIN)},
    )  # fmt: skip
    second.train()
    assert not torch.equal(probe(pipeline), before)
    fresh = SD()
    second.save_model(tmp_path / "saved")
    fresh.load_lora_weights(tmp_path / "saved")
    assert torch.equal(probe(fresh), probe(pipeline))


def test_layers_beside_the_adapter_are_refused(tmp_path):
    pipeline = SD()
    with pytest.raises(ValueError, match="modules_to_save trains whole layers .* name them in target_modules"):
        make(pipeline, two_roles(pipeline), tmp_path, peft_config=lora(pipeline, modules_to_save=["conv_out"]))


# ---- the documentation ---------------------------------------------------------------------------------------------

HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_the_documented_examples_run(repo, tmp_path, monkeypatch):
    """With a tiny pipeline in the place of the Hub's, its size of images and two steps."""
    section = (repo / "docs" / "diffusion.md").read_text("utf-8").split("## From Python")[1].split("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    save_pipeline(SD(), tmp_path / "tiny")
    for folder, captions in (("churches", FORGET), ("other_buildings", RETAIN)):
        (tmp_path / folder).mkdir()
        lines_of = []
        for i, row in enumerate(rows(SD(), captions)):
            pixels = ((row["image"] + 1) * 127.5).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
            lines_of.append(json.dumps({"file_name": f"{i}.png", "caption": row["caption"]}))
        (tmp_path / folder / "metadata.jsonl").write_text("\n".join(lines_of))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    names: dict = {}
    for example in (first, second):
        run = example.replace(HUB_ID, str(tmp_path / "tiny")).replace("max_steps=200", "max_steps=2")
        exec(compile(run, "docs/diffusion.md", "exec"), names)
    assert names["trainer"].state.global_step == names["then"].state.global_step == 2
    made, loaded = (
        [p for name, p in model.named_parameters() if "lora_B" in name]
        for model in (names["trainer"].model, names["fresh"].unet)
    )
    assert len(made) > 10 and all(torch.equal(a, b) and a.any() for a, b in zip(made, loaded, strict=True))
