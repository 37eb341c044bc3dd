"""`hf-clmul evaluate`: a finished run measured again gives what the run says; tables are read back; bad input is explained."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from small_run import execute, write_recipe
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.tables import read_table, table_of, write_table
from hf_clmul.families import loaded as measuring
from hf_clmul.run import chunks
from hf_clmul.run.evaluate import evaluate
from hf_clmul.run.evaluation_record import read_evaluation

MORE = (
    "evaluation: {held_out: strangers,",
    "evaluation: {groups: {world_facts: facts}, suites: [basic, tofu], held_out: strangers,",
)
FACTS = ("  strangers:", "  facts: {path: ./facts.jsonl}\n  strangers:")
LAST = "01-unlearn-one"


def results(root: Path) -> dict[str, Any]:
    return json.loads((root / "results.json").read_text())


def made(folder: Path, kind: str) -> Path:
    facts = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}.", "perturbed_answers": ["A lot.", "Nothing."]}
             for i in range(3)]  # fmt: skip
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    return execute(write_recipe(folder, kind, MORE, FACTS), folder / "out").parents[1]


@pytest.fixture(scope="module", params=["full", "lora"])
def run(request, tmp_path_factory) -> Path:
    return made(tmp_path_factory.mktemp(request.param), request.param)


def counted(monkeypatch) -> list[int]:
    seen, measure = [], measuring.measure
    monkeypatch.setattr(
        measuring, "measure",
        lambda model, tokenizer, rows, *rest: seen.append(len(rows["rows"])) or measure(model, tokenizer, rows, *rest),
    )  # fmt: skip
    return seen


def test_a_stage_has_groups_by_name_and_what_is_of_no_single_group(run):
    stage = results(run)["stages"][-1]
    assert {name: group["examples"] for name, group in stage["groups"].items()} == {
        "forget": 8, "retain": 2, "held_out": 2, "world_facts": 2
    }  # fmt: skip
    facts, forget = (stage["groups"][name] for name in ("world_facts", "forget"))
    assert facts["metrics"]["normalised_probability"] > 0 and facts["metrics"]["truth_ratio"] is not None
    assert facts["metrics"]["paraphrase_probability"] == facts["metrics"]["answer_probability"], "as TOFU has it"
    assert forget["counts"]["answer_probability"] == 8 and len(forget["intervals"]["answer_probability"]) == 2
    assert stage["suites"]["tofu"]["metrics"] == {"model_utility": None, "forget_quality": None}
    assert "group `real_authors` was not measured" in stage["suites"]["tofu"]["absent"]["model_utility"]
    adapter = "adapter" in results(run)["name"] or results(run)["export"]["kind"] == "adapter"
    assert (forget["metrics"]["base_perplexity"] is not None) is adapter
    assert ("base_perplexity" in forget["absent"]) is not adapter


def retrained(run, tmp_path):
    """The same run as if its request had been exact: a reference that says just what the run says."""
    place = tmp_path / "retrained"
    shutil.copytree(run, place)
    record = results(place)
    for stage in record["stages"]:
        stage["how"] = stage["how"] and "exact by partial retraining"
    (place / "results.json").write_text(json.dumps(record))
    return place


def test_the_exported_model_is_what_the_run_measured(run, tmp_path, monkeypatch):
    seen = counted(monkeypatch)
    files = evaluate(str(run), suites=["basic", "tofu"], reference=retrained(run, tmp_path))
    assert files == [run / "evaluation" / "basic.json", run / "evaluation" / "tofu.json"] and seen == [14]
    stage = results(run)["stages"][-1]["groups"]
    basic, tofu = map(read_evaluation, files)
    for group, found in basic["groups"].items():
        same = {name: value for name, value in found["metrics"].items() if value is not None}
        assert "answer_probability" in same and same == pytest.approx(
            {n: stage[group]["metrics"][n] for n in same}, rel=1e-4
        )
    assert tofu["suites"]["tofu"]["metrics"]["forget_quality"] == 1.0, "against itself"
    assert tofu["reference"] == "retrained" and tofu["target"] == "out"
    # A second time everything is read back; so is what was measured where only another suite is asked for.
    assert evaluate(str(run), suites=["tofu"]) == [run / "evaluation" / "tofu.json"] and seen == [14]
    assert "no such reference" in read_evaluation(files[1])["suites"]["tofu"]["absent"]["forget_quality"]
    tables = sorted((run / "evaluation" / "tables").iterdir())
    assert [path.name.rsplit("-", 1)[0] for path in tables] == ["forget", "held_out", "retain", "world_facts"]
    assert {row["group"] for row in read_table(tables[0])} == {"forget"}
    # Another setting measures anew and replaces the tables.
    evaluate(str(run), overrides=["evaluation.max_new_tokens=3"], suites=["basic"])
    assert seen == [14, 14] and len(list((run / "evaluation" / "tables").iterdir())) == 4
    tables[0].exists() and pytest.fail("the old table is left")


def test_muse_generates_with_its_own_lengths_and_so_does_the_reference(run, tmp_path, monkeypatch):
    seen, measure, other = [], measuring.measure, retrained(run, tmp_path)

    def counting(model: Any, tokenizer: Any, rows: Any, how: Any, *rest: Any) -> Any:
        seen.append((how.max_new_tokens, len(rows["rows"])))
        return measure(model, tokenizer, rows, how, *rest)

    evaluate(str(run), suites=["basic"])
    monkeypatch.setattr(measuring, "measure", counting)
    (file,) = evaluate(str(run), suites=["muse"], reference=other)
    found = read_evaluation(file)["suites"]["muse"]
    assert seen == [(32, 10), (32, 10)], "questions of forget and retain, of the run and of the reference"
    assert found["metrics"]["knowledge_memorization"] is not None and found["counts"]["knowledge_memorization"] == 8
    assert found["metrics"]["knowledge_memorization_gap"] == found["metrics"]["privleak"] == 0.0, "against itself"
    assert found["absent"]["verbatim_memorization"].startswith("no forgotten row is a passage (column `text`)")
    names = {path.name.rsplit("-", 1)[0] for path in (run / "evaluation" / "tables").iterdir()}
    assert {"forget_knowledge", "retain_knowledge", "reference-forget_knowledge", "reference-retain_knowledge"} <= names
    evaluate(str(run), suites=["muse"], reference=other)
    assert len(seen) == 2, "read back"


def test_continual_measures_nothing_and_is_what_the_record_says(run, monkeypatch):
    seen = counted(monkeypatch)
    entry = read_evaluation(evaluate(str(run), suites=["continual"])[0])["suites"]["continual"]
    stream = results(run)["stream"]["metrics"]
    assert seen == [] and entry["metrics"] == stream and any(value is not None for value in stream.values())
    assert set(entry["absent"]) == {name for name, value in stream.items() if value is None}
    with pytest.raises(RunError, match="the suite continual is of a run's requests: give a run folder"):
        evaluate(str(run / "model"), recipe=str(run / "recipe.yaml"), suites=["continual"])


def test_gradient_norms_are_measured_where_asked_for(run, tmp_path):
    (plain,) = evaluate(str(run), suites=["mia"], output=tmp_path / "plain")
    entry = read_evaluation(plain)["suites"]["mia"]
    assert entry["metrics"]["min_k_plus_plus_auc"] is not None
    assert "`evaluation.gradient_norms: true`" in entry["absent"]["grad_norm_auc"]
    asked = ["evaluation.gradient_norms=true"]
    (file,) = evaluate(str(run), suites=["mia"], overrides=asked, output=tmp_path / "norms")
    assert read_evaluation(file)["suites"]["mia"]["counts"]["grad_norm_auc"] == 10
    (table,) = (tmp_path / "norms" / "tables").glob("forget-*")
    assert all(row["grad_norm"] > 0 for row in read_table(table))


def test_the_harness_is_looked_for_before_anything_is_measured(run, monkeypatch):
    seen = counted(monkeypatch)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match=r'needs lm-evaluation-harness.*pip install "hf_clmul\[lm-eval\]"'):
        evaluate(str(run), suites=["tofu", "lm_eval"], overrides=["evaluation.lm_eval.tasks=[mmlu]"])
    monkeypatch.setattr("hf_clmul.evaluation.lm_eval.harness", lambda: None)
    with pytest.raises(RunError, match="the suite lm_eval has no tasks. Name some"):
        evaluate(str(run), suites=["lm_eval"])
    said = {"tasks": {"wmdp": {"metrics": {"acc": {"value": 0.25, "n": 50, "stderr": 0.1, "low": 0.05, "high": 0.45}}}}}
    monkeypatch.setattr("hf_clmul.evaluation.lm_eval.lm_eval", lambda model, tokenizer, tasks, **asked: said)
    (file,) = evaluate(str(run), suites=["lm_eval"], overrides=["evaluation.lm_eval.tasks=[wmdp]"])
    found = read_evaluation(file)
    assert found["suites"]["lm_eval"] == {
        "metrics": {"wmdp/acc": 0.25}, "counts": {"wmdp/acc": 50}, "intervals": {"wmdp/acc": [0.05, 0.45]}, "absent": {}
    } and found["lm_eval"] == said and seen == []  # fmt: skip


def test_the_command_prints_values_and_reasons(run):
    receipt = next((run / "receipts").glob("*.md"))
    receipt.unlink()
    done = CliRunner().invoke(app, ["evaluate", str(run), "--suites", "tofu"])
    assert done.exit_code == 0, done.output
    told = " ".join(done.output.split())
    assert "Absent: Model utility (All groups): group `real_authors`" in told and "tofu.json" in told
    assert "Suite tofu" in (run / "report" / "report.html").read_text("utf-8").partition('id="evaluations"')[2]
    assert receipt.is_file()


def test_another_model_is_measured_with_a_recipe(run, tmp_path):
    (file,) = evaluate(str(run / "model"), recipe=str(run / "recipe.yaml"), suites=["basic"], output=tmp_path / "there")
    found, stage = read_evaluation(file), results(run)["stages"][-1]["groups"]
    assert file == tmp_path / "there" / "basic.json"
    for group in ("forget", "retain"):
        one, other = found["groups"][group]["metrics"], stage[group]["metrics"]
        assert one["answer_probability"] == pytest.approx(other["answer_probability"], rel=1e-4)


def test_bad_input_is_explained(run, tmp_path):
    with pytest.raises(RunError, match="is not a run folder. Give one, or name the data to measure with: --recipe"):
        evaluate(str(tmp_path))
    with pytest.raises(
        RunError, match="nowhere is not a run folder. Give that of a reference, such as `hf-clmul reference"
    ):
        evaluate(str(run), suites=["basic"], reference=tmp_path / "nowhere")
    with pytest.raises(
        RunError,
        match="there is no suite 'tofuu' for language models; there are: basic, tofu, mia, continual, muse, lm_eval",
    ):
        evaluate(str(run), suites=["tofuu"])
    half = tmp_path / "half"
    half.mkdir()
    (half / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    (half / "results.json").write_text(json.dumps({**results(run), "status": "running"}))
    with pytest.raises(
        RunError, match="half is not complete .*There is no model to measure yet: give `hf-clmul run` again"
    ):
        evaluate(str(half))
    record = json.loads(evaluate(str(run), suites=["basic"])[0].read_text())
    for content, told in (
        ("{", "cannot be read as JSON"),
        (json.dumps({**record, "schema": 0}), "has schema 0"),
        (
            json.dumps({**record, "groups": {"forget": {"metrics": {}}}}),
            "evaluation: groups.forget.examples: Field required",
        ),
    ):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(RunError, match=told):
            read_evaluation(tmp_path / "r.json")
    (table,) = (run / "evaluation" / "tables").glob("forget-*")
    whole = table.read_bytes()
    table.write_bytes(whole[:100])
    with pytest.raises(RunError, match="cannot be read as a table of measured examples"):
        evaluate(str(run), suites=["basic"])
    table.write_bytes(whole)


def test_a_table_of_other_examples_is_not_taken_for_this_groups(run, tmp_path):
    evaluate(str(run), suites=["basic"], output=tmp_path)
    (retain,), (forget,) = ((tmp_path / "tables").glob(f"{name}-*") for name in ("retain", "forget"))
    forget.write_bytes(retain.read_bytes())
    with pytest.raises(RunError, match="has rows of other examples than those of the group 'forget'. Delete it"):
        evaluate(str(run), suites=["basic"], output=tmp_path)
    forget.unlink()
    evaluate(str(run), suites=["basic"], output=tmp_path)


def test_a_run_whose_report_could_not_be_written_is_not_measured_first(run, tmp_path, monkeypatch):
    odd, seen = Path(shutil.copytree(run, tmp_path / "odd")), counted(monkeypatch)
    (odd / "audit").mkdir()
    (odd / "audit" / "audit.json").write_text("{")
    with pytest.raises(RunError, match="audit.json cannot be read as JSON .* Audit the run again"):
        evaluate(str(odd), suites=["basic"], overrides=["evaluation.max_new_tokens=2"])
    (odd / "ledger.jsonl").write_bytes((odd / "ledger.jsonl").read_bytes()[:-40])
    with pytest.raises(RunError, match="lines were cut off its end"):
        evaluate(str(odd), suites=["basic"], overrides=["evaluation.max_new_tokens=2"])
    assert seen == []


def test_a_table_of_another_model_is_not_taken_for_this_ones(run, tmp_path, monkeypatch, caplog):
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "model" / "more.json").write_text("{}")
    for root, name in ((run, "own"), (other, "others")):
        evaluate(str(root), suites=["basic"], output=tmp_path / name)
    (own,), (others,) = ((tmp_path / name / "tables").glob("forget-*") for name in ("own", "others"))
    whole = own.read_bytes()
    assert read_table(own) == read_table(others) and table_of(own) != table_of(others)
    own.write_bytes(others.read_bytes())
    with pytest.raises(
        RunError, match="was measured of another model, or in another way: it is marked .*Delete it"
    ) as caught:
        evaluate(str(run), suites=["basic"], output=tmp_path / "own")
    assert str(own) in str(caught.value) and table_of(others)[:16] in str(caught.value)
    own.write_bytes(whole)
    seen = counted(monkeypatch)
    evaluate(str(run), suites=["basic"], output=tmp_path / "own")
    write_table(read_table(own), own)  # as an earlier version did
    assert seen == [] and table_of(own) is None
    evaluate(str(run), suites=["basic"], output=tmp_path / "own")
    assert seen == [8] and table_of(own) == table_of(next(own.parent.glob("retain-*"))) is not None
    assert [f"{own} is of an earlier version" in record.getMessage() for record in caplog.records] == [True]


def test_a_reference_that_measured_other_examples_is_refused(run, tmp_path):
    other = retrained(run, tmp_path)
    file = other / "requests" / LAST / "examples.jsonl"
    file.write_text(file.read_text().replace('"P02-3"', '"X02-3"'))
    with pytest.raises(RunError, match="is a reference of other data: 1 of the run's 8 examples were not measured"):
        evaluate(str(run), suites=["tofu"], reference=other, output=tmp_path / "out")


def test_a_reference_that_has_seen_the_data_is_refused(run):
    with pytest.raises(
        RunError, match=rf"has seen what it unlearned \({LAST}: not exact\), .* `hf-clmul reference RECIPE`"
    ):
        evaluate(str(run), suites=["tofu"], reference=run)


def test_a_suite_that_finds_no_number_ends_the_command_with_an_error(run, tmp_path):
    arguments = ["evaluate", str(run), "evaluation.held_out=null", "--output", str(tmp_path)]
    found = CliRunner().invoke(app, [*arguments, "--suites", "basic,mia"])
    assert found.exit_code == 1 and "nothing could be measured by mia: the reasons stand" in found.stderr
    assert set(read_evaluation(tmp_path / "mia.json")["suites"]["mia"]["metrics"].values()) == {None}
    assert CliRunner().invoke(app, [*arguments, "--suites", "basic"]).exit_code == 0


def test_a_further_group_that_is_learned_is_refused(tmp_path):
    recipe = write_recipe(tmp_path, "full", ("held_out: strangers,", "groups: {world_facts: people},"))
    with pytest.raises(RecipeError, match=r"evaluation.groups.world_facts: 16 of its examples are learned too"):
        execute(recipe, tmp_path / "out")
    recipe = write_recipe(tmp_path, "full", ("held_out: strangers,", "groups: {retain: strangers, other: nobody},"))
    with pytest.raises(RecipeError) as error:
        execute(recipe, tmp_path / "out")
    assert "evaluation.groups.retain: is a group that every run has; choose another name" in str(error.value)
    assert "evaluation.groups.other: unknown data set" in str(error.value)


# ---- what a kill leaves ----------------------------------------------------------------------------------------------


def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "BATCHES", 1)
    recipe = write_recipe(tmp_path, "lora", ("max_new_tokens: 4", "max_new_tokens: 4, batch_size: 5"))
    execute(recipe, tmp_path / "whole")
    seen, measure = [], measuring.measure

    def killed(model: Any, tokenizer: Any, rows: Any, *rest: Any) -> Any:
        seen.append(len(rows["rows"]))
        if len(seen) == 5:  # two chunks of the second stage are done
            raise KeyboardInterrupt
        return measure(model, tokenizer, rows, *rest)

    monkeypatch.setattr(measuring, "measure", killed)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out)
    base, learned = seen[:3], seen[3:]
    assert base == [5, 5, 2] and learned == [5, 5]
    assert len(list((out / "requests/00-learn-people/measured").iterdir())) == 1
    execute(recipe, out)
    assert seen == [5, 5, 2, 5, 5, 5, 2, 5, 5, 2], "the first chunk of the second stage is read back"
    assert not list(out.rglob("measured"))
    for name in ("base", "requests/00-learn-people", f"requests/{LAST}"):
        assert (out / name / "examples.jsonl").read_text() == (tmp_path / "whole" / name / "examples.jsonl").read_text()


def test_chunks_of_other_weights_or_settings_are_not_taken(tmp_path):
    def one(examples: Any) -> list[dict[str, Any]]:
        return [{"value": e, "by": "one"} for e in examples]

    def stop(examples: Any) -> list[dict[str, Any]]:
        raise KeyboardInterrupt

    def two(examples: Any) -> list[dict[str, Any]]:
        return [{"value": e, "by": "two"} for e in examples]

    assert [row["by"] for row in chunks.measured([1, 2, 3], 2, tmp_path, "a", one)] == ["one"] * 3
    assert [row["by"] for row in chunks.measured([1, 2, 3], 2, tmp_path, "a", stop)] == ["one"] * 3
    assert [row["by"] for row in chunks.measured([1, 2, 3], 2, tmp_path, "b", two)] == ["two"] * 3
    assert [row["by"] for row in chunks.measured([1, 2, 4], 2, tmp_path, "a", two)] == ["one", "one", "two"]
    assert chunks.measured([], 2, tmp_path, "a", stop) == []
    chunks.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_added_suite_is_no_column_of_the_matrix(run):
    assert all(set(found) == {"examples", "rows", "metrics"} for found in results(run)["stages"][-1]["tasks"].values())
