"""What a run refuses, survives or leaves alone."""

import pytest
from safetensors.torch import load_file, save_file
from small_run import bytes_and_times, events, execute, files, outcome, stop, write_recipe

from hf_clmul.errors import RecipeError, RunError

LEARN, UNLEARN = "00-learn-people", "01-unlearn-one"
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}


def test_the_base_model_must_stay_the_same(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, "lora"), tmp_path / "out"
    weights = tmp_path / "base" / "model.safetensors"
    first = weights.read_bytes()
    stop(monkeypatch, LEARN, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out)
    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    execute(recipe, out)  # nothing was finished, so it begins again
    assert [e["resumed"] for e in events(out) if e["event"] == "request"] == [False, False, False]
    execute(recipe, tmp_path / "fresh")
    assert outcome(out) == outcome(tmp_path / "fresh")
    weights.write_bytes(first)
    before = bytes_and_times(out)
    with pytest.raises(RunError, match="weights_sha256 of the base model is no longer"):
        execute(recipe, out, "export.merge=true")
    assert bytes_and_times(out) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    recipe, out = write_recipe(tmp_path, "full"), tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="not empty and not a run folder"):
        execute(recipe, out)
    assert files(out) == {"thesis.tex"}
    with pytest.raises(RunError, match="is a file and not a folder"):
        execute(recipe, out / "thesis.tex")


def test_a_collapse_keeps_the_last_checkpoint_and_goes_on_with_a_sane_rate(tmp_path):
    recipe, out = write_recipe(tmp_path, "lora"), tmp_path / "out"
    absurd = "unlearning.training.learning_rate=1e38"
    with pytest.raises(RunError) as caught:
        execute(recipe, out, absurd, "unlearning.forget=grad_ascent")
    message = str(caught.value)
    assert (
        f"request {UNLEARN}: training collapsed at step 2" in message
        and "learning_rate" in message
        and str(out) in message
    )
    assert (out / "requests" / UNLEARN / "checkpoint-1" / "complete").is_file()
    assert not (out / "requests" / UNLEARN / "result.json").exists()
    execute(recipe, out)
    execute(recipe, tmp_path / "fresh")
    assert outcome(out) == outcome(tmp_path / "fresh")


def test_a_task_may_have_any_name(tmp_path):
    """PEFT takes no adapter called `train`, as modules have an attribute of that name."""
    recipe = write_recipe(
        tmp_path, "lora", ("{task: people, data", "{task: train, data"), ("from: people", "from: train")
    )
    execute(recipe, tmp_path / "out")
    assert files(tmp_path / "out/adapters") == {f"train/{name}" for name in ADAPTER}


def test_what_the_trainer_cannot_honour_is_an_error_of_the_recipe(tmp_path):
    recipe = write_recipe(tmp_path, "full")
    with pytest.raises(RecipeError, match=f"request {LEARN}: .*requires non-zero --logging_steps"):
        execute(recipe, tmp_path / "out", "training.logging_steps=0")
