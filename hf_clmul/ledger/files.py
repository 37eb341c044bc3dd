"""Reads the ledger, its key and the results of a run folder, for the commands that look at a run. It writes nothing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_clmul.errors import AGAIN, RunError
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.chain import Head
from hf_clmul.ledger.key import key_id, read_key
from hf_clmul.ledger.records import Event
from hf_clmul.recipe.problems import did_you_mean

LEDGER = "ledger.jsonl"


def find_run(run: Path | None) -> Path:
    """The run folder that a user means: the one named, else this folder, else the only one in runs/. Raises
    RunError."""
    if run is not None:
        return run
    if Path(LEDGER).is_file():
        return Path()
    found = _runs(Path("runs"))
    if len(found) != 1:
        there = f"runs/ holds several: {', '.join(found)}" if found else "there is none in runs/"
        raise RunError(f"Which run? Name its folder with --run; {there}.")
    return Path("runs") / found[0]


def read_events(root: Path) -> list[Event]:
    """The verified events of a run folder, also against the head that its results.json remembers. Raises RunError."""
    return [
        {key: value for key, value in record.items() if key not in ("hash", "previous")}
        for record in read_records(root)
    ]


def read_records(root: Path) -> list[dict[str, Any]]:
    """As `read_events`, each with its hashes."""
    path = root / LEDGER
    if not path.is_file():
        what = "is not a run folder: there is no ledger.jsonl in it" if root.is_dir() else "is no folder"
        meant = did_you_mean(root.name, _runs(root.parent))
        raise RunError(f"{root} {what}. Give the folder of a run, such as runs/quickstart.{meant}")
    return ledger.records(path, remembered_head(root))


def remembered_head(root: Path) -> Head | None:
    """The head of the ledger that results.json remembers; None if it remembers none."""
    return (read_results(root) or {}).get("ledger")


def read_results(root: Path) -> dict[str, Any] | None:
    """results.json of a run folder, or None. Raises RunError if it is broken."""
    path = root / "results.json"
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}). {AGAIN}") from None
    if not isinstance(results, dict):
        raise RunError(f"{path} holds no record of a run. {AGAIN}")
    return results


def key_of(root: Path, events: Iterable[Event]) -> bytes | None:
    """The key that the ledger was written with; None if it is gone, or another file is in its place."""
    key = read_key(root / LEDGER)
    names = [event["key"] for event in events if event.get("key") is not None]
    return key if key is not None and names[-1:] in ([], [key_id(key)]) else None


def _runs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob(f"*/{LEDGER}"))
