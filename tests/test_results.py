"""The results record from plain data: times, hardware, the recorded reference."""

import json
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_llama

from hf_clmul.errors import RecipeError
from hf_clmul.models import FAMILIES, adapters
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.results import MORE_PACKAGES, hardware, peak_memory, record, reference_of, versions

STAGES = [{"stage": "base", "weights_sha256": "abc", "groups": {}}]
START = datetime(2025, 3, 1, 9, 30, tzinfo=UTC)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text("recipe_version: 1\nname: x\nmodel: {path: some/model}\ndata: {p: {path: builtin:invented_people}}\n"
                              "requests: [{learn: {task: p, data: p}}]\nevaluation: {reference: ref.json}\n")  # fmt: skip
    Path("ref.json").write_text(
        json.dumps(
            {"groups": {"forget": {"fluency": {"mean": 0.9, "std": 0.1}}}, "source": "docs/results.md", "more": 1}
        )
    )
    return load_recipe("r.yaml")


def event(kind: str, seconds: float, **more: object) -> dict:
    return {"event": kind, "time": (START + timedelta(seconds=seconds)).isoformat(timespec="milliseconds"), **more}


def test_time_counts_all_processes_and_not_the_pauses_between(recipe):
    events = [event("run", 0, processes=1), event("finished", 50), event("run", 1000, processes=1), event("run", 2000, processes=2),
              event("request", 2007.5), event("run", 9000, processes=3), event("finished", 9100)]  # fmt: skip
    found = record(recipe, "sha", STAGES, "running", tiny_llama(), {}, events, time.time() - 20)
    assert found["seconds"] == pytest.approx(50 + 0 + 7.5 + 20, abs=1)
    assert found["created"] == "2025-03-01T09:30:00+00:00"
    assert found["hardware"]["processes"] == 3


def test_the_record_names_what_was_used(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/hf_clmul/__main__.py", "run", "r.yaml"])
    model = tiny_llama()
    model.get_input_embeddings().requires_grad_(False)
    found = record(recipe, "sha", STAGES, "complete", model, {}, [event("run", 0, processes=1)], time.time())
    assert (found["name"], found["status"], found["recipe_sha256"], found["command"]) == (
        "x",
        "complete",
        "sha",
        "hf-clmul run r.yaml",
    )
    parameters = sum(p.numel() for p in model.parameters())
    assert found["model"] == {"family": "causal_lm", "path": "some/model", "sha256": "abc", "parameters": parameters,
                              "trainable_parameters": parameters - 64 * 32, "dtype": "float32"}  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["python"] == sys.version.split()[0]
    assert found["stages"] is STAGES and found["source"] == "r.yaml"
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hf-clmul", "run", "r.yaml"])
    assert (
        record(recipe, "sha", STAGES, "complete", model, {}, [event("run", 0, processes=1)], 0)["command"]
        == "hf-clmul run r.yaml"
    )


def test_adapters_that_wait_count_as_trained(recipe):
    """After an exact deletion nothing trains any more."""
    model = adapters.attach(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]), "one", 0)
    adapters.activate(model, ["one"])
    assert not any(p.requires_grad for p in model.parameters())
    found = record(recipe, "sha", STAGES, "complete", model, {}, [event("run", 0, processes=1)], time.time())
    assert (
        found["model"]["trainable_parameters"]
        == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        > 0
    )


def test_the_hardware_is_this_machine():
    found = hardware("cpu", 2)
    assert (found["device"], found["cores"], found["threads"]) == ("cpu", os.cpu_count(), torch.get_num_threads())
    assert found["cpu"] and found["memory_bytes"] > 2**28
    before = peak_memory()
    block = torch.ones(50_000_000)
    assert peak_memory() >= before and peak_memory() < found["memory_bytes"] and block.numel() * 4 < peak_memory()


def test_the_reference_is_the_recorded_one(recipe):
    assert reference_of(recipe) == {
        "groups": {"forget": {"fluency": {"mean": 0.9, "std": 0.1}}},
        "source": "docs/results.md",
    }
    assert (
        reference_of(recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"reference": None})}))
        is None
    )


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"groups": {}}', None])
def test_an_unreadable_reference_is_explained(recipe, content):
    Path("ref.json").unlink() if content is None else Path("ref.json").write_text(content)
    with pytest.raises(
        RecipeError, match=r"evaluation.reference: .*ref.json cannot be read as a record .* set it to null"
    ):
        reference_of(recipe)


def test_of_a_pipeline_the_record_names_what_it_is(recipe):
    about = {"pipeline": "StableDiffusionPipeline", "component": "unet", "task": "text-to-image"}
    of_pictures = recipe.model_copy(update={"family": "diffusion"})
    found = record(of_pictures, "sha", STAGES, "complete", tiny_llama(), about, [event("run", 0, processes=1)], 0)
    assert found["model"].items() >= {"family": "diffusion", **about}.items()
    assert found["versions"]["diffusers"] == version("diffusers")
    assert "diffusers" not in versions("causal_lm")


def test_every_family_has_its_packages():
    assert set(MORE_PACKAGES) == set(FAMILIES)
