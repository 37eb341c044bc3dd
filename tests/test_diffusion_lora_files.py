"""LoRA files that load at the right strength through diffusers' own loader, and the traps that they avoid."""

import json

import pytest
import tiny_pipelines
import torch
from diffusers import DDPMPipeline, DiTPipeline
from diffusers.utils import logging
from peft import LoraConfig, PeftModel, get_peft_model
from pipeline_probe import probe
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.families.options import Diffusion
from hf_clmul.families.pipeline import LoadedPipeline
from hf_clmul.models.diffusion.architectures import ARCHITECTURES
from hf_clmul.models.diffusion.loading import load_pipeline, save_pipeline
from hf_clmul.models.diffusion.lora_files import FILE, check_precision, load_lora, metadata, save_lora
from hf_clmul.recipe.schema import Images

MAKERS = {
    "StableDiffusionPipeline": tiny_pipelines.stable_diffusion,
    "StableDiffusionXLPipeline": tiny_pipelines.stable_diffusion_xl,
    "StableDiffusion3Pipeline": tiny_pipelines.stable_diffusion_3,
    "FluxPipeline": tiny_pipelines.flux,
}
NAME = "task_seven"


def attach(pipeline, **settings) -> PeftModel:
    """An adapter with weights of its own, so that alpha matters."""
    architecture = ARCHITECTURES[type(pipeline).__name__]
    settings = {"r": 4, "lora_alpha": 10, "target_modules": list(architecture.adapter_targets)} | settings
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(getattr(pipeline, architecture.component), LoraConfig(**settings), adapter_name=NAME)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def verify_lora(fresh, folder, expected: torch.Tensor) -> float:
    """How far the pipeline with the file is from the one that wrote it."""
    load_lora(fresh, folder)
    return distance(probe(fresh), expected)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


# ---- strength --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_adapter_is_loaded_at_its_own_strength(name, tmp_path):
    pipeline = MAKERS[name]()
    base = probe(pipeline)
    model = attach(pipeline)
    expected = probe(pipeline)
    assert distance(base, expected) > 0.01
    assert save_lora(type(pipeline), tmp_path, model, NAME) == tmp_path / FILE
    fresh = MAKERS[name]()
    assert verify_lora(fresh, tmp_path, expected) == 0.0
    fresh.unload_lora_weights()
    assert torch.equal(probe(fresh), base)
    prefix = ARCHITECTURES[name].prefix
    assert all(key.startswith(f"{prefix}.") and "base_model" not in key for key in load_file(tmp_path / FILE))


