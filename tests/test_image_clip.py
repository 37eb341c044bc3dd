"""The CLIP of a recipe, with a tiny one of the real class: what it scores, in a run and alone, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_pipelines import stable_diffusion, tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextConfig, CLIPVisionConfig

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.clip import Clip, clip_of
from hf_clmul.evaluation.images.distances import clip_score_of
from hf_clmul.recipe.load import dump_recipe, load_recipe
from hf_clmul.recipe.schema import Images
from hf_clmul.run.runner import run_recipe

RECIPE = """\
recipe_version: 1
name: scored
family: diffusion
model: {path: ./pipeline}
data:
  things: {path: generated, prompts: a cat, images_per_prompt: 2, steps: 2}
  others: {path: generated, prompts: [a dog, a bird], images_per_prompt: 1, steps: 2}
requests:
  - unlearn: {name: cats, from: base, data: things, retain: others}
unlearning:
  forget: {relabel: {anchor: a dog}}
  retain: {denoising: {}}
  conflict: sum
  training: {max_steps: 1, per_device_train_batch_size: 2, use_cpu: true, learning_rate: 1e-2}
evaluation: {images: {per_prompt: 3, steps: 2, shown: 1, clip: ./clip}}
"""


@pytest.fixture
def clip(tmp_path) -> Path:
    """A CLIPModel of 16 x 16 pictures with its processor, saved as on the Hub."""
    words = tokenizer()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=words.model_max_length, **size, **ids)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **size)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8))
    model.save_pretrained(tmp_path / "clip")
    image = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image, words).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_a_loaded_clip_scores_as_its_own_embeddings_say(clip):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found, prompts = Clip(str(clip)), ["a cat", "a dog", "a bird"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    pixels = [(image * 255).round().byte().permute(1, 2, 0).numpy() for image in images]
    inputs = processor(text=prompts, images=pixels, return_tensors="pt", padding=True)
    with torch.no_grad():
        told = model(**inputs)
    wanted = clip_score_of(told.image_embeds, told.text_embeds).tolist()
    assert found(images, prompts, 2) == pytest.approx(wanted, abs=1e-4) and len(set(wanted)) == 3
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_no_clip_by_default():
    assert clip_of(Images()) is None


def test_what_is_no_clip_is_refused(clip, tmp_path):
    with pytest.raises(RecipeError, match="evaluation.images.clip: '.*nowhere' could not be loaded"):
        Clip(str(tmp_path / "nowhere"))
    stable_diffusion().text_encoder.save_pretrained(tmp_path / "text")
    with pytest.raises(RecipeError, match="is a model of type 'clip_text_model'. Give a CLIP"):
        Clip(str(tmp_path / "text"))
    tensors = load_file(clip / "model.safetensors")
    half = {name: tensor for name, tensor in tensors.items() if not name.startswith("vision_model.")}
    save_file(half, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="lacks .* tensors of a CLIPModel, such as vision_model"):
        Clip(str(clip))


def test_a_folder_beside_the_recipe_is_found_and_its_place_not_told(clip, tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "r.yaml").write_text(RECIPE)
    found = load_recipe(tmp_path / "r.yaml")
    assert found.evaluation.images.clip == str(clip)
    assert str(tmp_path) in dump_recipe(found) and str(tmp_path) not in dump_recipe(found, shared=True)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("./clip", "./clap"))
    with pytest.raises(RecipeError, match="evaluation.images.clip: no such file or folder; found './clap'"):
        load_recipe(tmp_path / "r.yaml")


def test_a_run_reports_the_clip_score_of_each_group_beside_the_unmodified_models(clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    stable_diffusion().save_pretrained(tmp_path / "pipeline")
    Path("r.yaml").write_text(RECIPE)
    run_recipe(load_recipe("r.yaml"), tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    for stage, folder in zip(results["stages"], ("base", "requests/00-unlearn-cats"), strict=True):
        rows = [json.loads(line) for line in (tmp_path / "out" / folder / "examples.jsonl").read_text().splitlines()]
        assert [len(row["clip_scores"]) for row in rows] == [3, 3, 3]  # all pictures, though nobody judges them
        assert [len(row["pictures"]) for row in rows] == [1, 1, 1]
        for group in ("forget", "retain"):
            scores = [score for row in rows if row["group"] == group for score in row["clip_scores"]]
            assert stage["groups"][group]["metrics"]["clip_score"] == pytest.approx(sum(scores) / len(scores))
    before, after = (stage["groups"]["retain"]["metrics"]["clip_score"] for stage in results["stages"])
    assert before != after
    assert "CLIP score" in (tmp_path / "out" / "report" / "report.html").read_text()
