"""From the stream in the record of a run to tables of words and numbers, ready to be shown: the matrix R, its
metrics, and what became of each unlearn request. It knows nothing of HTML, consoles or figures, and imports nothing
heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_clmul.evaluation import stream as metrics
from hf_clmul.report.claims import EXACT_BY_DELETION, EXACT_BY_RETRAINING, claim_of
from hf_clmul.report.tables import DASH, format_gap, format_value, metric_label
from hf_clmul.report.words import request_name

UNSEEN, LEARNED, KNOWN, FORGOTTEN = "unseen", "learned", "known", "forgotten"
MARKS = {UNSEEN: "", LEARNED: "*", KNOWN: "", FORGOTTEN: "†"}
LEGEND = "* learned by this request, † forgotten"

_SIGNED = "bwt", "fwt", "forgetting", "relapse"  # differences of scores


@dataclass(frozen=True)
class Cell:
    """A score of R as it is shown, and what the model was to know then: one of the states above."""

    value: str
    state: str

    @property
    def marked(self) -> str:
        return f"{self.value}{MARKS[self.state]}"


@dataclass(frozen=True)
class StreamTable:
    """R. `columns` are (name, note); `rows` are (stage, cells), base first."""

    score: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True)
class StreamMetric:
    """One metric of the stream with its formula."""

    label: str
    value: str
    formula: str


@dataclass(frozen=True)
class Unlearned:
    """What an unlearn request did to one column: scores before it, right after it and at the end, and its relapse."""

    request: str
    how: str
    claim: str | None
    column: str
    before: str
    after: str
    end: str
    relapse: str

    @property
    def exact(self) -> bool:
        return self.claim in (EXACT_BY_DELETION, EXACT_BY_RETRAINING)


def has_stream(results: Mapping[str, Any]) -> bool:
    """Runs of earlier versions have none."""
    return bool(results.get("stream") and results["stream"]["columns"])


def stage_name(stage: Mapping[str, Any]) -> str:
    """Such as "unlearn two-persons"; of the first stage its title."""
    return stage["title"] if stage["kind"] == "base" else f"{stage['kind']} {request_name(stage)}"


def cell_state(column: Mapping[str, Any], stage: int) -> str:
    """What the model was to know of a column after a stage. What is forgotten but never learned, the base knew."""
    if stage in column["learned"]:
        return LEARNED
    if metrics.last_learned(column, stage) is not None:
        return KNOWN
    if any(t <= stage for t in column["forgotten"]):
        return FORGOTTEN
    of_base = column["forgotten"] and not any(t < min(column["forgotten"]) for t in column["learned"])
    return KNOWN if of_base else UNSEEN


def stream_table(results: Mapping[str, Any]) -> StreamTable:
    """R, whatever was not measured a dash."""
    found = results["stream"]
    notes = ("task" if column["kind"] == metrics.TASK else f"part of {column['task']}" for column in found["columns"])
    return StreamTable(
        score=metric_label(found["score"]),
        columns=tuple((column["name"], note) for column, note in zip(found["columns"], notes, strict=True)),
        rows=tuple(
            (
                stage_name(results["stages"][t]),
                tuple(
                    Cell(format_value(value), cell_state(column, t))
                    for column, value in zip(found["columns"], row, strict=True)
                ),
            )
            for t, row in enumerate(found["matrix"])
        ),
    )


def metric_rows(results: Mapping[str, Any]) -> list[StreamMetric]:
    """Every metric of the stream; one that the record does not allow has a dash."""
    values = metrics.stream_metrics(results["stream"])
    return [
        StreamMetric(
            metric.label,
            format_gap(values[name]) if name.startswith(_SIGNED) else format_value(values[name]),
            metric.formula,
        )
        for name, metric in metrics.METRICS.items()
    ]


def unlearned_rows(results: Mapping[str, Any]) -> list[Unlearned]:
    """One row for each unlearn request and column that it forgot; none of a run that only learned."""
    found = results["stream"]
    relapses, rows = metrics.relapses(found), []
    for t, stage in enumerate(results["stages"][: len(found["matrix"])]):
        if stage["kind"] != "unlearn":
            continue
        columns = [(j, column) for j, column in enumerate(found["columns"]) if t in column["forgotten"]]
        for j, column in columns:
            before, after, end = (format_value(found["matrix"][at][j]) for at in (t - 1, t, -1))
            relapse = format_gap(relapses.get(column["name"]))
            rows.append(_unlearned(stage, column["name"], before, after, end, relapse))
        if not columns:
            rows.append(_unlearned(stage, *[DASH] * 5))
    return rows


def _unlearned(stage: Mapping[str, Any], *found: str) -> Unlearned:
    return Unlearned(request_name(stage), stage["how"], claim_of(stage["how"]), *found)
