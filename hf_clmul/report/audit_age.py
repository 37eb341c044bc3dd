"""Whether the audit of a run folder is of the model that is there now. From the record of the run, the audit and the
ledger alone: it reads no weights, and knows nothing of pages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.record import model_sha256, read_audit
from hf_clmul.ledger import chain as ledger

Record = Mapping[str, Any]


def current_audit(run: Path, results: Record) -> Record | None:
    """The audit of the model that is there now, if there is one. Raises RunError if it is broken or of another version."""
    audit = read_audit(run)
    return None if of_earlier_model(run, results, audit) else audit


def of_earlier_model(run: Path, results: Record, audit: Record | None) -> bool:
    """Whether the run went on after the audit. Where the ledger does not tell what was exported, the times do."""
    if audit is None:
        return False
    if results["finished"] is None:  # only finished models are audited
        return True
    now = _exported(run, results)
    return audit["created"] < results["finished"] if now is None else audit["model_sha256"] != now


def _exported(run: Path, results: Record) -> str | None:
    """The `model_sha256` of an audit of the last export."""
    try:
        events = ledger.verify(run / "ledger.jsonl")
    except (OSError, RunError):  # a broken ledger is for others to tell of
        return None
    files = next((event["files"] for event in reversed(events) if event["event"] == "exported"), None)
    return None if files is None else model_sha256(files, results["model"]["sha256"])
