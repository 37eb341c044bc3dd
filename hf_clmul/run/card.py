"""The card of a finished run's model, kept as its records are now, and the report written anew with it. Knows records and files of a
run folder; imports nothing heavy."""

from pathlib import Path

from hf_clmul.paths import atomic_write
from hf_clmul.report.audit import referenced
from hf_clmul.report.audit_age import current_audit
from hf_clmul.report.card_audit import with_audit
from hf_clmul.report.model_card import with_results
from hf_clmul.report.page import write_report
from hf_clmul.run.folder import COMPLETE, RunFolder
from hf_clmul.run.results_schema import read_record


def report_anew(root: Path) -> Path:
    """Writes the report and the card of a run from its records; returns the path of the report. Raises RunError for a folder that is
    no run or is in use, and for records that cannot be read."""
    read_record(root)  # before the lock, which would make a folder
    folder = RunFolder(root)
    with folder.locked():
        write_card(folder)
        return write_report(root)


def write_card(folder: RunFolder) -> None:
    """The card of the model as the run, its reference and its audit are now. Raises RunError for records that cannot be read."""
    card, own = folder.model / "README.md", read_record(folder.root)
    if own["status"] != COMPLETE or not card.is_file():  # a run that goes on has the model of an earlier recipe
        return
    current = current_audit(folder.root, own)
    old = card.read_text("utf-8")
    new = with_results(old, referenced(own, current))
    new = new if current is None else with_audit(new, current)
    if new != old:
        atomic_write(card, new)
