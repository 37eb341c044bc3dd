"""The section on the audit in a model card, put into a card that was written before there was one. It knows the record and the
card's headings; it shows no examples."""

import re
from collections.abc import Mapping
from typing import Any

from hf_clmul.evaluation.audit.attacks import ATTACKS, PICTURE_ATTACKS
from hf_clmul.evaluation.audit.protocol import AttackEntry
from hf_clmul.evaluation.audit.verdict import asked, verdict
from hf_clmul.report.markdown import as_text, linked

TITLE, NEXT = "## Does it come back?", "## Limits"
_FOLDERS = re.compile(r"(?<![\w.:/~-])~?/(?:[^/\s'\"]+/)*")


def with_audit(card: str, record: Mapping[str, Any]) -> str:
    """The card with the audit's verdict before its limits, in place of that of an earlier audit; all else stays as it was."""
    before, found, rest = card.partition(f"\n{NEXT}\n")
    before, _, _ = before.partition(f"\n{TITLE}\n")
    return f"{before.rstrip()}\n\n{_section(record)}\n{found.lstrip()}{rest}"


def _section(record: Mapping[str, Any]) -> str:
    tried = [attack for attack in record["attacks"] if attack["absent"] is None]
    beside = record["reference"] is not None and f"beside the reference {record['reference']['name']}"
    called = asked(record["before"])
    known = PICTURE_ATTACKS if called == "prompts" else ATTACKS
    names = ", ".join(as_text(attack["attack"]) + _paper(known.get(attack["attack"])) for attack in tried)
    said = verdict(
        record["before"], tried, record["reference_missing"], record.get("scope", ()), record.get("held", True)
    )
    lines = [
        TITLE,
        "",
        f"The finished model was attacked, {as_text(beside or 'without a reference')}: {names or 'no attack could be tried'}.",
        f"In brackets: 95 % intervals over the {called}.",
        "",
        *(f"- {as_text(_FOLDERS.sub('', sentence))}" for sentence in said),
        "",
    ]
    return "\n".join(lines)


def _paper(attack: AttackEntry | None) -> str:
    paper = "-" if attack is None else attack.paper
    return "" if paper == "-" else f" ({linked(paper)})"
