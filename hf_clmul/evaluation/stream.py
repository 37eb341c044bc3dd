"""What a stream of requests did to each task: pure functions of the matrix R. Knows plain data, no models or files.

R[t][j] is the score of column j after request t; row 0 is the model before the first request, n the last row. A
column is a *task*, or the *forgotten* part of one (the rows that one request unlearned). A record ("stream" in
results.json):
    columns   list of {"name", "kind": "task" or "forgotten", "task", "learned": [t, ...], "forgotten": [t, ...]}
    score     str  the metric that R shows
    matrix    [n + 1][columns] of float | None  None where a column was not measured

A task is *known* at t if it was learned up to t and not forgotten whole since; forgotten parts count in `relapse`
alone. Of a known task, l_j is when it was last learned, s_j when it was first learned since it was last forgotten.
Papers number tasks and have one row for each; here also unlearn requests have rows, and a task can be learned twice.
For a stream that learns T tasks once each, the formulas are the papers'. A metric is None where nothing is to be
averaged, and as soon as one number that it needs was not measured: an average over what happens to be there would
mean something else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
TASK, FORGOTTEN = "task", "forgotten"


def stream_record(
    stages: Sequence[Mapping[str, Any]], columns: Sequence[Mapping[str, Any]], score: str
) -> dict[str, Any]:
    """The record of a stream from its stages, base first, as far as they are finished.

    R[t][j] is stages[t]["tasks"][column]["metrics"][score], None if the stage has no such column or no such score.
    """
    matrix = [
        [stage["tasks"].get(column["name"], {"metrics": {}})["metrics"].get(score) for column in columns]
        for stage in stages
    ]
    return {"columns": [dict(column) for column in columns], "score": score, "matrix": matrix}


def average_performance(record: Record, stage: int | None = None) -> float | None:
    """AP_t = mean over known tasks j of R[t][j], for t = `stage`, else n. Also called OP_t."""
    t = _last(record) if stage is None else stage
    return _mean(record["matrix"][t][j] for j, column in _tasks(record) if last_learned(column, t) is not None)


def incremental_average(record: Record) -> float | None:
    """Mean of AP_t over the requests t after which a task is known."""
    known = [t for t in range(1, _last(record) + 1) if any(last_learned(c, t) is not None for _, c in _tasks(record))]
    return _mean(average_performance(record, t) for t in known)


def bwt(record: Record) -> float | None:
    """Backward transfer: mean over known tasks j, learned before the last request, of R[n][j] - R[l_j][j].

    (1/(T-1)) sum over j < T of R[T][j] - R[j][j] (Lopez-Paz and Ranzato, arXiv 1706.08840, section 2). Negative:
    forgetting.
    """
    matrix = record["matrix"]
    return _mean(_minus(matrix[-1][j], matrix[learned][j]) for j, learned in _older(record))


def forgetting(record: Record) -> float | None:
    """Mean over known tasks j, learned before the last request, of (max over s_j <= t < n of R[t][j]) - R[n][j].

    (1/(T-1)) sum over j < T of (max over l < T of R[l][j]) - R[T][j] (Chaudhry et al., arXiv 1801.10112), where the
    maximum leaves out rows from before the task was learned, the base model's among them.
    """
    matrix, found = record["matrix"], []
    for j, _ in _older(record):
        scores = [row[j] for row in matrix[_since(record["columns"][j], _last(record)) : -1]]
        found.append(_minus(_best(scores), matrix[-1][j]))
    return _mean(found)


def fwt_transfer(record: Record) -> float | None:
    """Forward transfer to what is not yet learned: mean over tasks j but the first learned of R[f_j - 1][j] - R[0][j].

    f_j is when task j was first learned: (1/(T-1)) sum over j >= 2 of R[j-1][j] - b_j (arXiv 1706.08840, section 2),
    with the base model's score for b_j. Needs each task's score from just before it is learned.
    """
    matrix, firsts = record["matrix"], _first_learned(record)
    later = {j: first for j, first in firsts.items() if first > min(firsts.values())}
    return _mean(_minus(matrix[first - 1][j], matrix[0][j]) for j, first in later.items())


def fwt_single(record: Record, single: Mapping[str, float | None]) -> float | None:
    """Forward transfer while learning: mean over tasks j of R[f_j][j] - single_j.

    `single` maps a task to its score when it is learned alone (SAPT, arXiv 2401.08295). Not the same quantity as
    `fwt_transfer`, whose name it shares in papers.
    """
    matrix, columns = record["matrix"], record["columns"]
    firsts = _first_learned(record)
    return _mean(_minus(matrix[first][j], single.get(columns[j]["name"])) for j, first in firsts.items())


def relapse(record: Record) -> float | None:
    """Mean over forgotten columns of `relapses`: what later requests brought back. At most 0: it stayed forgotten."""
    return _mean(relapses(record).values())


def relapses(record: Record) -> dict[str, float | None]:
    """Of each column that was forgotten, by name: its best later score minus its score right after forgetting.

    max over f < t < r of R[t][j], minus R[f][j], where r is when the rows were learned again with leave (else n + 1).
    Of a column forgotten more than once, the largest. Columns with no request between f and r are left out. The word
    is UnCLe's.
    """
    found = {}
    for j, column in enumerate(record["columns"]):
        rises = []
        for gone in column["forgotten"]:
            again = min((t for t in column["learned"] if t > gone), default=_last(record) + 1)
            later = [row[j] for row in record["matrix"][gone + 1 : again]]
            if later:
                rises.append(_minus(_best(later), record["matrix"][gone][j]))
        if rises:
            found[column["name"]] = _best(rises)
    return found


@dataclass(frozen=True)
class Metric:
    """A metric of a stream and how it is shown beside its value."""

    label: str
    formula: str
    value: Callable[[Record], float | None]


METRICS: dict[str, Metric] = {
    "average_performance": Metric(
        "Average performance", "mean over known tasks j of R[n][j]", lambda record: average_performance(record)
    ),
    "incremental_average": Metric(
        "Incremental average", "mean over requests t of the average performance after t", incremental_average
    ),
    "bwt_last_minus_learned": Metric("Backward transfer (BWT)", "mean over older tasks j of R[n][j] − R[l_j][j]", bwt),
    "forgetting_best_minus_last": Metric(
        "Forgetting (Chaudhry)", "mean over older tasks j of (max over s_j ≤ t < n of R[t][j]) − R[n][j]", forgetting
    ),
    "fwt_before_minus_base": Metric(
        "Forward transfer (Lopez-Paz)", "mean over tasks j but the first of R[f_j − 1][j] − R[0][j]", fwt_transfer
    ),
    "fwt_learned_minus_single": Metric(
        "Forward transfer (SAPT)",
        "mean over tasks j of R[f_j][j] − the score of task j learned alone",
        lambda record: fwt_single(record, record.get("single", {})),
    ),
    "relapse_best_minus_forgotten": Metric(
        "Relapse",
        "mean over forgotten columns j of (max over later t of R[t][j]) − R[f][j], f: when it was forgotten",
        relapse,
    ),
}


def stream_metrics(record: Record) -> dict[str, float | None]:
    """Every metric of the table above, by a name that says its formula; None where the record does not allow it.

    `fwt_learned_minus_single` reads the scores of tasks learned alone from the record's optional key "single",
    {task: score}.
    """
    return {name: metric.value(record) for name, metric in METRICS.items()}


def last_learned(column: Mapping[str, Any], stage: int) -> int | None:
    """When the column's rows were last learned up to `stage`, None if they are not known then."""
    learned = max((t for t in column["learned"] if t <= stage), default=None)
    return None if learned is None or learned < _forgotten(column, stage) else learned


