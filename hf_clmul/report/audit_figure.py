"""What attacks bring back, drawn by matplotlib: the run beside the reference, with intervals. It knows records and colours, no
pages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_clmul.report.audit import AXES, metrics_of
from hf_clmul.report.figures import Theme, new_figure, panel_title, short
from hf_clmul.report.tables import format_value, metric_label

_DRAWN = 2
"""Panels: more make a figure that is higher than a screen."""
_CURVE = 3
"""Points with a place on the attack's own scale that make a curve; fewer are dots beside their labels."""


def attack_figure(attack: Mapping[str, Any], theme: Theme) -> Figure:
    """The first metrics of an attack, one above the other: curves where its points have an x, else dots for each label."""
    metrics, curve = _drawn(attack), is_curve(attack)
    figure, axes_of = new_figure(theme, 0.9 + 1.5 * len(metrics), len(metrics), share_x=curve)
    for axes, metric in zip(axes_of, metrics, strict=True):
        axes.grid(color=theme.grid, linewidth=0.8)
        for kind, name, colour in (
            ("run", "unlearned", theme.roles["forget"]),
            ("reference", "reference", theme.muted),
        ):
            drawn = [(i, point, point["metrics"].get(metric, {}).get(kind)) for i, point in enumerate(attack["points"])]
            drawn = [
                (i, point, found)
                for i, point, found in drawn
                if found is not None and (point["x"] is not None or not curve)
            ]
            if drawn:
                _draw(axes, drawn, curve, colour, name, kind == "reference")
        panel_title(axes, metric_label(metric), theme)
        _scale(axes, attack, metric)
        if not curve:
            axes.set_xticks(range(len(attack["points"])), [short(p["label"], 18) for p in attack["points"]])
            axes.tick_params(axis="x", labelrotation=25 if len(attack["points"]) > 3 else 0, labelcolor=theme.ink)
            axes.set_xlim(-0.6, len(attack["points"]) - 0.4)
    if curve:
        axes_of[-1].set_xlabel(AXES.get(attack["attack"], "steps"), fontsize=8.5, color=theme.muted)
        axes_of[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes_of[0].legend(fontsize=8, labelcolor=theme.muted, frameon=False, loc="best", handlelength=1.6)
    return figure


def worth_drawing(attack: Mapping[str, Any]) -> bool:
    """Two points are read faster in the table."""
    return len([point for point in attack["points"] if point["metrics"]]) > 2


def is_curve(attack: Mapping[str, Any]) -> bool:
    """Whether the points lie on a scale, such as steps of training; one that sums them up need not."""
    placed = [point for point in attack["points"] if point["x"] is not None]
    return len(placed) >= _CURVE


def _drawn(attack: Mapping[str, Any]) -> list[str]:
    """The first metrics; of a curve, of those that points on its scale have."""
    placed = [point for point in attack["points"] if point["x"] is not None or not is_curve(attack)]
    return metrics_of({"points": placed})[:_DRAWN]


def describe_attack(attack: Mapping[str, Any]) -> str:
    """First and last point of the drawn metrics in words, for those who do not see the figure."""
    parts = []
    for metric in _drawn(attack):
        points = [point for point in attack["points"] if metric in point["metrics"]]
        told = [
            f"{point['label']} {_value(point, metric, 'run')} (reference {_value(point, metric, 'reference')})"
            for point in (points[0], points[-1])
        ]
        parts.append(f"{metric_label(metric)}: {', '.join(told)}")
    return f"{'; '.join(parts)}. The table has all numbers."


def _value(point: Mapping[str, Any], metric: str, kind: str) -> str:
    found = point["metrics"].get(metric, {}).get(kind)
    return format_value(None if found is None else found["value"])


def _draw(axes: Axes, drawn: Sequence[tuple[int, Any, Any]], curve: bool, colour: str, name: str, hollow: bool) -> None:
    x = [point["x"] if curve else i + (0.12 if hollow else -0.12) for i, point, _ in drawn]
    y = [found["value"] for _, _, found in drawn]
    known = [found["low"] is not None and found["high"] is not None for _, _, found in drawn]
    if curve:
        axes.plot(
            x, y, color=colour, linewidth=1.5, marker="o", markersize=3, linestyle="--" if hollow else "-", label=name
        )
        if all(known):
            low, high = ([found[key] for _, _, found in drawn] for key in ("low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        return
    spread = [
        (max(0.0, f["value"] - f["low"]), max(0.0, f["high"] - f["value"])) if there else (0.0, 0.0)
        for (_, _, f), there in zip(drawn, known, strict=True)
    ]
    axes.errorbar(
        x, y, yerr=list(zip(*spread, strict=True)), fmt="o", markersize=5, color=colour, capsize=2, elinewidth=1.0,
        markerfacecolor="none" if hollow else colour, label=name,
    )  # fmt: skip


def _scale(axes: Axes, attack: Mapping[str, Any], metric: str) -> None:
    values = [
        found["value"]
        for point in attack["points"]
        for found in point["metrics"].get(metric, {}).values()
        if found is not None and math.isfinite(found["value"])
    ]
    if values and min(values) >= 0 and max(values) <= 1:  # shares and probabilities all get the same scale
        axes.set_ylim(-0.04, 1.06)
