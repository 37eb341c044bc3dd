"""Two models under the same attack side by side: points with the same label become one, its metrics estimates with their gap. Pure
functions of measured points; which model is which is told by their order."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hf_clmul.evaluation.audit.protocol import SAMPLE, Point
from hf_clmul.evaluation.estimates import Estimate, auc_estimate, auc_gap_estimate, gap_estimate, mean_estimate

Compared = dict[str, dict[str, dict[str, Any] | None]]


def merged(run: Sequence[Point], reference: Sequence[Point] | None, seed: int = 0) -> list[dict[str, Any]]:
    """The points of the run, as the record has them; what the reference has beside them stands where it has the same label."""
    beside = {point.label: point for point in reference or ()}
    return [
        {
            "label": point.label,
            "x": point.x,
            "metrics": compared(point, beside.get(point.label), seed),
            "samples": _samples(point, beside.get(point.label)),
        }
        for point in run
    ]


def compared(run: Point, reference: Point | None, seed: int = 0) -> Compared:
    """{metric: {"run", "reference", "gap"}}, each an estimate or None; metrics of which the run has no value are left out, and so
    are those of a model that an attack destroyed, so that its scores are no finite numbers."""
    found: Compared = {}
    for name, values in run.values.items():
        if not _finite(values):
            continue
        other = reference.values.get(name) if reference is not None else None
        other = other if other is not None and _finite(other) else None
        gap = None if other is None else gap_estimate(values, other, seed)
        _put(found, name, mean_estimate(values, seed), other and mean_estimate(other, seed), gap)
    for name, pair in run.against.items():
        if _not_numbers(pair):
            continue
        other = reference.against.get(name) if reference is not None else None
        other = other if other is not None and not _not_numbers(other) else None
        like = other is not None and [len(side) for side in pair] == [len(side) for side in other]
        gap = auc_gap_estimate(pair, other, seed) if like else None
        _put(found, name, auc_estimate(*pair, seed), auc_estimate(*other, seed) if other is not None else None, gap)
    return found


def _finite(values: Sequence[float | None]) -> bool:
    return all(value is None or math.isfinite(value) for value in values)


def _not_numbers(pair: Sequence[Sequence[float]]) -> bool:
    """Infinite scores have an order, and so an AUC."""
    return any(math.isnan(score) for side in pair for score in side)


def _put(found: Compared, name: str, run: Estimate | None, reference: Estimate | None, gap: Estimate | None) -> None:
    if run is not None:
        parts: Mapping[str, Estimate | None] = {"run": run, "reference": reference or None, "gap": gap}
        found[name] = {part: None if one is None else one.record() for part, one in parts.items()}


def _samples(run: Point, reference: Point | None) -> list[dict[str, Any]]:
    """The run's samples, with what the reference said to the same question."""
    other = {one["question"]: one["generated"] for one in reference.samples} if reference is not None else {}
    keys = ("id", *SAMPLE)
    return [
        {**{key: one[key] for key in keys if key in one}, "reference": other.get(one["question"])}
        for one in run.samples
    ]
