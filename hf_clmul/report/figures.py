"""The figures of a report, drawn by matplotlib without a display. It knows records and colours, but no pages.

Every figure is drawn for a theme, so that it lies well on a light and on a dark page. Importing this module
imports matplotlib.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from hf_clmul.report.tables import (
    DASH,
    format_value,
    group_keys,
    group_title,
    metric_label,
    metric_value,
    reference_entry,
)

Records = Sequence[Mapping[str, float]]

_DPI = 160
_WIDTH = 3.8  # inches: three of them side by side on a wide page, one on a telephone
_RUNNING = 10  # steps of the running mean
_TITLE_OF_TWO_COLUMNS = 28  # characters
_LABELLED_BARS = 15  # with more, the numbers above the bars would overlap


@dataclass(frozen=True)
class Theme:
    """Colours of a page. `surface` lies behind the figure; `roles` are the colours of roles and groups."""

    name: str
    surface: str
    ink: str
    muted: str
    grid: str
    roles: Mapping[str, str]


# After Okabe and Ito's palette, whose colours colour-blind readers can tell apart; lightened on dark.
LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1d2733",
    muted="#5b6775",
    grid="#e3e7ec",
    roles={
        "forget": "#d55e00",
        "retain": "#0072b2",
        "held_out": "#008f68",
        "learn": "#7a4fa3",
        "memory": "#a87900",
    },
)
DARK = Theme(
    name="dark",
    surface="#171c23",
    ink="#e6eaf0",
    muted="#9aa6b4",
    grid="#2c343f",
    roles={
        "forget": "#f0803c",
        "retain": "#4ea6e6",
        "held_out": "#2fbf94",
        "learn": "#b48ede",
        "memory": "#e0b13c",
    },
)


def metric_bars(results: Mapping[str, Any], metric: str, theme: Theme) -> Figure:
    """Bars of one metric: in each group the stages, from pale to full colour, and then the reference."""
    stages, groups = results["stages"], _groups_with(results, metric)
    entries = {group: reference_entry(results, group, metric) for group in groups}
    referenced = any(entries.values())
    bars = len(stages) + referenced
    width = 0.86 / bars
    columns = 2 if all(len(stage["title"]) <= _TITLE_OF_TWO_COLUMNS for stage in stages) else 1
    figure, [axes] = new_figure(theme, 2.3 + 0.2 * math.ceil(bars / columns))
    top = 0.0
    for at, group in enumerate(groups):
        colour = theme.roles.get(group, theme.muted)
        drawn: list[tuple[float | None, float | None, dict[str, Any]]] = [
            (metric_value(stage, group, metric), None, {"color": _tint(colour, theme, i, len(stages))})
            for i, stage in enumerate(stages)
        ]
        if entry := entries[group]:
            drawn.append((entry["mean"], entry.get("std"), _hatched(colour)))
        for i, (value, deviation, style) in enumerate(drawn):
            x = at + (i - (bars - 1) / 2) * width
            height = _bar(axes, x, width, value, deviation, theme, style)
            top = max(top, height)
            if bars * len(groups) <= _LABELLED_BARS and value is not None and math.isfinite(value):
                _number(axes, x, height, value, theme)
    axes.set_xticks(range(len(groups)), [_sized(results, group) for group in groups])
    axes.tick_params(axis="x", labelcolor=theme.ink)
    if top <= 1.1:  # shares and probabilities all get the same scale, with room for the numbers
        axes.set_ylim(0, 1.13)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    panel_title(axes, metric_label(metric), theme, pad=8, size=10)
    keys = [
        Patch(color=_tint(theme.muted, theme, i, len(stages)), label=short(stage["title"]))
        for i, stage in enumerate(stages)
    ]
    keys += [Patch(**_hatched(theme.muted), label="retrained (reference)")] if referenced else []
    place = {"loc": "outside lower left", "ncols": columns, "frameon": False}
    figure.legend(handles=keys, fontsize=8, labelcolor=theme.muted, handlelength=1.4, **place)
    return figure


def loss_curves(records: Records, theme: Theme) -> Figure:
    """Each term's loss over the steps, one above the other, as their scales differ."""
    names = _names(records, "loss/")
    figure, panels = _panels(theme, len(names))
    for axes, name in zip(panels, names, strict=True):
        term = name.removeprefix("loss/")
        _line(axes, records, name, theme.roles.get(term.split("/")[0], theme.muted))
        panel_title(axes, term, theme)
    return figure


