"""From the record of an audit (audit/audit.json) to tables and words of a report. It knows nothing of HTML or figures, of models or
of how attacks work, and imports nothing heavy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.evaluation.audit.verdict import FALLING, asked
from hf_clmul.report.tables import DASH, FORGET, format_interval, format_value, has_unlearned, metric_label

Record = Mapping[str, Any]

TITLES = {
    "relearn": "Relearning what was forgotten",
    "relearn_partly": "Relearning a part, asking for the rest",
    "benign": "Training on related data",
    "unrelated": "Training on unrelated data",
    "quantize": "Quantization",
    "remove_adapter": "Taking the adapter off",
    "remove_direction": "Removing one direction",
    "prefix": "Making it begin the answer",
    "role_play": "Role play",
    "reverse": "Asking the other way round",
    "in_context": "Examples in the prompt",
    "paraphrase": "Other words",
    "sample": "Many samples",
    "logit_lens": "Looking into the layers",
    "patching": "Patching the layers",
    "inversion": "Inverting a token",
}
AXES = {"sample": "answers to each question", "logit_lens": "layer", "patching": "layer"}
"""What the points of an attack are numbered by, where it is not steps of training."""
LONG = 12
"""Points of a table that is folded up: of every layer of a model, say."""
_WAYS = {"weights": "changes the weights", "question": "changes the question", "nothing": "only looks inside"}


Row = tuple[str, tuple[tuple[str, str], ...]]
Sample = tuple[str, str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True)
class AttackTable:
    """One attack. `rows` hold (label, cells), three cells for each of `metrics`: the run, the reference, the gap; the last two only
    where there is a reference. `samples` are (question, true answer, ((after what, what was said), ...)). `absent` says why there
    are no rows, `stopped` why there are no more of them; `said` is what the verdict says of it."""

    name: str
    title: str
    facts: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    samples: tuple[Sample, ...]
    absent: str | None
    stopped: str | None = None
    said: tuple[str, ...] = ()

    @property
    def by_metric(self) -> list[tuple[str, list[Row]]]:
        """(metric, rows with its own cells), without the points that it was not measured at."""
        width = len(self.rows[0][1]) // len(self.metrics) if self.rows and self.metrics else 0
        parts = [
            [(label, cells[i * width : (i + 1) * width]) for label, cells in self.rows]
            for i in range(len(self.metrics))
        ]
        return [
            (metric, [(label, cells) for label, cells in rows if any(value != DASH for value, _ in cells)])
            for metric, rows in zip(self.metrics, parts, strict=True)
        ]

    @property
    def long(self) -> bool:
        return len(self.rows) > LONG


def referenced(results: Record, audit: Record | None) -> Record:
    """The record of a run with the figures of the audit's reference where it has none of its own: of the forget group, and of metrics
    that the audit measured on as many examples."""
    group = results["stages"][-1]["groups"].get(FORGET) if has_unlearned(results) else None
    if results["reference"] is not None or audit is None or audit["reference"] is None or group is None:
        return results
    found = {
        metric: {"mean": entry["reference"]["value"], "std": None}
        for metric, entry in audit["before"].items()
        if entry["reference"] is not None and entry["reference"]["n"] == entry["run"]["n"] == group["examples"]
    }
    if not found:
        return results
    source = f"the audit, which measured {audit['reference']['name']} on the same {asked(audit['before'])}"
    return {**results, "reference": {"groups": {FORGET: found}, "source": source}}


def attack_title(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def metrics_of(attack: Record) -> list[str]:
    """Of its points, in the record's order; one that only mirrors another is left out."""
    found = list(dict.fromkeys(metric for point in attack["points"] for metric in point["metrics"]))
    return [metric for metric in found if metric not in FALLING] or found


def attack_tables(audit: Record) -> list[AttackTable]:
    """One table for each attack of the record, in its order."""
    return [_table(attack, audit["reference"] is not None, audit["verdict"]) for attack in audit["attacks"]]


def shown(estimate: Record | None) -> tuple[str, str]:
    """A value and its interval: ("0.123", "0.100 to 0.150"); a dash for None, and no interval where there is none."""
    if estimate is None:
        return DASH, ""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return format_value(value), format_interval(None if low is None or high is None else (low, high))


def general(audit: Record) -> list[str]:
    """What the verdict says of no single attack."""
    names = {attack["attack"] for attack in audit["attacks"]}
    return [sentence for sentence in audit["verdict"] if sentence.partition(":")[0] not in names]


def _table(attack: Record, referenced: bool, verdict: Sequence[str]) -> AttackTable:
    metrics, lead = metrics_of(attack), f"{attack['attack']}: "
    kinds = ("run", "reference", "gap") if referenced else ("run",)
    rows = tuple(
        (
            point["label"],
            tuple(shown(point["metrics"].get(metric, {}).get(kind)) for metric in metrics for kind in kinds),
        )
        for point in attack["points"]
    )
    return AttackTable(
        name=attack["attack"],
        title=attack_title(attack["attack"]),
        facts=_facts(attack),
        metrics=tuple(map(metric_label, metrics)),
        rows=rows,
        samples=tuple(_samples(attack["points"])),
        absent=attack["absent"],
        stopped=attack.get("stopped"),
        said=tuple(_begun(sentence.removeprefix(lead)) for sentence in verdict if sentence.startswith(lead)),
    )


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _facts(attack: Record) -> str:
    from hf_clmul.report.words import format_bytes, format_seconds

    options = ", ".join(
        f"{name.replace('_', ' ')} {_plain(value)}" for name, value in attack["parameters"].items() if value is not None
    )
    peak, seconds = attack["peak_memory_bytes"], attack["seconds"]
    cost = f"{format_seconds(seconds)}, peak memory {format_bytes(peak)}" if not attack["absent"] else ""
    way = _WAYS.get(attack["changes"], "")
    return "; ".join(part for part in (attack["summary"], way, options, cost) if part)


def _plain(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _samples(points: Iterable[Record]) -> list[Sample]:
    """What was said at the first point and at the last one that asked, and what the reference said there."""
    points = [point for point in points if point["samples"]]
    if not points:
        return []
    first, last = points[0], points[-1]
    shown = first["samples"] if first is not last else []
    same = {(sample["question"], sample["answer"]): sample["generated"] for sample in shown}
    meant = {sample["answer"]: sample["generated"] for sample in shown}  # an attack may ask otherwise
    found: list[Sample] = []
    for sample in last["samples"]:
        said = [(last["label"], sample["generated"])]
        before = same.get((sample["question"], sample["answer"]), meant.get(sample["answer"]))
        if before is not None:
            said.insert(0, (first["label"], before))
        if sample["reference"] is not None:
            said.append((f"reference, {last['label']}", sample["reference"]))
        found.append((sample["question"], sample["answer"], tuple(said)))
    return found
