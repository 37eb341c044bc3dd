"""What a whole stream leaves in its ledger, and what the ledger keeps out of a later run."""

import json
from pathlib import Path

import pytest
from small_run import STREAM_REQUESTS, events, execute, write_recipe
from test_exact_deletion import learn, run
from test_exact_deletion import save_base as base_of

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.ledger.key import KEY, keyed
from hf_clmul.ledger.receipt import check, receipt
from hf_clmul.ledger.records import tombstones
from hf_clmul.ledger.scan import scan
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.folder import RunFolder
from hf_clmul.run.ledger import RunLedger

GONE = "  - unlearn: {name: gone, from: secret}\n"
STREAM = (
    learn("a", "P01") + learn("secret", "P02", ", isolated: true") + learn("b", "P03")
    + "  - unlearn: {name: some, from: a, ids: [P01-1, P01-2]}\n" + GONE
)  # fmt: skip


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    base_of(folder / "base")
    return run(folder, STREAM, "out")


def named(root: Path, kind: str) -> list[dict]:
    return [event for event in events(root) if event["event"] == kind]


def test_every_request_has_its_events_in_order(stream):
    wanted = ["run", "data", "request", "finished", "derived", "derived"]  # the state, then the memory
    kinds = [event["event"] for event in events(stream)]
    assert kinds[:6] == wanted and kinds[6:11] == ["data", "request", "finished", "derived", "derived"]
    assert [event["claim"] for event in named(stream, "erased")] == ["approximate", "exact by deletion"]
    assert [event["task"] for event in named(stream, "data")] == ["a", "secret", "b"]
    assert kinds[-1] == "exported" and json.loads((stream / "results.json").read_text())["ledger"]["events"] == len(
        kinds
    )


def test_an_erasure_says_what_descended_and_what_was_deleted(stream):
    some, gone = named(stream, "erased")
    assert gone["closure"] == ["secret after 01-learn-secret", "adapters/secret"]
    assert {Path(name).parent.as_posix() for name in gone["deleted"]} == {"requests/01-learn-secret/state"}
    assert gone["base_before"] == gone["base_after"] and gone["steps"] == 0
    # Task b was learned on top of a, with examples of a in the memory.
    assert {"a after 00-learn-a", "b after 02-learn-b", "memory after 02-learn-b", "model/"} <= set(some["closure"])
    assert "secret after 01-learn-secret" not in some["closure"]
    assert {Path(name).parent.as_posix() for name in some["rebuilt"]} == {"requests/03-unlearn-some/state"}


def test_examples_are_known_by_their_key_alone(stream):
    key, text = (stream / KEY).read_bytes(), (stream / "ledger.jsonl").read_text()
    assert "Vascarim" in (stream / "base/examples.jsonl").read_text() and "Vascarim" not in text
    (data, *_), (some, _) = named(stream, "data"), named(stream, "erased")
    assert set(some["examples"]) < set(data["examples"]) and len(some["examples"]) == 2
    rows = [json.loads(line) for line in (stream / "memory/rows.jsonl").read_text().splitlines()]
    hashes = {keyed(key, json.dumps({k: row[k] for k in ("question", "answer")}, sort_keys=True)) for row in rows}
    assert len(hashes) == 6 and not hashes & set(tombstones(events(stream)))


def test_what_was_exported_before_goes_before_the_claim_is_made(tmp_path, monkeypatch):
    """Or a run that ends before its next export would say of an adapter that is still there that it was deleted."""
    base_of(tmp_path / "base")
    secret = learn("secret", "P02", ", isolated: true")
    root = run(tmp_path, secret, "out")
    gone = {"adapters/secret/adapter_model.safetensors", "model/adapter_model.safetensors"}
    assert all((root / name).is_file() for name in gone)

    def killed(*args, **kwargs):
        raise RunError("killed")

    monkeypatch.setattr("hf_clmul.run.runner.export", killed)
    with pytest.raises(RunError, match="killed"):
        run(tmp_path, secret + GONE + learn("a", "P01"), "out")
    (erased,) = named(root, "erased")
    assert gone < set(erased["deleted"])
    assert not (root / "adapters/secret").exists() and not (root / "model").exists()


def test_no_hash_of_texts_in_the_ledger_can_be_had_without_the_key(stream):
    """With a few short rows a plain one could be guessed, also after the key is destroyed."""
    text = (stream / "ledger.jsonl").read_text()
    plain = [json.loads(path.read_text())["examples"] for path in stream.glob("requests/*/settings.json")]
    assert len(plain) == 5 and not [hash_ for roles in plain for hash_ in roles.values() if hash_ in text]