def gradient_curves(records: Records, theme: Theme) -> Figure:
    """Each role's gradient norm, and, with several roles, that of their combination before clipping."""
    roles = _names(records, "grad_norm/")
    names = roles if len(roles) == 1 else [*roles, *(n for n in ["grad_norm"] if _points(records, n))]
    figure, [axes] = _panels(theme, 1)
    for name in names:
        role = name.removeprefix("grad_norm/") if name in roles else "combined"
        style = {"linestyle": (0, (4, 2)), "linewidth": 1.1} if roles and name not in roles else {}
        _line(axes, records, name, theme.roles.get(role, theme.muted), label=role, **style)
    values = [value for name in names for _, value in _points(records, name)]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    panel_title(axes, "gradient norm", theme, pad=20 if roles else 6)
    if roles:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 4, "frameon": False}
        axes.legend(fontsize=8, labelcolor=theme.muted, handlelength=1.6, columnspacing=1.4, **place)
    return figure


def conflict_curves(records: Records, theme: Theme) -> Figure:
    """Cosine between the roles' gradients, and how often they conflict."""
    cosines = _names(records, "cosine/")
    figure, [above, below] = _panels(theme, 2)
    styles = ["-", "--", ":", "-."]
    for i, name in enumerate(cosines):
        pair = " and ".join(name.split("/")[1:])
        _line(above, records, name, theme.ink, label=pair, linestyle=styles[i % len(styles)])
    values = [value for name in cosines for _, value in _points(records, name) if math.isfinite(value)]
    above.set_ylim(max(-1.05, min([*values, 0]) - 0.1), min(1.05, max([*values, 0]) + 0.1))
    above.axhspan(-1.05, 0, color=theme.roles["forget"], alpha=0.10, linewidth=0)
    above.axhline(0, color=theme.muted, linewidth=0.8)
    panel_title(above, f"cosine of {pair if len(cosines) == 1 else 'the roles'} (shaded: conflict)", theme)
    if len(cosines) > 1:
        above.legend(loc="best", frameon=False, fontsize=8, labelcolor=theme.muted)
    points = _points(records, "conflict_rate")
    steps, rates = [step for step, _ in points], [rate for _, rate in points]
    below.plot(steps, rates, ".", markersize=4, color=theme.muted, alpha=0.7)
    below.plot(steps, _running_mean(rates), color=theme.roles["forget"], linewidth=1.6)
    below.set_ylim(-0.06, 1.06)
    panel_title(below, f"conflict rate (line: mean of {_RUNNING} points)", theme)
    return figure


def trade_off_curve(records: Records, theme: Theme) -> Figure:
    """The path of training: the first forget term's loss against the first retain term's, from its first step (hollow) to its last."""
    forget, retain = (_names(records, f"loss/{role}/")[0] for role in ("forget", "retain"))
    kept = dict(_points(records, retain))
    points = [(value, kept[step]) for step, value in _points(records, forget) if step in kept]
    figure, [axes] = new_figure(theme, 2.7)
    axes.grid(color=theme.grid, linewidth=0.8)
    x, y = [a for a, _ in points], [b for _, b in points]
    axes.plot(x, y, color=theme.muted, linewidth=0.9, alpha=0.8)
    axes.scatter(x, y, s=12, c=range(len(points)), cmap=_ramp(theme), zorder=3)
    for at, face in ((0, theme.surface), (-1, theme.roles["forget"])):
        axes.plot(x[at], y[at], "o", markersize=7, color=theme.roles["forget"], markerfacecolor=face, zorder=4)
    axes.set_xlabel(f"loss of {forget.removeprefix('loss/')}", fontsize=8.5, color=theme.muted)
    axes.set_ylabel(f"loss of {retain.removeprefix('loss/')}", fontsize=8.5, color=theme.muted)
    panel_title(axes, "forgetting against keeping", theme)
    return figure


