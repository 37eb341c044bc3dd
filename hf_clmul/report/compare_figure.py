"""Forgetting against keeping, a dot for each run, drawn by matplotlib. It knows a comparison and colours, no records."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_clmul.report.compare import Comparison
from hf_clmul.report.figures import Theme, new_figure, panel_title, short


def pareto_figure(found: Comparison, theme: Theme) -> Figure:
    """Left is forgotten, up is kept. Filled: no other run forgets more and keeps more; the line joins these. A cross is the
    reference, a line where only its forget figure is known."""
    figure, [axes] = new_figure(theme, 3.4)
    figure.set_size_inches(5.4, 3.6)
    axes.grid(color=theme.grid, linewidth=0.8)
    front = []
    for i, run in enumerate(found.runs):
        if run.left is None or run.kept is None:
            continue
        best = i in found.efficient
        colour = theme.roles["retain"] if best else theme.muted
        axes.plot(run.left, run.kept, "o", markersize=7, color=colour, markerfacecolor=colour if best else "none")
        place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8, "color": theme.ink}
        axes.annotate(short(run.name, 26), (run.left, run.kept), **place)
        if best:
            front.append((run.left, run.kept))
    if len(front) > 1:
        axes.plot(*zip(*sorted(front), strict=True), color=theme.roles["retain"], linewidth=0.9, alpha=0.6, zorder=0)
    if found.reference is not None:
        _draw_reference(axes, *found.reference, theme)
    axes.set_xlabel(f"{found.axes[0]} (less: forgotten)", fontsize=8.5, color=theme.muted)
    axes.set_ylabel(f"{found.axes[1]} (more: kept)", fontsize=8.5, color=theme.muted)
    places = [value for run in found.runs for value in (run.left, run.kept) if value is not None]
    if all(0 <= value <= 1 for value in places):  # shares and probabilities all get the same scale
        axes.set_xlim(-0.03, 1.03)
        axes.set_ylim(-0.03, 1.06)
    else:
        axes.margins(0.18)
    panel_title(axes, "forgetting against keeping", theme)
    return figure


def _draw_reference(axes: Axes, left: float, kept: float | None, theme: Theme) -> None:
    colour, style = theme.roles["held_out"], {"textcoords": "offset points", "fontsize": 8}
    if kept is None:
        axes.axvline(left, color=colour, linewidth=1.0, linestyle="--", zorder=0)
        axes.annotate(
            "retrained (reference)", (left, 0.5), (5, 0), xycoords=("data", "axes fraction"), color=colour, **style
        )
        return
    axes.plot(left, kept, "X", markersize=9, color=colour)
    axes.annotate("retrained (reference)", (left, kept), (6, -11), color=colour, **style)


def describe_pareto(found: Comparison) -> str:
    """The figure in words, for those who do not see it."""
    told = [f"{run.name}: {run.left:.3f}, {run.kept:.3f}" for run in found.runs if None not in (run.left, run.kept)]
    return f"{found.axes[0]} and {found.axes[1]} of each run, dots. {'; '.join(told)}. The table has all numbers."
