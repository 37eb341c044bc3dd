"""The figures, read back from their axes."""

import math
from unittest.mock import patch

import pytest
from fake_results import REFERENCE, VALUES, fake_results, learn_log, unlearn_log
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from hf_clmul.report import figures as report_figures


def test_bars_have_the_heights_of_the_record():
    [axes] = report_figures.metric_bars(fake_results(), "answer_probability", report_figures.LIGHT).axes
    heights = [bar.get_height() for bar in axes.patches]
    expected = [
        value
        for group in ("forget", "retain", "held_out")
        for value in (*(VALUES[stage][group][0] for stage in VALUES), REFERENCE[group][0])
    ]
    assert heights == pytest.approx(expected, rel=1e-12)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "Forget\nn = 16", "Retain\nn = 16", "Held out\nn = 16",
    ]  # fmt: skip


def test_a_missing_bar_is_a_dash():
    results = fake_results()
    results["reference"] = None
    results["stages"][0]["groups"]["forget"]["metrics"]["answer_probability"] = None
    results["stages"][1]["groups"]["forget"]["metrics"]["answer_probability"] = math.nan
    [axes] = report_figures.metric_bars(results, "answer_probability", report_figures.DARK).axes
    assert len(axes.patches) == 7
    assert [text.get_text() for text in axes.texts if text.get_text() == "–"] == ["–", "–"]


def test_curves_follow_the_log():
    log = unlearn_log(5)
    above, below = report_figures.loss_curves(log, report_figures.LIGHT).axes
    assert (above.get_title("left"), below.get_title("left")) == ("forget/npo", "retain/kl")
    assert above.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert above.lines[0].get_ydata().tolist() == [line["loss/forget/npo"] for line in log[:5]]
    [axes] = report_figures.gradient_curves(log, report_figures.LIGHT).axes
    assert [line.get_label() for line in axes.lines] == ["forget", "retain", "combined"]
    cosine, _ = report_figures.conflict_curves(log, report_figures.LIGHT).axes
    assert cosine.lines[0].get_ydata().tolist() == [line["cosine/forget/retain"] for line in log[:5]]


def test_the_conflict_rate_is_a_running_mean():
    log = [{"step": s, "cosine/forget/retain": -1.0, "conflict_rate": float(s > 2)} for s in range(1, 13)]
    _, rate = report_figures.conflict_curves(log, report_figures.LIGHT).axes
    # The last two windows of ten points have left one and both of the two first points behind.
    assert rate.lines[1].get_ydata().tolist() == pytest.approx(
        [0, 0, 1 / 3, 2 / 4, 3 / 5, 4 / 6, 5 / 7, 6 / 8, 7 / 9, 8 / 10, 9 / 10, 1.0], rel=1e-12
    )


def test_only_what_was_logged_is_drawn():
    drawable = {c.name for c in report_figures.CURVES if report_figures.drawable(learn_log(3), c)}
    assert drawable == {"losses", "gradients"}
    assert not any(report_figures.drawable([{"step": 1, "loss": 2.0}], c) for c in report_figures.CURVES)


def test_a_diverged_log_is_drawn():
    names = ("loss/forget/npo", "grad_norm/forget")
    values = [(2.0, 0.0), (math.nan, math.inf)]
    log = [{"step": step} | dict(zip(names, pair, strict=True)) for step, pair in enumerate(values)]
    for draw in (report_figures.loss_curves, report_figures.gradient_curves):
        figure = draw(log, report_figures.LIGHT)
        assert report_figures.png(figure).startswith(b"\x89PNG")
        assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1]


def test_a_request_with_one_role_has_one_curve():
    [axes] = report_figures.gradient_curves([{"step": 1, "grad_norm": 2.0}], report_figures.LIGHT).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2.0]]
    assert axes.get_legend() is None
    [axes] = report_figures.gradient_curves(learn_log(3), report_figures.LIGHT).axes
    assert [line.get_label() for line in axes.lines] == ["learn"]


def test_numbers_above_bars_are_short():
    results = fake_results()
    forget = [stage["groups"]["forget"]["metrics"] for stage in results["stages"]]
    for metrics, value in zip(forget, (0.0004, 0.0021, 0.9961), strict=True):
        metrics["answer_probability"] = value
    results["stages"][0]["groups"]["retain"]["metrics"]["answer_probability"] = 0.0
    [axes] = report_figures.metric_bars(results, "answer_probability", report_figures.LIGHT).axes
    assert [text.get_text() for text in axes.texts[:5]] == ["4e-04", ".002", "1", ".11", "0"]


def test_the_trade_off_is_the_path_of_the_two_losses():
    records = [
        {"step": step, "loss/forget/npo": forget, "loss/retain/kl": retain}
        for step, forget, retain in ((1, 9.0, 0.0), (2, 5.0, 0.2), (3, 4.0, 0.1))
    ]
    curve = next(curves for curves in report_figures.CURVES if curves.name == "trade-off")
    assert report_figures.drawable(records, curve) and not report_figures.drawable(
        [{"step": 1, "loss/forget/npo": 9.0}], curve
    )
    axes = curve.draw(records, report_figures.LIGHT).axes[0]
    path, first, last = axes.lines
    assert list(path.get_xdata()) == [9.0, 5.0, 4.0] and list(path.get_ydata()) == [0.0, 0.2, 0.1]
    assert (first.get_xdata()[0], last.get_xdata()[0]) == (9.0, 4.0)
    assert axes.get_xlabel() == "loss of forget/npo" and axes.get_ylabel() == "loss of retain/kl"


def test_a_figure_for_light_and_dark_pages_is_laid_out_once_and_drawn_once_for_each():
    def draw(theme):
        return report_figures.metric_bars(fake_results(), "answer_probability", theme)

    plain = tuple(report_figures.png(draw(theme)) for theme in (report_figures.LIGHT, report_figures.DARK))
    with (
        patch.object(Figure, "draw", autospec=True, side_effect=Figure.draw) as drawn,
        patch.object(
            ConstrainedLayoutEngine, "execute", autospec=True, side_effect=ConstrainedLayoutEngine.execute
        ) as laid,
    ):
        assert report_figures.pngs(draw) == plain
    assert (drawn.call_count, laid.call_count) == (2, 1)
