"""An audit of a small run and of its reference: what it leaves, what it does not repeat, and what it refuses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from small_recipe import RECIPE, problems
from small_run import events, execute, without_report, write_recipe
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.audit.attacks import ATTACKS
from hf_clmul.evaluation.audit.depth import unlearning_depth
from hf_clmul.evaluation.audit.protocol import AttackEntry, Point
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.ledger.scan import scan
from hf_clmul.ledger.scan_redact import redact
from hf_clmul.report.audit_age import of_earlier_model
from hf_clmul.report.markdown import as_text
from hf_clmul.run import audit as auditing
from hf_clmul.run import closing
from hf_clmul.run.audit import audit_run
from hf_clmul.run.folder import RunFolder

REQUESTS = "  - unlearn: {name: one, from: people, where: {person: [P02]}}\n"
QUICK = ["relearn.steps=3", "relearn.points=1", "relearn.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and another one that learned without what the first forgets."""
    found = []
    gone = ("  strangers:", "  gone: {path: builtin:invented_people, persons: 2, where: {person: [P02]}}\n  strangers:")
    never = (REQUESTS, ""), ("data: people}", "data: people, where: {person: [P01]}}"), gone, (
        "held_out: strangers", "held_out: strangers, forget: gone")  # fmt: skip
    for changes in ((), never):
        place = tmp_path_factory.mktemp("run")
        execute(write_recipe(place, "full", *changes), place / "out")
        found.append(place / "out")
    return found[0], found[1]


