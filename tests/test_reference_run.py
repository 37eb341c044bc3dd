"""References as run folders: trained once, continued when killed, put beside the run's figures, and refused where they do not fit."""

import json
import shutil
import signal
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import pytest
from small_run import at_step, events, execute, in_process, outcome, without_report, write_recipe

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation import metrics
from hf_clmul.recipe.load import Recipe, dump_recipe, load_recipe
from hf_clmul.run import closing, retrained, runner
from hf_clmul.run.reference import about_reference, fingerprint, found_reference, found_references, reference_recipe
from hf_clmul.run.retrained import make_references, reference_rows


def made(recipe: Recipe, *args: Any, **kwargs: Any) -> list[tuple[Path, bool]]:
    with patch.object(closing, "write_report", without_report), patch("os.fsync"):
        return list(make_references(recipe, *args, **kwargs))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("nothing is to be trained")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run made before its references, and two references; with the cache that holds them."""
    folder = tmp_path_factory.mktemp("bed")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_CLMUL_CACHE", str(folder / "cache"))
        file = write_recipe(folder, "full")
        execute(file, folder / "run")
        before = results(folder / "run")["reference"]
        first = made(load_recipe(file), seeds=2)
        yield {"folder": folder, "file": file, "recipe": load_recipe(file), "before": before, "made": first}


def test_each_is_trained_once_and_found(bed, monkeypatch):
    recipe, references = bed["recipe"], bed["folder"] / "cache" / "references"
    wanted = [references / fingerprint(recipe, seed) for seed in (1000, 1001)]
    assert bed["made"] == [(place, False) for place in wanted]
    monkeypatch.setattr(runner, "run_recipe", never)
    assert made(recipe, seeds=2) == [(place, True) for place in wanted]
    assert found_references(recipe) == wanted and found_reference(recipe) == wanted[0]
    assert str(wanted[0]) in about_reference(recipe)
    with pytest.raises(AssertionError, match="nothing is to be trained"):
        made(recipe, seed=7)


def test_it_never_trained_on_what_is_forgotten(bed):
    """Its ledger counts what was learned, and its recipe names the rows that a history of the other person alone has."""
    place = bed["made"][0][0]
    assert [(event["task"], event["count"]) for event in events(place) if event["event"] == "data"] == [("people", 8)]
    changes = ["data.people.persons=1", "requests.1.unlearn.where={person: P01}"]
    alone = runner.plan_steps(load_recipe(bed["file"], changes))[0]
    (only,) = runner.plan_steps(load_recipe(place / "recipe.yaml"))
    assert only.digests == alone.digests != runner.plan_steps(bed["recipe"])[0].digests


def test_its_groups_are_those_of_the_run(bed):
    place = bed["made"][0][0]
    mine, own = reference_rows(place), reference_rows(bed["folder"] / "run")
    keys = {group: [(row["id"], row["question"], row["answer"]) for row in rows] for group, rows in own.items()}
    assert {
        group: [(row["id"], row["question"], row["answer"]) for row in rows] for group, rows in mine.items()
    } == keys
    assert len(mine["forget"]) == 8 and mine["forget"][0]["logps"] != own["forget"][0]["logps"]


def test_a_complete_run_gets_it_when_it_is_given_again(bed, tmp_path):
    assert bed["before"] is None
    run = tmp_path / "run"
    shutil.copytree(bed["folder"] / "run", run)
    before = outcome(run)
    with patch.object(runner, "_execute", never):
        execute(bed["file"], run)
    found = results(run)["reference"]
    values = [
        results(place)["stages"][-1]["groups"]["forget"]["metrics"]["answer_probability"] for place, _ in bed["made"]
    ]
    assert found["groups"]["forget"]["answer_probability"] == {"mean": mean(values), "std": stdev(values), "n": 2}
    assert set(found["groups"]) == {"forget", "retain", "held_out"}
    assert found["source"].startswith("small-reference, seeds 1000, 1001, trained 20")
    cards = [(folder / "model" / "README.md").read_text() for folder in (bed["folder"] / "run", run)]
    none = "No figures of a model retrained without the forgotten data are recorded."
    assert [none in text for text in cards] == [True, False] and f"Source: {found['source']}." in cards[1]
    assert "A model retrained without that data has" in cards[1] and events(run)[-1]["source"] == found["source"]
    assert str(bed["folder"]) not in json.dumps(found)
    assert outcome(run) == before and (run / "report" / "report.html").is_file()
    time = (run / "results.json").stat().st_mtime_ns
    execute(bed["file"], run)
    assert (run / "results.json").stat().st_mtime_ns == time, "and nothing changes after that"


def test_suites_that_compare_examples_have_its_rows(bed, tmp_path):
    """Forget quality and the gaps of membership: absent without a reference, a number with one, in a run that was complete
    before and in a new one; the rows of the reference decide them."""
    suites = ["evaluation.suites=[basic,mia,tofu]", "evaluation.reference={}"]
    named = bed["made"][0][0]
    file, run = bed["file"], tmp_path / "run"
    with patch.dict("os.environ", HF_CLMUL_CACHE=str(tmp_path / "empty")):
        execute(file, run, suites[0])
        without = [stage["suites"] for stage in results(run)["stages"]]
        assert all("no such reference is at hand" in each["tofu"]["absent"]["forget_quality"] for each in without)
        assert all(each["mia"]["metrics"]["loss_auc_gap"] is None for each in without)
        with patch.object(runner, "_execute", never), patch("hf_clmul.run.folder.RunFolder.finished", lambda *a: {}):
            execute(file, run, suites[0], suites[1].format(named))
        execute(file, tmp_path / "new", suites[0], suites[1].format(named))
    late, early = ([stage["suites"] for stage in results(root)["stages"]] for root in (run, tmp_path / "new"))
    assert late == early
    rows, own = reference_rows(named), reference_rows(run)
    quality = metrics.forget_quality(*([metrics.truth_ratio(row) for row in each["forget"]] for each in (own, rows)))
    assert late[-1]["tofu"]["metrics"]["forget_quality"] == quality
    assert late[-1]["mia"]["metrics"]["loss_auc_gap"] >= 0 and late[-1]["mia"]["counts"]["loss_auc_gap"] == 10
    assert "forget_quality" not in late[-1]["tofu"]["absent"]


def test_suites_of_no_group_leave_the_fingerprint_as_it_is(bed):
    recipe, asked = bed["recipe"], load_recipe(bed["file"], ["evaluation.suites=[basic,mia,continual]"])
    assert fingerprint(asked) == fingerprint(recipe)
    assert fingerprint(load_recipe(bed["file"], ["evaluation.suites=[basic,tofu]"])) != fingerprint(recipe)
    assert fingerprint(load_recipe(bed["file"], ["evaluation.gradient_norms=true"])) != fingerprint(recipe)


def test_a_new_run_has_it_from_the_start(bed, tmp_path):
    execute(bed["file"], tmp_path / "run", "seed=5", "unlearning.training.max_steps=1")
    assert results(tmp_path / "run")["reference"]["groups"]["forget"]["fluency"]["n"] == 2


def chosen(bed: Any, named: Path | str) -> Any:
    """What a run's record would show with this `evaluation.reference`."""
    recipe = load_recipe(bed["file"], [f"evaluation.reference={named}"])
    steps = runner.plan_steps(recipe)
    return retrained.reference_for(recipe, runner.evaluated(recipe, steps, runner.groups(recipe, steps)))