def _ramp(theme: Theme) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("steps", [theme.grid, theme.roles["forget"]])


@dataclass(frozen=True)
class Curves:
    """A figure of the steps of one request; drawn where the log has names with the first of `prefixes`, or with each."""

    name: str
    draw: Callable[[Records, Theme], Figure]
    prefixes: tuple[str, ...]
    caption: str
    all_of_them: bool = False


CURVES = (
    Curves("losses", loss_curves, ("loss/",), "Loss of each term (role/term), before its weight."),
    Curves(
        "trade-off",
        trade_off_curve,
        ("loss/forget/", "loss/retain/"),
        "The path of the two losses from the first step (hollow) to the last. Up is what is kept getting worse.",
        all_of_them=True,
    ),
    Curves(
        "gradients",
        gradient_curves,
        ("grad_norm",),
        "Before clipping. Where there are several roles, dashed: of their combination.",
    ),
    Curves(
        "conflict",
        conflict_curves,
        ("cosine/", "conflict_rate"),
        "Where the cosine is negative, what lowers the loss of one role raises that of the other.",
    ),
)


def drawable(records: Records, curves: Curves) -> bool:
    needed = curves.prefixes if curves.all_of_them else curves.prefixes[:1]
    return all(_names(records, prefix) for prefix in needed)


def pngs(draw: Callable[[Theme], Figure]) -> tuple[bytes, bytes]:
    """A figure for light and for dark pages. Where its panels lie, half of the work, is the same on both and found once."""
    light, dark = draw(LIGHT), draw(DARK)
    first = png(light)
    dark.set_layout_engine("none")
    for panel, placed in zip(dark.axes, light.axes, strict=True):
        panel.set_position(placed.get_position())
    return first, png(dark)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, drawn once: savefig draws it all before, for the layout."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        if not axis.label.get_text():
            axis.set_label_coords(0, 0)  # else a place is looked for, among all tick labels, at each pass
    figure.set_dpi(_DPI)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def describe_bars(results: Mapping[str, Any], metric: str) -> str:
    """The figure's numbers in words, for those who do not see it."""
    parts = []
    for group in _groups_with(results, metric):
        values = [f"{format_value(metric_value(s, group, metric))} {s['title']}" for s in results["stages"]]
        entry = reference_entry(results, group, metric)
        values += [] if entry is None else [f"reference {format_value(entry['mean'])}"]
        parts.append(f"{group_title(group)}: {', '.join(values)}")
    return f"{metric_label(metric)}, bars. {'; '.join(parts)}."


def _groups_with(results: Mapping[str, Any], metric: str) -> list[str]:
    """A group that the metric says nothing of would be an empty place."""
    return [
        group
        for group in group_keys(results)
        if reference_entry(results, group, metric)
        or any(metric_value(stage, group, metric) is not None for stage in results["stages"])
    ]


def describe_curves(title: str, records: Records, prefixes: Sequence[str]) -> str:
    """First and last value of each curve in words, for those who do not see the figure."""
    parts = []
    for name in dict.fromkeys(name for prefix in prefixes for name in _names(records, prefix)):
        points = _points(records, name)
        (first, start), (last, end) = points[0], points[-1]
        parts.append(f"{name} {format_value(start)} at step {first:g}, {format_value(end)} at step {last:g}")
    return f"{title}, curves. {'; '.join(parts)}."


