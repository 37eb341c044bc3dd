"""Pipelines to folders and back, and what is said of those that cannot be used."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler
from peft import LoraConfig, get_peft_model
from pipeline_probe import pipeline_sha256, probe
from safetensors.torch import load_file, save_file

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.models.diffusion.architectures import ARCHITECTURES
from hf_clmul.models.diffusion.loading import load_pipeline, make_ready, save_pipeline

MAKERS = {
    "StableDiffusionPipeline": tiny_pipelines.stable_diffusion,
    "StableDiffusionXLPipeline": tiny_pipelines.stable_diffusion_xl,
    "StableDiffusion3Pipeline": tiny_pipelines.stable_diffusion_3,
    "FluxPipeline": tiny_pipelines.flux,
    "DDPMPipeline": tiny_pipelines.ddpm,
    "DiTPipeline": tiny_pipelines.dit,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    save_pipeline(tiny_pipelines.stable_diffusion(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(saved, tmp_path / "sd")


def refusal(path: Path | str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_pipeline(str(path))
    return str(caught.value)


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    change(index)
    (folder / "model_index.json").write_text(json.dumps(index))


# ---- there and back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_pipeline_comes_back_bit_for_bit(name, tmp_path, capfd):
    pipeline = MAKERS[name]()
    save_pipeline(pipeline, tmp_path / "first")
    again = load_pipeline(str(tmp_path / "first"))
    assert type(again) is type(pipeline) and pipeline_sha256(again) == pipeline_sha256(pipeline)
    again.default_sample_size = getattr(pipeline, "default_sample_size", None)
    assert torch.equal(probe(again), probe(pipeline)) and probe(again).abs().max() > 0.01
    assert not any(part.training for part in again.components.values() if isinstance(part, torch.nn.Module))
    save_pipeline(again, tmp_path / "second")
    first, second = (
        {
            file.relative_to(tmp_path / x): file.read_bytes()
            for file in sorted((tmp_path / x).rglob("*"))
            if file.is_file()
        }
        for x in ("first", "second")
    )
    assert first == second and not any(str(tmp_path).encode() in content for content in second.values())
    assert "it/s" not in "".join(capfd.readouterr())


def test_the_type_of_the_weights_can_be_chosen(saved):
    for dtype in ("bfloat16", torch.bfloat16):
        pipeline = load_pipeline(str(saved), dtype)
        assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}
    assert load_pipeline(str(saved)).unet.dtype == torch.float32


def test_users_load_it_with_diffusers_alone(saved):
    pipeline = DiffusionPipeline.from_pretrained(saved)
    live = tiny_pipelines.stable_diffusion()
    assert pipeline_sha256(pipeline) == pipeline_sha256(live)
    torch.testing.assert_close(probe(pipeline), probe(live), atol=1e-5, rtol=0)  # its weights lie askew in the file


def test_bars_are_as_they_were_afterwards(saved):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.enable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        load_pipeline(str(saved))
        assert diffusers_logging.is_progress_bar_enabled() and not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_a_safety_checker_is_neither_needed_nor_loaded(folder):
    edit_index(folder, lambda index: index.update(
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True
    ))  # fmt: skip
    assert load_pipeline(str(folder)).safety_checker is None


def test_dit_drops_no_labels_of_its_own_while_training():
    pipeline, times = tiny_pipelines.dit(), torch.full((200,), 500)
    noisy, given = torch.zeros(200, 4, 8, 8), {"class_labels": torch.full((200,), 7)}

    def outputs() -> torch.Tensor:
        return ARCHITECTURES["DiTPipeline"].call(pipeline.transformer.train(), noisy, times, given)

    with torch.no_grad():
        before = outputs()
        make_ready(pipeline)
        after = outputs()
    assert (before - before[:1]).abs().max() > 1e-3  # one label in ten is dropped
    assert (after - after[:1]).abs().max() < 1e-5


# ---- refusals --------------------------------------------------------------------------------------------------


def test_a_missing_scheduler_is_named(folder):
    edit_index(folder, lambda index: index.pop("scheduler"))
    assert refusal(folder) == (
        f"model.path: '{folder}', a StableDiffusionPipeline, has no scheduler. Every pipeline needs one, such as the "
        "DDPMScheduler that its network was trained with: add it and save the pipeline anew."
    )


@pytest.mark.parametrize("name", ["scheduler", "tokenizer", "unet"])
def test_a_component_without_files_is_named(folder, name):
    shutil.rmtree(folder / name)
    assert f"has no files for its {name}, a " in refusal(folder)
    (folder / name).mkdir()
    assert f"has no files for its {name}, a " in refusal(folder)


def test_a_missing_text_encoder_is_named(folder):
    edit_index(folder, lambda index: index.update(text_encoder=[None, None]))
    assert "has no text_encoder. It needs one of class CLIPTextModel" in refusal(folder)


@pytest.mark.parametrize(("name", "pair", "wanted"), [
    ("unet", ["diffusers", "UNet2DModel"], "UNet2DConditionModel"),
    ("vae", ["diffusers", "AutoencoderTiny"], "AutoencoderKL"),
    ("text_encoder", ["transformers", "T5EncoderModel"], "CLIPTextModel"),
])  # fmt: skip
def test_a_component_of_the_wrong_class_is_named(folder, name, pair, wanted):
    edit_index(folder, lambda index: index.update({name: pair}))
    assert f"its {name} is a {pair[1]}; a StableDiffusionPipeline needs a {wanted}. Put the right one in" in refusal(
        folder
    )


def test_pipelines_in_memory_are_checked_too():
    pipeline = tiny_pipelines.stable_diffusion()
    make_ready(pipeline)
    pipeline.unet = tiny_pipelines.ddpm().unet
    with pytest.raises(RecipeError, match="the pipeline': its unet is a UNet2DModel"):
        make_ready(pipeline)
    pipeline = tiny_pipelines.stable_diffusion()
    pipeline.scheduler = None
    with pytest.raises(RecipeError, match="has no scheduler"):
        make_ready(pipeline)
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(RecipeError, match="EDMEulerScheduler .* has no noising to train with"):
        make_ready(pipeline)


def test_an_unknown_pipeline_is_answered_with_the_nearest(folder):
    edit_index(folder, lambda index: index.update(_class_name="StableDiffusionUpscalePipeline"))
    message = refusal(folder)
    assert "its pipeline class is 'StableDiffusionUpscalePipeline'" in message
    assert "Did you mean StableDiffusionPipeline?" in message


@pytest.mark.parametrize(("name", "file"), [("unet", "diffusion_pytorch_model"), ("text_encoder", "model")])
def test_pickled_weights_are_refused(folder, name, file):
    weights = folder / name / f"{file}.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    message = refusal(folder)
    assert f"the weights of its {name} are pickled (config.json, {file}.bin)" in message
    assert "Convert them to safetensors" in message


def test_broken_weights_are_explained(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10")
    assert refusal(folder).startswith(f"model.path: '{folder}' could not be loaded: ")


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder"])
def test_missing_weights_are_not_made_up(folder, name):
    (weights,) = (folder / name).glob("*.safetensors")
    tensors = load_file(weights)
    count = len(tensors)
    tensors.pop(min(tensors))
    save_file(tensors, weights, metadata={"format": "pt"})
    assert f"the files of its {name} hold {count - 1} tensors, and a " in (message := refusal(folder))
    assert f"of its config has {count}. Get them anew" in message


@pytest.mark.parametrize(("file", "words"), [
    ("adapter_config.json", "is an adapter and not a whole pipeline"),
    ("pytorch_lora_weights.safetensors", "is an adapter and not a whole pipeline"),
    ("config.json", "is a single model and not a whole pipeline"),
    ("notes.txt", "has no model_index.json. Give a folder made by a pipeline's save_pretrained"),
])  # fmt: skip
def test_what_is_no_pipeline_is_told_apart(tmp_path, file, words):
    (tmp_path / file).touch()
    assert refusal(tmp_path).startswith(f"model.path: '{tmp_path}' {words}")


def test_a_single_file_is_explained(tmp_path):
    (tmp_path / "v1-5.safetensors").touch()
    assert "is a single file. Load it once with the pipeline class's from_single_file" in refusal(
        tmp_path / "v1-5.safetensors"
    )


def test_an_id_that_is_nowhere_is_explained():
    first, remedy = refusal("nobody/nothing-here").splitlines()
    assert first.startswith("model.path: 'nobody/nothing-here' could not be loaded: ")
    assert remedy == (
        "Give a Hub id or a folder made by a pipeline's save_pretrained; without network, a folder on this machine."
    )


def test_a_pipeline_with_an_adapter_attached_is_not_saved_whole(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    model = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(RunError, match="the unet still has an adapter attached"):
        save_pipeline(pipeline, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    pipeline.unet = model.merge_and_unload()
    save_pipeline(pipeline, tmp_path / "whole")
    assert torch.equal(probe(load_pipeline(str(tmp_path / "whole"))), probe(pipeline))


def test_the_package_is_light():
    code = "import sys, hf_clmul.models.diffusion; sys.exit(any(x in sys.modules for x in ('torch', 'diffusers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