def _since(column: Mapping[str, Any], stage: int) -> int:
    """When a known column was first learned since it was last forgotten."""
    return min(t for t in column["learned"] if t > _forgotten(column, stage))


def _forgotten(column: Mapping[str, Any], stage: int) -> int:
    return max((t for t in column["forgotten"] if t <= stage), default=-1)


def _tasks(record: Record) -> list[tuple[int, Mapping[str, Any]]]:
    return [(j, column) for j, column in enumerate(record["columns"]) if column["kind"] == TASK]


def _older(record: Record) -> list[tuple[int, int]]:
    """(j, l_j) of the known tasks for which a request came after they were last learned."""
    learned = [(j, last_learned(column, _last(record))) for j, column in _tasks(record)]
    return [(j, t) for j, t in learned if t is not None and t < _last(record)]


def _first_learned(record: Record) -> dict[int, int]:
    """{j: f_j} of the tasks learned so far; a record of an unfinished run names learn requests still to come."""
    firsts = {j: min(column["learned"], default=None) for j, column in _tasks(record)}
    return {j: first for j, first in firsts.items() if first is not None and first <= _last(record)}


def _last(record: Record) -> int:
    return len(record["matrix"]) - 1


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if not values or None in values else sum(values) / len(values)


def _best(values: Sequence[float | None]) -> float | None:
    return None if None in values else max(values)


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other
