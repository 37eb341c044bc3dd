"""The commands `ledger verify` and `ledger show`, by their words and exit codes."""

import json
import os
import subprocess
import sys

import pytest
from ledger_bed import LATER, STATE, Bed
from test_cli import PROBE
from typer.testing import CliRunner, Result

from hf_clmul.cli import app
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.key import key_path


@pytest.fixture
def bed(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    made = Bed(tmp_path / "small")
    made.run()
    made.learn()
    made.unlearn()
    return made


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["ledger", *map(str, arguments)])


def test_verify_says_what_it_looked_at(bed):
    head = ledger.head(bed.path)
    start = f"{bed.path}: 9 events, unbroken\nhead: {head['hash']}\n"
    assert invoke("verify", bed.root).stdout == (
        start + "no head is remembered in results.json: lines cut off the end would not be noticed\n"
    )
    bed.results()
    whole = start + "nothing is missing of the 9 events that results.json remembers\n"
    found = invoke("verify", bed.root)
    assert (found.exit_code, found.stdout) == (0, whole)
    key_path(bed.path).unlink()
    assert invoke("verify", bed.root).stdout == (
        whole + "ledger.key is gone or another one: the ledger is anonymous, and its examples cannot be recognised\n"
    )


def test_verify_fails_for_a_changed_ledger(bed):
    whole = bed.path.read_bytes()
    bed.results()
    bed.path.write_bytes(whole.replace(b'"count": 4', b'"count": 3'))
    broken = invoke("verify", bed.root)
    assert (broken.exit_code, broken.stdout) == (1, "") and f"{bed.path}:3: the chain of hashes" in broken.stderr
    bed.path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    cut = invoke("verify", bed.root)
    assert cut.exit_code == 1 and "ends after 8 events, but had 9 events before" in cut.stderr


def test_show_is_a_table_with_the_newest_last(bed):
    bed.add("pushed", url="https://host/[b]name[/b]")
    bed.add("odd", number=3, words="so", list=[1])
    found = invoke("show", bed.root)
    assert found.exit_code == 0
    cells = [
        [cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in found.stdout.splitlines()
    ]
    rows = [(row[0], row[2], row[3]) for row in cells if len(row) == 4]
    root, merkle = "5e" * 6, ledger.verify(bed.path)[2]["merkle_root"][:12]
    assert rows == [
        ("n", "event", "what"), ("0", "run", f"2 requests, recipe {root}"),
        ("1", "request", "00-learn-people"),
        ("2", "data", f"people: 4 examples of builtin:people, Merkle root {merkle}"),
        ("3", "derived", f"{STATE} (adapter), from data/people"),
        ("4", "finished", f"00-learn-people: 4 steps, weights {'11' * 6}"),
        ("5", "request", "01-unlearn-two"), ("6", "derived", f"{LATER} (adapter), from {STATE}"),
        ("7", "finished", f"01-unlearn-two: 4 steps, weights {'11' * 6}"),
        ("8", "erased", "two: 2 examples, approximate, 0 files deleted"), ("9", "pushed", "https://host/[b]name[/b]"),
        ("10", "odd", "number: 3, words: so")]  # fmt: skip


def test_show_gives_all_of_it_as_json(bed):
    assert json.loads(invoke("show", bed.root, "--json").stdout) == ledger.records(bed.path)


def test_events_as_an_engine_without_records_wrote_them(tmp_path):
    """No version of the engine must make `show` fail."""
    path = tmp_path / "ledger.jsonl"
    ledger.append(path, "run", recipe_sha256="aa" * 32, base={}, requests=["00-learn-a"], processes=2)
    ledger.append(path, "request", name="00-learn-a", resumed=True, recipe_sha256="aa" * 32, examples={})
    ledger.append(path, "finished", name="00-learn-a", weights_sha256=None)
    ledger.append(path, "exported", kind="full", files={"a": "b"})
    found = invoke("show", tmp_path)
    assert found.exit_code == 0
    assert all(
        words in found.stdout
        for words in ("00-learn-a, resumed", "1 request on 2 processes", "00-learn-a: weights -", "full, 1 files")
    )


@pytest.mark.parametrize("command", ["verify", "show"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, command):
    alone = tmp_path / "alone" / "here"  # without a run beside it that could have been meant
    alone.mkdir(parents=True)
    found = invoke(command, alone)
    assert (found.exit_code, found.stdout) == (1, "")
    assert found.stderr == (
        f"{alone} is not a run folder: there is no ledger.jsonl in it. Give the folder of a run, such as runs/quickstart.\n"
    )


def test_a_results_file_that_is_none_is_refused(bed):
    for content, message in (("{", "is not valid JSON"), ("[]", "holds no record of a run")):
        (bed.root / "results.json").write_text(content)
        found = invoke("verify", bed.root)
        assert found.exit_code == 1 and message in found.stderr


@pytest.mark.parametrize(
    "command", ["ledger verify RUN", "ledger show RUN", "receipt two --run RUN", "scan RUN", "scan RUN --redact"]
)
def test_no_command_needs_a_heavy_package(bed, repo, command):
    bed.delete(STATE)
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *command.replace("RUN", str(bed.root)).split()],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(repo)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")