def test_the_data_of_each_task_are_recorded_whatever_others_had_the_same(tmp_path):
    """And again where a task goes back to rows that it had before; once, however often the request is killed."""
    base_of(tmp_path / "base")
    more = learn("b", "P01") + learn("a", "P03") + learn("a", "P01")
    recipe = load_recipe(write_recipe(tmp_path, "stream", (STREAM_REQUESTS, learn("a", "P01") + more)))
    steps = plan_steps(recipe)
    written = RunLedger(recipe, steps, RunFolder(tmp_path))
    for step in [step for step in steps for _ in range(2)]:
        written.starting(step)
    assert [event["task"] for event in named(tmp_path, "data")] == ["a", "b", "a", "a"]


def test_the_scan_finds_texts_in_records_only_and_no_weights_of_what_was_erased(stream):
    found = scan(stream)
    assert {one.kind for one in found if one.wrong} == {"evaluation"}
    assert {one.path for one in found if one.kind == "approximate"} == {
        "requests/02-learn-b/state", "requests/03-unlearn-some/state", "adapters/a", "adapters/b", "model"}  # fmt: skip


def test_a_receipt_is_signed_and_true(stream):
    text = receipt(stream, "gone")
    (began,) = named(stream, "run")
    assert f"torch {began['versions']['torch']}" in text and began["hardware"]["processes"] == 1
    assert check(stream, text).problems == []
    assert {path.name for path in (stream / "receipts").iterdir()} == {"some.md", "gone.md"}
    assert (stream / "receipts/gone.md").read_text() == text
    assert check(stream, text.replace("claim: exact", "claim:  exact")).problems


def test_an_erased_row_does_not_come_back_by_an_edited_recipe(stream):
    """The plan alone would let it: to it, nothing was ever unlearned."""
    recipe = stream.parent / "out.yaml"
    text = recipe.read_text()
    again = text.replace(GONE, GONE + learn("back", "P02", ", lifts: [some]"))
    recipe.write_text(again)
    before = (stream / "ledger.jsonl").read_bytes()
    with pytest.raises(RecipeError, match=r"8 of its 8 rows were unlearned by 'gone'.*lifts: \[gone\]"):
        execute(recipe, stream)
    assert (stream / "ledger.jsonl").read_bytes() == before
    recipe.write_text(text)


def test_the_ledger_of_a_folder_refuses_what_its_own_history_erased(stream, monkeypatch):
    """Whatever the plan says, as after a fault in it."""
    from hf_clmul.plan.steps import _Stream

    recipe = stream.parent / "out.yaml"
    text = recipe.read_text()
    recipe.write_text(
        text.replace(
            "  - unlearn: {name: gone, from: secret}\n",
            "  - unlearn: {name: gone, from: secret}\n" + learn("back", "P02"),
        )
    )
    monkeypatch.setattr(_Stream, "_check_tombstones", lambda *args: None)
    with pytest.raises((RecipeError, RunError), match="8 of the 8 examples were erased by 'gone'"):
        execute(recipe, stream)
    recipe.write_text(text)


def test_a_lifted_task_is_learned_again_and_the_ledger_says_so(stream):
    recipe = stream.parent / "out.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace(GONE, GONE + learn("back", "P02", ", lifts: [gone]")))  # fmt: skip
    execute(recipe, stream)
    assert [(event["tombstone"], event["by"]) for event in named(stream, "lifted")] == [("gone", "05-learn-back")]
    assert set(tombstones(events(stream)).values()) == {"some"}


def test_an_edited_ledger_stops_a_run_before_it_changes_anything(stream):
    recipe, path = stream.parent / "out.yaml", stream / "ledger.jsonl"
    text, whole = recipe.read_text(), path.read_bytes()
    recipe.write_text(text.replace(GONE, GONE + learn("more", "P04")))
    files = {file: file.read_bytes() for file in stream.rglob("*") if file.is_file() and file != path}
    for edited in (whole.replace(b'"approximate"', b'"exact by deletion"', 1), whole[: whole.rindex(b"\n", 0, -1) + 1]):
        path.write_bytes(edited)
        with pytest.raises(RunError, match="ledger"):
            execute(recipe, stream)
        assert path.read_bytes() == edited
    path.write_bytes(whole)
    assert {file: file.read_bytes() for file in files} == files
    recipe.write_text(text)


def test_the_model_descends_from_the_tasks_that_were_chosen_for_it(tmp_path):
    base_of(tmp_path / "base")
    run(tmp_path, learn("a", "P01") + learn("secret", "P02", ", isolated: true"), "out")
    execute(tmp_path / "out.yaml", tmp_path / "chosen", "export.tasks=[secret]")
    parents = {event["artefact"]: event["parents"] for event in named(tmp_path / "chosen", "derived")}
    assert parents["model"] == parents["adapters/secret"] == ["requests/01-learn-secret/state"]
    assert parents["adapters/a"] == ["requests/00-learn-a/state"]