def new_figure(theme: Theme, height: float, rows: int = 1, share_x: bool = True) -> tuple[Figure, list[Axes]]:
    """An empty figure of so many inches with panels one above the other."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor=theme.surface)
    panels = list(figure.subplots(rows, 1, sharex=share_x, squeeze=False)[:, 0])
    for axes in panels:
        axes.set_facecolor(theme.surface)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(theme.muted)
        axes.tick_params(which="both", colors=theme.muted, labelsize=8.5, length=0)
        axes.set_axisbelow(True)
    return figure, panels


def _panels(theme: Theme, rows: int) -> tuple[Figure, list[Axes]]:
    figure, panels = new_figure(theme, 2.7 if rows == 1 else 1.1 + 1.4 * rows, rows)
    for axes in panels:
        axes.grid(color=theme.grid, linewidth=0.8)
    panels[-1].set_xlabel("optimizer step", fontsize=8.5, color=theme.muted)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, panels


def panel_title(axes: Axes, text: str, theme: Theme, pad: float = 6, size: float = 9) -> None:
    """With a `y`, as no ticks lie above: else it is looked for at each pass."""
    axes.set_title(text, loc="left", y=1.0, fontsize=size, fontweight="bold", color=theme.ink, pad=pad)


def _bar(
    axes: Axes,
    x: float,
    width: float,
    value: float | None,
    deviation: float | None,
    theme: Theme,
    style: Mapping[str, Any],
) -> float:
    """Draws one bar, or a dash where there is no value, and returns the height that it takes."""
    if value is None or not math.isfinite(value):
        axes.text(x, 0, DASH, ha="center", va="bottom", fontsize=8, color=theme.muted)
        return 0.0
    axes.bar(x, value, width * 0.9, **style)
    if not deviation:
        return value
    axes.errorbar(x, value, deviation, ecolor=theme.ink, elinewidth=1.0, capsize=2)
    return value + deviation


def _number(axes: Axes, x: float, height: float, value: float, theme: Theme) -> None:
    shown = f"{value:.2f}" if value >= 0.005 else f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"
    shown = "0" if value == 0 else "1" if shown == "1.00" else shown.removeprefix("0")
    place = {"xytext": (0, 2), "textcoords": "offset points", "ha": "center"}
    axes.annotate(shown, (x, height), fontsize=7.5, color=theme.ink, **place)


def _hatched(colour: str) -> dict[str, Any]:
    return {"facecolor": "none", "edgecolor": colour, "hatch": "////", "linewidth": 1.0}


def _line(axes: Axes, records: Records, name: str, colour: str, **style: Any) -> None:
    points = _points(records, name)
    style = {"linewidth": 1.5, "marker": "." if len(points) < 3 else None} | style
    axes.plot([step for step, _ in points], [value for _, value in points], color=colour, **style)


def _tint(colour: str, theme: Theme, index: int, count: int) -> tuple[float, ...]:
    """The colour mixed with the page's: the first of `count` is the palest, the last has the full colour."""
    share = 1.0 if count == 1 else 0.3 + 0.7 * index / (count - 1)
    mixed = zip(to_rgb(colour), to_rgb(theme.surface), strict=True)
    return tuple(share * own + (1 - share) * page for own, page in mixed)


def _sized(results: Mapping[str, Any], group: str) -> str:
    counts = dict.fromkeys(s["groups"][group]["examples"] for s in results["stages"] if group in s["groups"])
    return f"{group_title(group)}\nn = {', '.join(map(str, counts))}"


def short(title: str, most: int = 50) -> str:
    """A title of at most `most` characters, as matplotlib shows it unchanged."""
    cut = title if len(title) <= most else f"{title[: most - 1]}…"
    return cut.replace("$", r"\$")  # it reads formulas between dollar signs


def _names(records: Records, prefix: str) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))


def _points(records: Records, name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if name in record]


def _running_mean(values: Sequence[float]) -> list[float]:
    windows = (values[max(0, i + 1 - _RUNNING) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
