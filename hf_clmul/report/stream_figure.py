"""The heat map of a stream's matrix R, drawn by matplotlib. It knows records and colours, no pages."""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hf_clmul.report.figures import Theme, short
from hf_clmul.report.stream import FORGOTTEN, LEARNED, cell_state, stream_table
from hf_clmul.report.tables import DASH

_CELL, _LABELS, _WIDEST = 0.62, 2.3, 11.0  # inches
_NUMBERED = 14  # columns; with more, the numbers in the cells would overlap


def heat_map_width(results: Mapping[str, Any]) -> float:
    """Inches of the figure, so that a page can show it at its own size."""
    return min(_WIDEST, max(4.2, _LABELS + _CELL * len(results["stream"]["columns"])))


def heat_map(results: Mapping[str, Any], theme: Theme) -> Figure:
    """R: stages downwards, tasks and forgotten parts across; framed where learned, hatched while forgotten."""
    found = results["stream"]
    matrix, columns = found["matrix"], found["columns"]
    scores = [value for row in matrix for value in row if value is not None and math.isfinite(value)]
    low, high = min([0.0, *scores]), max([1.0, *scores])  # shares and probabilities all get the same scale
    colours = LinearSegmentedColormap.from_list("scores", [theme.surface, theme.roles["retain"]])
    height = 1.2 + min(0.3 * len(matrix), 9.0)
    figure = Figure(figsize=(heat_map_width(results), height), layout="constrained", facecolor=theme.surface)
    axes = figure.subplots()
    axes.set_facecolor(theme.surface)
    gap = 1.5 if len(columns) <= _NUMBERED else 0.3
    # One mesh: a rectangle for each of ten thousand cells would take minutes to draw.
    filled = [[value if value is not None and math.isfinite(value) else math.nan for value in row] for row in matrix]
    axes.pcolormesh(filled, cmap=colours, norm=Normalize(low, high), edgecolors=theme.surface, linewidth=gap)
    for t, row in enumerate(matrix):
        for j, value in enumerate(row):
            shown = value is not None and math.isfinite(value)
            share = Normalize(low, high)(value) if shown else 0.0
            state = cell_state(columns[j], t)
            if state == FORGOTTEN:
                axes.add_patch(Rectangle((j + 0.02, t + 0.03), 0.96, 0.94, **_hatched(theme)))
            if state == LEARNED:
                axes.add_patch(Rectangle((j + 0.04, t + 0.06), 0.92, 0.88, **_framed(theme)))
            if len(columns) <= _NUMBERED:
                ink = theme.surface if share > 0.55 else theme.ink
                behind = {"facecolor": colours(share), "edgecolor": "none", "pad": 2.0} if state == FORGOTTEN else None
                place = {"ha": "center", "va": "center", "fontsize": 8, "color": ink, "bbox": behind}
                axes.text(j + 0.5, t + 0.5, f"{value:.2f}" if shown else DASH, **place)
    _label(axes, results, theme)
    keys = [Patch(**_framed(theme), label="learned by this request"), Patch(**_hatched(theme), label="forgotten")]
    place = {"loc": "outside lower left", "ncols": 2, "frameon": False}
    figure.legend(handles=keys, fontsize=8, labelcolor=theme.muted, handlelength=1.4, **place)
    return figure


def describe_heat_map(results: Mapping[str, Any]) -> str:
    """The figure in words, for those who do not see it."""
    table = stream_table(results)
    first, last = table.rows[0], table.rows[-1]
    if len(table.columns) > _NUMBERED:
        return f"{table.score} of each task after each request, heat map. The table has all numbers."
    parts = [
        f"{name}: {before.value} {first[0]}, {after.value} after {last[0]} ({after.state})"
        for (name, _), before, after in zip(table.columns, first[1], last[1], strict=True)
    ]
    return f"{table.score} of each task after each request, heat map. {'; '.join(parts)}. The table has all numbers."


def _framed(theme: Theme) -> dict[str, Any]:
    return {"facecolor": "none", "edgecolor": theme.ink, "linewidth": 1.4}


def _hatched(theme: Theme) -> dict[str, Any]:
    return {"facecolor": "none", "edgecolor": theme.roles["forget"], "hatch": "//", "linewidth": 0.8}


def _label(axes: Any, results: Mapping[str, Any], theme: Theme) -> None:
    table = stream_table(results)
    axes.set_xlim(0, len(table.columns))
    axes.set_ylim(len(table.rows), 0)
    few = len(table.columns) <= _NUMBERED
    slanted = {
        "rotation": 35 if few else 90,
        "ha": "left" if few else "center",
        "rotation_mode": "anchor" if few else None,
    }
    names = [short(name, 24) for name, _ in table.columns]
    axes.set_xticks([j + 0.5 for j in range(len(names))], names, **slanted)
    axes.set_yticks([t + 0.5 for t in range(len(table.rows))], [short(name, 30) for name, _ in table.rows])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=theme.ink)
    axes.tick_params(axis="x", labelsize=8 if few else 5)
    axes.tick_params(axis="y", labelsize=8 if len(table.rows) <= 30 else 5)
    axes.spines[:].set_visible(False)