@pytest.fixture
def run(finished: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; reports are not drawn, and the cache is empty."""
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(closing, "write_report", without_report)
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def opened(root: Path, *args: Any) -> tuple[dict[str, Any], list[tuple[str, bool]]]:
    """The record, and the models that were opened for it: (folder, is it the run's own)."""
    seen: list[tuple[str, bool]] = []
    original = auditing.prepared

    def prepared(*given: Any) -> Any:
        ready = original(*given)

        def open_(folder: Path, is_run: bool) -> Any:
            seen.append((folder.parent.name, is_run))
            return ready.open(folder, is_run)

        return type(ready)(ready.data, open_, ready.about)

    with patch.object(auditing, "prepared", prepared):
        return audit_run(root, *args), seen


def test_run_and_reference_meet_the_same_attacks_side_by_side(run, finished):
    record = audit_run(run, ["relearn", "quantize", "remove_adapter"], finished[1], QUICK)
    assert record == read_audit(run)
    results = json.loads((run / "results.json").read_text())
    assert not of_earlier_model(run, results, record) and of_earlier_model(run, results, record | {"model_sha256": ""})
    assert [entry["attack"] for entry in record["attacks"]] == ["remove_adapter", "quantize", "relearn"]
    removal, quantized, relearned = record["attacks"]
    assert "no filter" in removal["absent"] and removal["points"] == []
    assert [point["label"] for point in quantized["points"]] == ["before", "int8", "int4", "nf4"]
    assert [(p["label"], p["x"]) for p in relearned["points"]] == [("before", 0.0), ("1 epoch", 2.0), ("3 steps", 3.0)]
    assert relearned["parameters"] == {"epochs": 3, "steps": 3, "learning_rate": 3e-3, "batch_size": 4, "points": 1}
    assert relearned["points"][0]["metrics"] == quantized["points"][0]["metrics"] == record["before"]
    last = relearned["points"][-1]["metrics"]["answer_probability"]
    assert last["run"]["value"] > record["before"]["answer_probability"]["run"]["value"]
    assert last["run"]["n"] == last["gap"]["n"] == 8
    assert last["gap"]["value"] == pytest.approx(abs(last["run"]["value"] - last["reference"]["value"]))
    assert relearned["points"][-1]["samples"][0]["reference"] is not None and record["reference"]["name"] == "small"
    audited = events(run)[-1]
    assert (audited["event"], audited["attacks"], audited["reference"]) == (
        "audited", ["remove_adapter", "quantize", "relearn"], "small")  # fmt: skip


def test_training_that_diverges_ends_its_attack_alone_and_keeps_what_was_measured(run):
    options = ["relearn.learning_rate=1e30", "benign.steps=1", "benign.points=1"]
    diverged, benign = audit_run(run, ["relearn", "benign"], None, options)["attacks"]
    reason = "the fine-tuning diverged at step 3, where its loss is nan; take a smaller learning_rate"
    assert (diverged["stopped"], diverged["absent"]) == (reason, None)
    assert [point["x"] for point in diverged["points"]] == [0.0, 1.0, 2.0]
    assert (benign["stopped"], [point["x"] for point in benign["points"]]) == (None, [0.0, 1.0])
    assert f"relearn: it ended early, {reason}." in read_audit(run)["verdict"]
    _, seen = opened(run, ["relearn", "benign"], None, options)
    assert seen == []


def test_a_stopped_audit_goes_on_and_a_finished_one_changes_nothing(run, finished):
    with patch.dict(ATTACKS), pytest.raises(KeyboardInterrupt):

        def stopped(*args: Any, **options: Any) -> Any:
            raise KeyboardInterrupt

        ATTACKS["relearn"] = type(ATTACKS["relearn"])(stopped, "weights", "causal_lm", "-", "stops")
        with patch.object(auditing, "attack_parameters", lambda name, family: {}):
            opened(run, ["quantize", "relearn"])
    assert read_audit(run) is None
    record, seen = opened(run, ["quantize", "relearn"], None, QUICK)
    assert "none was trained" in record["reference_missing"] and record["reference"] is None
    assert seen[-1] == ("out", True)
    before, told = (run / "audit" / "audit.json").read_bytes(), len(events(run))
    again, seen = opened(run, ["quantize", "relearn"], None, QUICK)
    assert seen == [] and (run / "audit" / "audit.json").read_bytes() == before and len(events(run)) == told
    # A reference that comes later is attacked alone; other options mean another attack.
    _, seen = opened(run, ["quantize", "relearn"], finished[1], QUICK)
    assert seen == [("out", False)] * 3
    _, seen = opened(run, ["quantize", "relearn"], None, [*QUICK, "relearn.batch_size=2"])
    assert seen == [("out", True)]


def test_what_a_kill_left_beside_the_files_of_a_run_is_cleared_away_and_is_no_part_of_its_model(run, monkeypatch):
    record = audit_run(run, ["quantize"])
    (run / "audit" / "audit.json").unlink()
    left = run / "model" / ".README.md.0123abcd.aside", run / "audit" / "attacks" / ".quantize.json.0123abcd.aside"
    for file in left:
        file.write_text("half")
    again, seen = opened(run, ["quantize"])
    assert seen == [] and again["model_sha256"] == record["model_sha256"] and not any(file.exists() for file in left)


def test_a_run_that_never_met_the_examples_says_so_in_its_record_and_its_card(run, finished, tmp_path):
    never = Path(shutil.copytree(finished[1], tmp_path / "never"))
    record = audit_run(never, ["quantize"])
    assert (record["held"], record["scope"]) == (False, record["verdict"][:1]) and read_audit(never) == record
    assert "never met the forgotten examples: no request learned or unlearned them" in record["scope"][0]
    card = (never / "model" / "README.md").read_text()
    assert as_text(record["scope"][0]) in card and as_text(record["verdict"][-1]) in card
    assert record["verdict"][-1].endswith("No forgetting was put to the test.")


def test_a_run_that_unlearned_by_training_is_no_reference(run):
    """Beside itself a run would have no gap at all."""
    with pytest.raises(
        RunError, match=r"has seen what it unlearned \(01-unlearn-one: not exact\).*`hf-clmul reference"
    ):
        audit_run(run, ["quantize"], run, QUICK)
    assert not (run / "audit").exists()


def test_a_reference_without_a_model_is_refused_before_anything_is_measured(run, tmp_path):
    (tmp_path / "odd").mkdir()
    with pytest.raises(
        RunError, match="odd holds neither a run .results.json. nor a model .config.json, adapter_config.json"
    ):
        audit_run(run, ["quantize"], tmp_path / "odd")
    assert not (run / "audit").exists()


def test_a_record_that_cannot_be_read_is_written_anew_from_what_was_kept(run):
    record = audit_run(run, ["quantize"])
    for content in (b"{", b"\xff\xfe", b'{"schema": 2}'):
        (run / "audit" / "audit.json").write_bytes(content)
        again, seen = opened(run, ["quantize"])
        assert seen == [] and read_audit(run) == again
        assert {**again, "created": record["created"]} == record


def test_a_record_that_the_ledger_does_not_tell_of_is_told_the_next_time(run):
    """A kill came between the two: the report of before the audit is still there then."""
    with patch.object(auditing.ledger, "append", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        audit_run(run, ["quantize"])
    assert read_audit(run) and [event["event"] for event in events(run)][-1] == "exported"
    audit_run(run, ["quantize"])
    assert [event["event"] for event in events(run)][-2:] == ["exported", "audited"]


def test_what_an_attack_did_to_a_reference_is_kept_for_other_runs_with_its_seconds(run, finished, tmp_path):
    record, seen = opened(run, ["quantize", "relearn"], finished[1], QUICK)
    assert seen == [("out", True), ("out", False)] * 3
    (cached, *others) = sorted((tmp_path / "cache" / "audits").iterdir())
    assert len(others) == 2  # before, and two attacks
    other = Path(shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("audit")))
    again, seen = opened(other, ["quantize", "relearn"], finished[1], QUICK)
    assert seen == [("other", True)] * 3
    for one, two in zip(record["attacks"], again["attacks"], strict=True):
        assert one["points"] == two["points"] and one["reference_seconds"] == two["reference_seconds"]
    # Other options, other weights, other versions, and a file that is broken: measured again.
    shutil.rmtree(other / "audit")
    _, seen = opened(other, ["relearn"], finished[1], [*QUICK, "relearn.batch_size=2"])
    assert ("out", False) in seen and seen.count(("out", False)) == 1
    changed = Path(shutil.copytree(finished[1], tmp_path / "changed"))
    (changed / "model" / "config.json").write_text((changed / "model" / "config.json").read_text() + "\n")
    _, seen = opened(other, ["quantize"], changed)
    assert seen.count(("changed", False)) == 2
    with patch.object(auditing, "versions", lambda family: {"torch": "0"}):
        _, seen = opened(other, ["quantize"], finished[1])
    assert seen == [("other", True), ("out", False)] * 2
    for file in (cached, *others):
        file.write_text("{")
    shutil.rmtree(other / "audit")
    _, seen = opened(other, ["quantize"], finished[1])
    assert seen == [("other", True), ("out", False)] * 2


def test_redaction_deletes_what_the_cache_has_of_an_audit(run, finished, tmp_path):
    audit_run(run, ["relearn"], finished[1], QUICK)
    cache = tmp_path / "cache" / "audits"
    killed = cache / ".0.json.0123abcd.aside"  # as a kill leaves it, without its end
    killed.write_text(max((file.read_text() for file in cache.iterdir()), key=len)[:-9])
    found = [finding.path for finding in scan(run) if finding.kind == "cache"]
    assert sorted(found) == sorted(f"audits/{file.name}" for file in cache.iterdir()) and len(found) == 3
    redact(run)
    assert not list(cache.iterdir()) and not [finding for finding in scan(run) if finding.kind == "cache"]


def test_a_point_of_both_models_stands_at_the_end_of_the_run(run, finished):
    drops = [[0.5, 1.0], [1.0, 1.0]]  # of two examples: of the run, then of the reference

    def drop(subject: Any, data: Any, seed: int) -> Any:
        yield Point("layer 1 of 1", {"patched_drop": drops.pop(0)}, 1.0)

    entry = AttackEntry(drop, "nothing", "causal_lm", "-", "drops", unlearning_depth)
    with (
        patch.dict(ATTACKS, {"patching": entry}),
        patch.object(auditing, "attack_parameters", lambda name, family: {}),
    ):
        (attack,) = audit_run(run, ["patching"], finished[1])["attacks"]
    layer, both = attack["points"]
    assert (layer["metrics"]["patched_drop"]["run"]["value"], both["label"]) == (0.75, "depth of unlearning")
    depth = both["metrics"]["unlearning_depth"]
    assert (depth["run"]["value"], depth["run"]["n"], depth["reference"], depth["gap"]) == (0.75, 2, None, None)
    assert any("depth of unlearning 0.750" in sentence for sentence in read_audit(run)["verdict"])


def test_an_audit_of_one_attack_takes_back_nothing_that_others_found(run, finished):
    first = audit_run(run, ["relearn"], None, QUICK)
    both = audit_run(run, ["quantize"])
    assert [entry["attack"] for entry in both["attacks"]] == ["quantize", "relearn"] and read_audit(run) == both
    assert both["attacks"][1] == first["attacks"][0]
    assert [s for s in both["verdict"] if s.startswith("relearn: ")] == [
        s for s in first["verdict"] if s.startswith("relearn: ")
    ]
    again = audit_run(run, ["relearn"], None, [*QUICK, "relearn.steps=2"])
    assert [entry["parameters"].get("steps") for entry in again["attacks"]] == [None, 2], (
        "the newer of two takes its place"
    )
    # Beside another reference an attack says other things.
    (alone,) = audit_run(run, ["quantize"], finished[1])["attacks"]
    assert alone["attack"] == "quantize"


def test_the_same_audit_gives_the_same_numbers(run):
    first = audit_run(run, ["relearn"], None, QUICK)
    shutil.rmtree(run / "audit")
    second = audit_run(run, ["relearn"], None, QUICK)
    assert first["before"] == second["before"] and first["verdict"] == second["verdict"]
    assert first["attacks"][0]["points"] == second["attacks"][0]["points"]


def test_other_folders_and_unfinished_runs_are_refused(run, tmp_path):
    with pytest.raises(RunError, match=r"no run folder: there is no results\.json"):
        audit_run(tmp_path / "nowhere")
    with pytest.raises(
        RunError, match=r"neither a run \(results\.json\) nor a model \(config\.json, adapter_config\.json"
    ):
        (tmp_path / "empty").mkdir()
        audit_run(run, ["quantize"], tmp_path / "empty")
    shutil.move(run / "ledger.jsonl", tmp_path / "ledger.jsonl")
    with pytest.raises(RunError, match="the ledger ends after 0 events"):
        audit_run(run, ["quantize"])
    assert not (run / "ledger.jsonl").exists()
    shutil.move(tmp_path / "ledger.jsonl", run / "ledger.jsonl")
    two = patch.object(auditing, "PartialState", lambda: SimpleNamespace(num_processes=2))
    with two, RunFolder(run).locked(), pytest.raises(RunError, match="takes one process"):
        audit_run(run)  # another process has the lock, and what it says is not the trouble
    shutil.move(run / "recipe.yaml", tmp_path / "recipe.yaml")
    with pytest.raises(RunError, match=r"there is no recipe\.yaml"):
        audit_run(run)
    shutil.move(tmp_path / "recipe.yaml", run / "recipe.yaml")
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({**results, "status": "running"}))
    with pytest.raises(RunError, match="is not complete"):
        audit_run(run)


def test_attacks_and_options_that_there_are_not_are_answered_with_the_nearest(run, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="unknown attack 'relern'.*Did you mean 'relearn'"):
        audit_run(run, ["relern"])
    with pytest.raises(RecipeError, match=r"audit\.attacks\.relearn\.step: unknown option.*did you mean 'steps'"):
        audit_run(run, None, None, ["relearn.step=2"])
    monkeypatch.chdir(tmp_path)
    text = RECIPE + "audit:\n  attacks:\n    relearn: {steps: 0}\n    quantise: {}\n  after: true\n"
    Path("notes.jsonl").touch()
    first, second, third = problems(text)
    assert first == "r.yaml:19: audit.attacks.relearn.steps: expected a number of at least 1; found 0"
    assert second.startswith(
        "r.yaml:20: audit.attacks.quantise: unknown attack; expected one of remove_adapter, quantize, "
    )
    assert second.endswith("; found 'quantise'; did you mean 'quantize'?")
    assert third == (
        "r.yaml:21: audit.after: unknown key; expected one of attacks, after_run; found 'after'; did you mean 'after_run'?"
    )


def test_redaction_blanks_what_the_audit_shows_and_keeps_its_figures(run):
    record = audit_run(run, ["relearn"], None, QUICK)
    answer = record["attacks"][0]["points"][0]["samples"][0]["answer"]
    changed = redact(run)
    assert {"audit/audit.json", "audit/attacks/relearn.json"} <= set(changed)
    assert all(answer not in path.read_text() for path in (run / "audit").rglob("*.json"))
    blanked = read_audit(run)
    assert blanked["before"] == record["before"]
    assert blanked["attacks"][0]["points"][0]["samples"][0]["answer"] == "(erased)"


def test_a_recipe_audits_at_the_end_of_its_run_and_the_command_prints_what_came_back(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    root = Path(shutil.copytree(finished[0], tmp_path / "out"))
    recipe = finished[0].parent / "recipe.yaml"
    asked = ("audit.attacks.relearn={steps: 2, points: 1}", "audit.after_run=true")
    execute(recipe, root, *asked)
    with patch.object(closing, "write_report", without_report):
        ended = CliRunner().invoke(app, ["run", str(recipe), *asked, "--output", str(root)])
    assert ended.exit_code == 0, ended.output
    told = " ".join(ended.output.split())
    assert "small: does it come back?" in told and told.index("before attacks") < told.index("Does it come back? ")
    record = read_audit(root)
    assert [entry["attack"] for entry in record["attacks"]] == ["relearn"]
    assert [event["event"] for event in events(root)][-1] == "audited"
    with patch.object(closing, "write_report", without_report):
        shown = CliRunner().invoke(app, ["audit", str(root)])
    assert shown.exit_code == 0, shown.output
    assert "before attacks" in shown.output and "There is no retrained model to compare with" in " ".join(
        shown.output.split()
    )


def test_a_receipt_written_after_an_audit_names_it(run):
    from hf_clmul.ledger.receipt import check, receipt

    before = receipt(run, "one")
    audit_run(run, ["relearn"], None, QUICK)
    after = receipt(run, "one")
    assert "## Audits" not in before
    assert (
        "## Audits of the finished model" in after
        and ": relearn, without a reference; SHA-256 of the record: " in after
        and f"- event {events(run)[-1]['n']}, " in after
        and after == (run / "receipts" / "one.md").read_text()
    )
    assert not check(run, before).problems and not check(run, after).problems


def test_the_card_of_the_model_tells_what_the_last_audit_said_and_what_is_on_the_hub_is_renewed(
    run, finished, monkeypatch
):
    pushed: list[str] = []

    def push(folder: Any, recipe: Any) -> str:
        pushed.append((folder.model / "README.md").read_text())
        return "https://hub/me/model"

    monkeypatch.setattr(closing, "push", push)
    card, recipe = run / "model" / "README.md", finished[0].parent / "recipe.yaml"
    to_hub = "export.push_to_hub=me/model"
    execute(recipe, run, to_hub)
    before = card.read_text()
    assert "## Does it come back?" not in before and "**Unlearning is not erasure.**" in before
    record = audit_run(run, ["relearn", "remove_adapter"], None, QUICK)
    told = card.read_text()
    section = told.split("\n## Does it come back?\n")[1].split("\n## Limits\n")[0]
    assert told.replace(f"## Does it come back?\n{section}\n", "") == before
    assert "without a reference: relearn ([arXiv 2506.12618](https://arxiv.org/abs/2506.12618))." in section
    assert as_text(record["verdict"][-1]) in section and "remove" not in section  # it was not tried
    assert not any(sample["answer"] in section for sample in record["attacks"][1]["points"][0]["samples"])
    audit_run(run, ["relearn"], finished[1], QUICK)
    beside = card.read_text()
    assert "attacked, beside the reference small: relearn" in beside and beside.count("## Does it come back?") == 1
    assert "Source: the audit, which measured small on the same examples." in beside
    for _ in range(2):
        execute(recipe, run, to_hub)
    assert pushed == [before, beside]
