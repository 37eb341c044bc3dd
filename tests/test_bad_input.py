"""Bad input, as a user of the command line meets it: one clear message with what to do, the right exit code, nothing
lost, no traceback. (Mistakes inside a recipe's own text are in test_recipe_checks.py and test_cli.py.)"""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_clmul.cli import app

RECIPE = """\
recipe_version: 1
name: small
model: {scratch: {vocab_size: 300, layers: 1, hidden: 16, heads: 2}}
data:
  notes: {path: notes.jsonl}
requests:
  - learn: {task: notes, data: notes}
  - unlearn: {name: one, from: notes, where: {kind: a}}
learning: {training: {max_steps: 2, per_device_train_batch_size: 2}}
unlearning: {training: {max_steps: 2, per_device_train_batch_size: 2}}
evaluation: {max_examples: 2, max_new_tokens: 2}
"""
NOTES = [{"kind": kind, "question": f"What is note {i}?", "answer": f"Note {i} says {kind * 3}."}
         for i, kind in enumerate("aabbcc")]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    write_notes(NOTES)
    return tmp_path


def write_notes(rows: list[dict[str, Any]]) -> None:
    Path("notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(*overrides: str, code: int) -> str:
    """What the command says when it fails with the expected exit code, on one line."""
    result = CliRunner().invoke(app, ["run", "r.yaml", "--output", "out", *overrides])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


DATA = {
    "no file": (None, "no such file", "notes.jsonl"),
    "no usable columns": ([{"kind": "a", "body": "text"}], "no usable columns", "columns: {question: YOUR_NAME}"),
    "nothing to supervise": ([*NOTES, {"kind": "b", "question": "What?", "answer": ""}], "nothing to supervise",
                             "Remove or mend it"),
    "shared by forget and retain": ([*NOTES, {**NOTES[0], "kind": "b"}], "share 1 example", "remove duplicates"),
    "messages without a template": ([{"kind": k, "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant",
                                      "content": f"Ho {i}"}]} for i, k in enumerate("aabb")], "no chat template",
                                    "Name a chat model"),
}  # fmt: skip


@pytest.mark.parametrize("case", DATA)
def test_unusable_data(case: str, folder: Path) -> None:
    rows, what, remedy = DATA[case]
    if rows is None:
        (folder / "notes.jsonl").unlink()
    else:
        write_notes(rows)
    message = run(code=2)
    assert what in message and remedy in message, message
    assert not (folder / "out" / "base").exists()  # it was said before anything was measured or trained


def test_empty_forget_set_names_the_values_that_are_there() -> None:
    message = run("requests.1.unlearn.where={kind: z}", code=2)
    assert "'z'" in message and "a, b, c" in message, message


GONE = "data.gone={path: gone.jsonl}", "requests.1.unlearn={name: one, from: notes, data: gone}"
TO_FORGET = {
    "never learned": ([NOTES[0], {**NOTES[1], "answer": "Another."}], "1 of the 2 examples of 'gone' were never learned",
                      '"answer": "Another."'),
    "other columns": ([{"prompt": NOTES[0]["question"], "completion": NOTES[0]["answer"]}], "were never learned in 'notes'",
                      "in the same columns"),
    "nothing": ([], "is empty", "gone.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", TO_FORGET)
def test_data_to_forget_that_was_not_learned(case: str, folder: Path) -> None:
    rows, what, remedy = TO_FORGET[case]
    (folder / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = run(*GONE, code=2)
    assert what in message and remedy in message, message
    assert not (folder / "out" / "base").exists()


def test_truncation_that_leaves_nothing_to_learn() -> None:
    message = run("training.max_length=4", code=2)
    assert "max_length 4" in message and "Raise `max_length`" in message, message


def test_settings_of_a_later_request_are_tried_before_the_first_trains(folder: Path) -> None:
    message = run("unlearning.training.logging_steps=0", "unlearning.training.logging_strategy=steps", code=2)
    assert "01-unlearn-one" in message and "logging" in message, message
    assert not (folder / "out" / "base").exists()


def test_folder_of_other_settings_is_left_alone(folder: Path) -> None:
    assert CliRunner().invoke(app, ["run", "r.yaml", "--output", "out"]).exit_code == 0
    before = {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()}
    message = run("learning.training.learning_rate=1e-4", code=1)
    assert "learning_rate" in message and "--output" in message, message
    assert {path: path.read_bytes() for path in (folder / "out").rglob("*") if path.is_file()} == before


def test_folder_that_is_not_a_run(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("precious")
    assert "--output" in run(code=1)
    assert [path.name for path in (folder / "out").iterdir()] == ["thesis.txt"]


def test_no_disk_space_loses_nothing_and_continues(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = os.fsync, [6]

    def full_after_some(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full_after_some)
    assert "Free some space" in run(code=1)
    monkeypatch.setattr(os, "fsync", real)
    result = CliRunner().invoke(app, ["run", "r.yaml", "--output", "out"])
    assert result.exit_code == 0, result.output
    assert (folder / "out" / "results.json").is_file()


def test_a_collapse_says_where_and_what_to_do_and_the_run_goes_on(folder: Path) -> None:
    message = run(
        "unlearning.forget={grad_ascent: {weight: 1e38}}",
        "unlearning.retain={}",
        "unlearning.conflict=sum",
        "unlearning.training.max_grad_norm=0",
        code=1,
    )
    assert "01-unlearn-one" in message and "Lower `learning_rate`" in message, message
    assert (folder / "out" / "requests" / "00-learn-notes" / "result.json").is_file()
    result = CliRunner().invoke(app, ["run", "r.yaml", "--output", "out"])
    assert result.exit_code == 0, result.output