@pytest.mark.parametrize("settings", [
    {"r": 8, "lora_alpha": 1},
    {"rank_pattern": {"to_k": 2, "mid_block.*to_v": 6}, "alpha_pattern": {"to_k": 7}},
    {"use_rslora": True},
    {"target_modules": ["to_k", "conv1", "time_emb_proj"]},
    {"target_modules": r".*attn2\.to_[kv]"},
])  # fmt: skip
def test_ranks_alphas_and_targets_of_any_kind_survive(settings, tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    model = attach(pipeline, **settings)
    save_lora(type(pipeline), tmp_path, model, NAME)
    assert verify_lora(tiny_pipelines.stable_diffusion(), tmp_path, probe(pipeline)) == 0.0


def test_without_metadata_it_would_load_at_another_strength(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    save_lora(type(pipeline), tmp_path, attach(pipeline), NAME)
    save_file(load_file(tmp_path / FILE), tmp_path / FILE, metadata={"format": "pt"})
    assert verify_lora(tiny_pipelines.stable_diffusion(), tmp_path, probe(pipeline)) > 0.01


def test_the_check_is_quiet(tmp_path, capfd):
    pipeline = tiny_pipelines.stable_diffusion()
    save_lora(type(pipeline), tmp_path, attach(pipeline), NAME)
    fresh, expected, verbosity = tiny_pipelines.stable_diffusion(), probe(pipeline), logging.get_verbosity()
    capfd.readouterr()
    verify_lora(fresh, tmp_path, expected)
    assert capfd.readouterr() == ("", "") and logging.get_verbosity() == verbosity


def test_what_a_run_loads_back_is_quiet_too_and_no_file_of_another_format(tmp_path, capfd):
    save_pipeline(tiny_pipelines.stable_diffusion(), tmp_path / "base")
    pipeline = load_pipeline(str(tmp_path / "base"))
    loaded = LoadedPipeline(pipeline, str(tmp_path / "base"), Diffusion(), Images())
    probed, model = loaded.probe([{"caption": "a seven"}]), attach(pipeline)
    save_lora(type(pipeline), tmp_path / "lora", model, NAME)
    capfd.readouterr()
    back = loaded.load_back(tmp_path / "lora", model, whole=False)
    assert "CLIPTextModel" not in "".join(capfd.readouterr())
    assert torch.equal(loaded.outputs(back, probed), loaded.outputs(model, probed))
    model.save_pretrained(tmp_path)
    (tmp_path / NAME / "adapter_model.safetensors").rename(tmp_path / NAME / FILE)
    with pytest.raises(RunError, match="took nothing from it"):
        loaded.load_back(tmp_path / NAME, model, whole=False)


def test_it_works_on_a_pipeline_from_files_too(tmp_path):
    save_pipeline(tiny_pipelines.stable_diffusion(), tmp_path / "base")
    pipeline = load_pipeline(str(tmp_path / "base"))
    save_lora(type(pipeline), tmp_path, attach(pipeline), NAME)
    assert verify_lora(load_pipeline(str(tmp_path / "base")), tmp_path, probe(pipeline)) == 0.0


def test_other_adapters_are_left_out(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    model = attach(pipeline)
    expected = probe(pipeline)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False))
    save_lora(type(pipeline), tmp_path, model, NAME)
    assert verify_lora(tiny_pipelines.stable_diffusion(), tmp_path, expected) == 0.0


# ---- the file --------------------------------------------------------------------------------------------------


def test_the_metadata_says_what_matters_and_no_more():
    config = LoraConfig(
        r=4, lora_alpha=10, target_modules=["to_v", "to_k"], lora_dropout=0.1, alpha_pattern={"to_k": 3}
    )
    config.base_model_name_or_path, config.revision = "/home/someone/pipeline", "main"
    assert metadata(config) == {
        "r": 4, "lora_alpha": 10, "target_modules": ["to_k", "to_v"], "lora_dropout": 0.1, "alpha_pattern": {"to_k": 3},
    }  # fmt: skip
    assert metadata(LoraConfig()) == {"r": 8, "lora_alpha": 8, "target_modules": None}


def test_the_file_is_where_diffusers_looks_and_reads_as_any_other(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    model = attach(pipeline)
    save_lora(type(pipeline), tmp_path, model, NAME)
    with safe_open(tmp_path / FILE, "pt") as file:
        found = json.loads(file.metadata()["lora_adapter_metadata"])
        assert file.metadata()["format"] == "pt" and (found["unet.r"], found["unet.lora_alpha"]) == (4, 10)
        key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B"
        weight = model.base_model.model.get_submodule(key)[NAME].weight
        assert torch.equal(file.get_tensor(f"unet.{key}.weight"), weight)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert "lora_A" in next(iter(type(pipeline).lora_state_dict(tmp_path)[0]))


def test_equal_adapters_give_equal_bytes(tmp_path):
    """Without a mended order of the metadata half of the files would differ from the first."""
    pipeline = tiny_pipelines.stable_diffusion()
    model = attach(pipeline, target_modules=["to_k"])
    files = [save_lora(type(pipeline), tmp_path / str(index), model, NAME) for index in range(8)]
    assert len({file.read_bytes() for file in files}) == 1


# ---- traps and refusals ----------------------------------------------------------------------------------------


def test_pefts_own_format_loads_nothing_and_is_found_out(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    base, model = probe(pipeline), attach(pipeline)
    expected = probe(pipeline)
    model.save_pretrained(tmp_path)
    (tmp_path / NAME / "adapter_model.safetensors").rename(tmp_path / FILE)
    fresh = tiny_pipelines.stable_diffusion()
    fresh.load_lora_weights(str(tmp_path), weight_name=FILE)  # without an error
    assert torch.equal(probe(fresh), base)
    with pytest.raises(RunError) as caught:
        verify_lora(tiny_pipelines.stable_diffusion(), tmp_path, expected)
    assert str(caught.value) == (
        f"{tmp_path / FILE}: the pipeline took nothing from it and is still the original model. It is not in the format of "
        "diffusers; write it with save_lora."
    )


def test_an_adapter_for_another_pipeline_is_found_out(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    save_lora(type(pipeline), tmp_path, attach(pipeline), NAME)
    with pytest.raises(RunError, match="took nothing from it"):
        verify_lora(tiny_pipelines.stable_diffusion_3(), tmp_path, torch.zeros(()))


@pytest.mark.parametrize("kind", [DDPMPipeline, DiTPipeline])
def test_a_pipeline_that_loads_no_lora_files_is_refused(kind, tmp_path):
    pipeline = {DDPMPipeline: tiny_pipelines.ddpm, DiTPipeline: tiny_pipelines.dit}[kind]()
    with pytest.raises(RecipeError, match=f"a {kind.__name__} loads no LoRA files. Train without an adapter"):
        save_lora(kind, tmp_path, attach(pipeline), NAME)


def test_what_the_file_cannot_hold_is_refused(tmp_path):
    pipeline = tiny_pipelines.stable_diffusion()
    model = attach(pipeline, modules_to_save=["conv_out"])
    with pytest.raises(
        RunError, match=r"holds more than LoRA matrices \(2 tensors, such as base_model.model.conv_out.bias"
    ):
        save_lora(type(pipeline), tmp_path, model, NAME)
    assert not list(tmp_path.iterdir())


def test_half_precision_is_refused_where_it_trains():
    model = attach(tiny_pipelines.stable_diffusion())
    check_precision(model)
    model.base_model.model.to(torch.float16)
    with pytest.raises(RecipeError) as caught:
        check_precision(model)
    assert "weights that are to be trained are float16, such as base_model.model.down_blocks.0" in str(caught.value)
    assert "in float32" in str(caught.value) and "bf16: true" in str(caught.value)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.float()
    check_precision(model)  # a frozen half-precision base is fine


# ---- sampling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_pipeline_samples_with_the_adapter_in_place(name):
    pipeline = MAKERS[name]()
    size = {"height": 16, "width": 16}

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(["a red seven"], num_inference_steps=2, generator=generator, output_type="pt", **size).images

    base = sample()
    model = attach(pipeline)
    changed = sample()
    with model.disable_adapter():
        disabled = sample()
    assert torch.equal(disabled, base) and distance(changed, base) > 1e-3
    assert torch.equal(sample(), changed)