def test_a_file_wins_a_folder_may_be_named_and_auto_is_the_cache(bed, tmp_path):
    recorded = {"source": "by hand", "groups": {"forget": {"fluency": {"mean": 0.5, "std": 0.1}}}}
    (tmp_path / "figures.json").write_text(json.dumps(recorded))
    assert chosen(bed, tmp_path / "figures.json") == recorded
    assert chosen(bed, "auto")["groups"]["forget"]["fluency"]["n"] == 2
    of_one = chosen(bed, bed["made"][1][0])
    assert of_one["groups"]["forget"]["fluency"].items() >= {"std": None, "n": 1}.items()
    assert of_one["source"].startswith("small-reference, seed 1001, ")
    with pytest.raises(RecipeError, match="a JSON file, a run folder, or auto; found the folder"):
        chosen(bed, tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "running"}, r"not trained to its end \(status 'running'\)"),
        ({"schema": 2}, "expected `schema` 1, found 2"),
        ({"stages": []}, "was not trained to its end"),
        ({"stages": 3}, "is no record of a run: stages: Input should be a valid list"),
    ],
)
def test_a_folder_that_is_no_finished_reference_is_refused(bed, tmp_path, change, reason):
    shutil.copytree(bed["made"][0][0], tmp_path / "odd")
    (tmp_path / "odd" / "results.json").write_text(json.dumps({**results(tmp_path / "odd"), **change}))
    with pytest.raises(RunError, match=reason):
        chosen(bed, tmp_path / "odd")
    with pytest.raises(RunError, match=reason):
        reference_rows(tmp_path / "odd")
    with pytest.raises(RunError, match="no results.json"):
        reference_rows(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("where: {person: [P02]}", "where: {person: [P01]}", r"8 of the run's 8 examples were not measured, such as 'P01-1'"),
        ("where: {person: [P02]}", "ids: [P02-1]", "it measured 7 examples that are none of the run's"),
    ],
)  # fmt: skip
def test_a_reference_of_other_data_is_refused(bed, tmp_path, old, new, reason):
    file = write_recipe(tmp_path, "full", (old, new))
    with pytest.raises(RunError, match=f"is a reference of other data: .*{reason}"):
        chosen({**bed, "file": file}, bed["made"][0][0])


def test_the_same_ids_with_other_texts_are_other_data(bed, tmp_path):
    shutil.copytree(bed["made"][0][0], tmp_path / "odd")
    (rows,) = (tmp_path / "odd" / "requests").glob("*/examples.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    odd = [{**line, "answer": "Another."} if line["id"] == "P02-3" else line for line in lines]
    rows.write_text("".join(json.dumps(line) + "\n" for line in odd))
    with pytest.raises(RunError, match="its example 'P02-3' has another text"):
        chosen(bed, tmp_path / "odd")
    rows.write_text("")
    with pytest.raises(RunError, match="8 of the run's 8 examples were not measured"):
        chosen(bed, tmp_path / "odd")


def test_killed_it_is_continued_by_the_same_command(bed, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    recipe = bed["recipe"]
    place = tmp_path / "cache" / "references" / fingerprint(recipe)
    (tmp_path / "derived.yaml").write_text(dump_recipe(reference_recipe(recipe)))
    assert in_process(at_step, ("00-learn-people", 2), tmp_path / "derived.yaml", place) == -signal.SIGKILL
    assert found_reference(recipe) is None
    assert made(recipe) == [(place, False)] and found_reference(recipe) == place
    assert [event["resumed"] for event in events(place) if event["event"] == "request"] == [False, True]
    assert outcome(place) == outcome(bed["made"][0][0])
