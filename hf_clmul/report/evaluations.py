"""From a record of `hf-clmul evaluate` to words and numbers, for a page and for a terminal. It knows nothing of HTML or consoles, and
imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_clmul.evaluation import SUITES
from hf_clmul.evaluation.stream import METRICS as STREAM_METRICS
from hf_clmul.report.tables import (
    Absence,
    absent_once,
    format_interval,
    format_value,
    group_title,
    metric_label,
    metric_meaning,
)

Record = Mapping[str, Any]
ALL = "All groups"


@dataclass(frozen=True)
class Value:
    """One metric; `interval` and `n` are empty where there are none."""

    label: str
    meaning: str
    value: str
    interval: str
    n: str


@dataclass(frozen=True)
class Evaluated:
    """One suite: {group: its values}, and one line for each reason why others are absent."""

    name: str
    meaning: str
    facts: str
    parts: dict[str, tuple[Value, ...]]
    absent: tuple[str, ...]


def evaluated(record: Record, finished: str | None = None) -> Evaluated:
    """`finished` is when the run ended: what was measured before that is of an earlier model."""
    entries = {group_title(group): (group, entry) for group, entry in record["groups"].items()}
    entries |= {ALL if n == record["suite"] else f"{ALL}, {n}": ("", entry) for n, entry in record["suites"].items()}
    parts = {title: _values(entry, group) for title, (group, entry) in entries.items()}
    why = [
        (title, Absence(label(name), reason))
        for title, (_, entry) in entries.items()
        for name, reason in entry.get("absent", {}).items()
        if entry["metrics"].get(name) is None
    ]
    name = record["suite"]
    return Evaluated(
        name,
        SUITES.get(name, ""),
        _facts(record, finished),
        {t: found for t, found in parts.items() if found},
        tuple(absent_once(why)),
    )


def label(metric: str) -> str:
    """Tasks of lm-evaluation-harness are named as it names them."""
    if metric in STREAM_METRICS:
        return STREAM_METRICS[metric].label
    return metric if "/" in metric else metric_label(metric)


def _values(entry: Record, group: str) -> tuple[Value, ...]:
    counts, intervals = entry.get("counts", {}), entry.get("intervals", {})
    return tuple(
        Value(
            label(name),
            STREAM_METRICS[name].formula if name in STREAM_METRICS else metric_meaning(name, group),
            format_value(value),
            format_interval(intervals.get(name)),
            str(counts.get(name, "")),
        )
        for name, value in entry["metrics"].items()
        if value is not None
    )


def _facts(record: Record, finished: str | None) -> str:
    beside = f"beside the reference {record['reference']}" if record["reference"] else "without a reference"
    facts = [f"measured {record['created'][:10]}, {beside}"]
    limit = (record.get("lm_eval") or {}).get("limit")
    if limit is not None:
        facts.append(f"only the first {limit} examples of each task: no result to compare with others")
    if finished is not None and record["created"] < finished:
        facts.append("before the run ended: of an earlier model")
    return "; ".join(facts)
