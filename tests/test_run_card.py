"""A report that is asked for by itself: written beside the card, never into a folder where another process is at work."""

import subprocess
import sys
from pathlib import Path

import pytest
from fake_audit import fake_audit, write_fake_audit
from fake_results import RECIPE, fake_results, write_fake_run
from filelock import FileLock
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.report.card_audit import with_audit
from hf_clmul.report.model_card import model_card
from hf_clmul.run import card


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, whose card was written before there was a reference; without the report's figures, which take seconds."""

    def write_report(root: Path) -> Path:
        (root / "report").mkdir(exist_ok=True)
        (root / "report" / "report.html").write_text("report")
        return root / "report" / "report.html"

    monkeypatch.setattr(card, "write_report", write_report)
    (tmp_path / "run" / "model").mkdir(parents=True)
    write_fake_run(tmp_path / "run")
    text = model_card(fake_results() | {"reference": None}, RECIPE, "adapter", None)
    (tmp_path / "run" / "model" / "README.md").write_text(text)
    return tmp_path / "run"


def test_it_is_written_with_the_card(folder):
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert (result.exit_code, result.output) == (0, f"report: {folder / 'report' / 'report.html'}\n")
    whole = model_card(fake_results(), RECIPE, "adapter", None)
    assert (folder / "model" / "README.md").read_text() == whole
    write_fake_audit(folder)
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert (folder / "model" / "README.md").read_text() == with_audit(whole, fake_audit())


def test_a_folder_in_use_is_left_alone(folder):
    before = (folder / "model" / "README.md").read_text()
    (folder / "run.holder").write_text("process 7 on here")
    with FileLock(folder / "run.lock"):
        result = CliRunner().invoke(app, ["report", str(folder)])
    assert (
        result.exit_code == 1 and f"{folder} is in use by another run: process 7 on here. Wait until" in result.output
    )
    assert not (folder / "report").exists() and (folder / "model" / "README.md").read_text() == before


def test_the_card_of_an_earlier_model_waits_until_the_run_is_complete_again(folder):
    write_fake_run(folder, fake_results() | {"status": "running", "finished": None})
    before = (folder / "model" / "README.md").read_text()
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert (folder / "model" / "README.md").read_text() == before and (folder / "report" / "report.html").is_file()


def test_what_is_no_run_gets_no_folder_and_no_lock(tmp_path):
    for name in ("none", "file", "empty"):
        place = tmp_path / name
        if name == "file":
            place.write_text("x")
        elif name == "empty":
            place.mkdir()
        result = CliRunner().invoke(app, ["report", str(place)])
        assert result.exit_code == 1 and "Give the folder of a run" in result.output, result.output
    assert not (tmp_path / "none").exists() and not list((tmp_path / "empty").iterdir())


def test_nothing_heavy_is_imported_for_it():
    code = (
        "import sys, hf_clmul.run.card; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
