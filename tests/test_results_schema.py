"""The results record: docs and types name the same keys, a real run has no others, and what cannot be read is explained."""

import json
import re
import typing
from pathlib import Path

import pytest
from fake_results import fake_results
from pydantic import BaseModel
from small_run import execute, write_recipe

from hf_clmul.errors import RunError
from hf_clmul.run.results_schema import (
    Column,
    Group,
    Results,
    Stage,
    Stream,
    Task,
    complete_record,
    read_record,
    read_stage,
)

NESTED = ("model", "hardware", "export", "ledger", "judged", "reference")


def keys(part: type[BaseModel], nested: tuple[str, ...] = ()) -> set[str]:
    found = set()
    for name, field in part.model_fields.items():
        inner = [t for t in (field.annotation, *typing.get_args(field.annotation)) if isinstance(t, type)]
        below = [t for t in inner if issubclass(t, BaseModel)]
        found |= {f"{name}.{key}" for key in below[0].model_fields} if name in nested else {name}
    return found


def documented(repo: Path) -> dict[str, set[str]]:
    """{line above a table: the keys in its first column}."""
    found: dict[str, set[str]] = {}
    title, lines = "", (repo / "docs" / "results-record.md").read_text("utf-8").splitlines()
    for line in lines:
        if line.startswith("| key"):
            found[title] = set()
        elif line.startswith("| `") and title in found:
            found[title] |= set(re.findall(r"`([^`]+)`", line.split(" | ")[0]))
        elif line.strip() and not line.startswith("|"):
            title = line
    return found


def test_docs_and_types_name_the_same_keys(repo):
    tables = documented(repo)

    def table(words: str) -> set[str]:
        (one,) = (names for title, names in tables.items() if title.startswith(words))
        return one

    assert table("`OUT/results.json`") == keys(Results, NESTED) | {"schema"}
    assert table("A stage") == keys(Stage)
    assert table("A group") == keys(Group)
    assert table("A column of a stage") == keys(Task)
    assert table("`stream` is the matrix") == (keys(Stream) - {"columns"}) | {f"columns.{key}" for key in keys(Column)}


def unknown(part: type[BaseModel], record: dict) -> set[str]:
    return set(record) - set(part.model_fields)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_writes_these_keys_and_no_others(kind, tmp_path):
    root = execute(write_recipe(tmp_path, kind), tmp_path / "out", "evaluation.suites=[basic,tofu,mia]").parents[1]
    record = complete_record(root)
    assert unknown(Results, record) == {"schema"}
    for name in NESTED:
        part = Results.model_fields[name].annotation
        (part,) = [t for t in (part, *typing.get_args(part)) if isinstance(t, type) and issubclass(t, BaseModel)]
        assert not record.get(name) or unknown(part, record[name]) == set(), name
    assert unknown(Stream, record["stream"]) == set()
    for stage in record["stages"]:
        assert unknown(Stage, stage) == set()
        assert all(unknown(Group, group) == set() for group in stage["groups"].values())
        assert all(unknown(Task, task) == set() for task in stage["tasks"].values())
        place = root / "base" if stage["stage"] == "base" else root / "requests" / stage["stage"]
        assert read_stage(place / "result.json") == stage
    (root / "base" / "result.json").write_text('{"stage": "base"}')
    with pytest.raises(RunError, match=r"base.result.json is no record of a run: kind: Field required \(and 7 more\)"):
        execute(tmp_path / "recipe.yaml", root, "evaluation.suites=[basic,tofu,mia]", "seed=0", "name=other")


def test_records_of_earlier_versions_and_with_newer_keys_are_read(tmp_path):
    record = fake_results()
    assert "stream" not in record and "counts" not in record["stages"][0]["groups"]["forget"]
    record["stages"][0]["groups"]["forget"]["newer"] = record["newer"] = 1
    (tmp_path / "results.json").write_text(json.dumps(record))
    assert read_record(tmp_path) == complete_record(tmp_path) == record


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"schema": 2}, "expected `schema` 1, found 2. Another version of hf_clmul wrote it"),
        ({"schema": True}, "expected `schema` 1, found True"),
        (
            {"seed": "0"},
            "is no record of a run: seed: Input should be a valid integer. Delete it and give `hf-clmul run`",
        ),
        ({"stages": [{}]}, "is no record of a run: stages.0.stage: Field required (and 8 more)"),
        ({"status": "done"}, "is no record of a run: status: Input should be 'running' or 'complete'"),
        ({"status": "running"}, "is not complete (status 'running'). Give `hf-clmul run` again, which continues it."),
        ({"stages": []}, "is not complete (status 'complete')"),
    ],
)
def test_what_cannot_be_read_is_explained(change, told, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(fake_results() | change))
    with pytest.raises(RunError, match=re.escape(told)):
        complete_record(tmp_path)


def test_no_record_and_a_damaged_one(tmp_path):
    with pytest.raises(RunError, match="results.json is not there. Give the folder of a run, such as runs/quickstart."):
        read_record(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(RunError, match=r"results.json is not valid JSON .*Delete it and give `hf-clmul run` again"):
        read_record(tmp_path)
    assert read_stage(tmp_path / "result.json") is None
