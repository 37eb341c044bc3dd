"""What counts as finished, whole or changed in a run folder. No model takes part."""

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
from fake_results import fake_results
from small_run import write_recipe

from hf_clmul.errors import RunError
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.folder import RunFolder, mark_complete, settings

BASE = {"weights_sha256": "1", "tokenizer_sha256": "2"}
STAGE = {"stage": "s", "kind": "learn", "title": "t", "seconds": 0.0, "steps": 1, "examples": {}, "how": "", "log": None,
         "groups": {}}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"), "full")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "deep" / "out")


def put(path: Path, content: object = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_damaged_settings_of_a_request_are_named_with_the_remedy(folder, recipe):
    step = opened(folder, recipe)[0]
    for content in ("{", b"\xff\xfe".decode("latin-1")):
        put(folder.request(step) / "settings.json")
        (folder.request(step) / "settings.json").write_text(content)
        with pytest.raises(
            RunError, match=r"settings.json cannot be read as JSON .*Put the file back as it was, or run"
        ):
            opened(folder, recipe)


def test_a_report_that_cannot_be_deleted_is_explained(folder):
    put(folder.report)
    folder.outdate_report()
    folder.outdate_report()
    assert not folder.report.exists()
    folder.report.parent.rmdir()
    put(folder.root / "report")
    with pytest.raises(RunError, match="could not write .*report.html: Not a directory\nA part of the path is a file"):
        folder.outdate_report()


def opened(folder: RunFolder, recipe: Path, *overrides: str, measured: str = "m") -> list:
    """Checked and begun, as a run does; returns the steps."""
    loaded = load_recipe(recipe, overrides)
    steps = plan_steps(loaded)
    folder.check(loaded, steps, measured)
    folder.begin(loaded, steps, BASE)
    return steps


def finish(folder: RunFolder, recipe: Path, count: int, with_state: bool = True) -> list:
    """The base and the first `count` requests as finished ones."""
    loaded = load_recipe(recipe)
    steps = opened(folder, recipe)
    put(folder.base / "result.json", {**STAGE, "measured": "m", **BASE})
    for step in steps[:count]:
        folder.start(loaded, steps, step)
        put(folder.request(step) / "result.json", {**STAGE, "measured": "m"})
        if with_state:
            put(folder.state(step, *step.jobs) / "training.json", {"steps": 1})
    return steps


# ---- checkpoints ---------------------------------------------------------------------------------------------


def test_only_whole_checkpoints_of_as_many_processes_are_used(folder, recipe):
    step = opened(folder, recipe)[0]
    place = folder.request(step)
    assert folder.checkpoint(step, *step.jobs, 1) is None
    for number, processes in ((2, 1), (10, 1), (9, 1), (12, 2)):
        put(place / f"checkpoint-{number}" / "model.safetensors")
        mark_complete(place / f"checkpoint-{number}", processes)
    put(place / "checkpoint-14" / "model.safetensors")
    assert folder.checkpoint(step, *step.jobs, 1) == place / "checkpoint-10"
    assert folder.checkpoint(step, *step.jobs, 2) == place / "checkpoint-12"
    assert folder.checkpoint(step, *step.jobs, 3) is None
    folder.clear_checkpoints(step, *step.jobs, keep=place / "checkpoint-10")
    assert [path.name for path in place.glob("checkpoint-*")] == ["checkpoint-10"]


# ---- what may go on ------------------------------------------------------------------------------------------


def test_a_first_write_that_was_killed_is_no_foreign_folder(folder, recipe):
    put(folder.root / ".recipe.yaml.0123abcd.aside")
    opened(folder, recipe)
    assert [path.name for path in folder.root.iterdir()] == ["recipe.yaml"]


def test_a_folder_is_locked_for_one_run_and_by_no_trace_of_a_killed_one(folder, recipe):
    put(folder.root / "run.lock")
    put(folder.root / "run.holder", "a killed run")
    with folder.locked():
        other = RunFolder(folder.root)
        with (
            pytest.raises(RunError, match=rf"in use by another run: process {os.getpid()} on .*--output"),
            other.locked(),
        ):
            pass
    opened(folder, recipe)
    with folder.locked():
        pass
    assert {path.name for path in folder.root.iterdir()} == {"recipe.yaml", "run.lock"}


def test_killed_writes_are_cleared_away_and_a_lost_folder_is_put_back(folder, recipe):
    steps = finish(folder, recipe, 1)
    state = folder.state(steps[0], *steps[0].jobs)
    state.rename(state.with_name(".state.0123abcd.old"))
    put(folder.root / ".model.0123abcd.aside" / "model.safetensors")
    opened(folder, recipe)
    assert folder.trained(steps[0], *steps[0].jobs) == {"steps": 1}
    assert not list(folder.root.rglob(".*"))


def test_an_unfinished_request_with_other_settings_is_removed_and_a_finished_one_stays(folder, recipe):
    steps = finish(folder, recipe, 1)
    folder.start(load_recipe(recipe), steps, steps[1])
    put(folder.request(steps[1]) / "checkpoint-1" / "x")
    opened(folder, recipe)
    assert (folder.request(steps[1]) / "checkpoint-1").is_dir(), "the same settings: it is resumed"
    opened(folder, recipe, "unlearning.training.max_steps=9")
    assert not folder.request(steps[1]).exists()
    assert folder.result(steps[0]) is not None
    assert load_recipe(folder.recipe).unlearning.training["max_steps"] == 9


@pytest.mark.parametrize("key", ["max_examples=3", "max_new_tokens=5", "held_out=null", "forget=strangers"])
def test_how_it_is_evaluated_leaves_an_unfinished_request_its_checkpoints(folder, recipe, key):
    steps = finish(folder, recipe, 0)
    folder.start(load_recipe(recipe), steps, steps[0])
    put(folder.request(steps[0]) / "checkpoint-1" / "x")
    opened(folder, recipe, f"evaluation.{key}", measured="others")
    assert (folder.request(steps[0]) / "checkpoint-1").is_dir()


def test_an_unfinished_request_that_the_recipe_dropped_is_removed(folder, recipe):
    steps = finish(folder, recipe, 1)
    folder.start(load_recipe(recipe), steps, steps[1])
    opened(folder, recipe, "requests.1.unlearn.name=other")
    assert [path.name for path in folder.requests.iterdir()] == ["00-learn-people"]


def test_settings_of_other_requests_and_of_the_export_do_not_matter(folder, recipe):
    finish(folder, recipe, 1)
    for override in (
        "export.merge=true",
        "evaluation.samples=2",
        "evaluation.max_examples=3",
        "evaluation.max_new_tokens=5",
        "evaluation.batch_size=3",
        "unlearning.conflict=sum",
        "name=new",
        "requests.1.unlearn.where={person: P01}",
    ):
        opened(folder, recipe, override)


@pytest.mark.parametrize(("override", "line"), [
    ("seed=1", "  seed: was 0, is 1"), ("model.scratch.hidden=16", "  model.scratch.hidden: was 32, is 16"),
    ("learning.learn={nll: {weight: 2.0}}", "  terms.learn.nll.weight: was absent, is 2.0"),
    ("training.bf16=true", "  training.bf16: was absent, is True"),
    ("learning.training.num_train_epochs=3", "  training.num_train_epochs: was 2, is 3"),
    ("data.people.persons=3", "  examples.learn: was "),
])  # fmt: skip
def test_other_settings_of_a_finished_request_are_refused_by_name(folder, recipe, override, line):
    finish(folder, recipe, 1)
    before = folder.recipe.read_text()
    with pytest.raises(RunError) as caught:
        opened(folder, recipe, override)
    head, *lines, remedy = str(caught.value).splitlines()
    assert head == f"{folder.root} was made with other settings, and its request 00-learn-people is finished:"
    assert any(found.startswith(line) for found in lines)
    assert remedy == "Choose another folder with --output, or go back to these settings."
    assert folder.recipe.read_text() == before


def test_a_change_before_a_finished_request_is_one_of_its_own(recipe):
    first, second = (load_recipe(recipe, overrides) for overrides in ([], ["learning.training.learning_rate=1"]))
    of = [settings(loaded, plan_steps(loaded), plan_steps(loaded)[1]) for loaded in (first, second)]
    assert of[0]["before"] != of[1]["before"]
    assert {**of[0], "before": ""} == {**of[1], "before": ""}


def test_of_the_forget_set_its_rows_matter_and_not_how_they_are_named(recipe):
    named = "data.gone={path: builtin:invented_people, persons: 2, where: {person: %s}}"
    by_data = "requests.1.unlearn={name: one, from: people, data: gone}"
    by_column, same, other = (
        load_recipe(recipe, overrides) for overrides in ([], [named % "P02", by_data], [named % "P01", by_data])
    )
    of = [settings(loaded, plan_steps(loaded), plan_steps(loaded)[1]) for loaded in (by_column, same, other)]
    assert of[0] == of[1] and of[1]["examples"]["forget"] != of[2]["examples"]["forget"]


def test_another_way_to_evaluate_needs_the_weights(folder, recipe):
    finish(folder, recipe, 1)
    opened(folder, recipe, measured="otherwise")
    step = plan_steps(load_recipe(recipe))[0]
    put(folder.request(step) / "checkpoint-2" / "x")
    assert folder.clear_state(step, *step.jobs) == {
        f"requests/00-learn-people/{name}": sha256(content.encode()).hexdigest()
        for name, content in (("state/training.json", '{"steps": 1}'), ("checkpoint-2/x", '""'))
    }
    assert folder.trained(step, *step.jobs) is None and not list(folder.request(step).glob("checkpoint-*"))
    opened(folder, recipe)
    with pytest.raises(RunError, match="evaluated in another way than before, but the weights after 00-learn-people"):
        opened(folder, recipe, measured="otherwise")


@pytest.mark.parametrize("key", ["weights_sha256", "tokenizer_sha256"])
def test_another_base_model_begins_again_until_something_is_finished(folder, recipe, key):
    loaded = load_recipe(recipe)
    steps = finish(folder, recipe, 0)
    folder.start(loaded, steps, steps[0])
    folder.begin(loaded, steps, BASE)
    assert folder.result(None) is not None and folder.request(steps[0]).exists()
    folder.begin(loaded, steps, {**BASE, key: "other"})
    assert folder.result(None) is None and not folder.request(steps[0]).exists()
    finish(folder, recipe, 1)
    with pytest.raises(RunError, match=f"{key} of the base model is no longer that of the model"):
        folder.begin(loaded, steps, {**BASE, key: "other"})
    assert folder.result(steps[0]) is not None


def test_a_run_is_finished_by_its_own_recipe_only(folder):
    assert folder.finished("a") is None
    complete = {**fake_results(), "recipe_sha256": "a"}
    put(folder.results, complete)
    assert folder.finished("a") is None, "without a model there is nothing to deploy"
    folder.model.mkdir()
    assert folder.finished("a") == complete
    assert folder.finished("b") is None
    put(folder.results, {**complete, "status": "running"})
    assert folder.finished("a") is None
