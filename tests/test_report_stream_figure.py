"""The heat map, read back from its axes."""

import math

from fake_results import fake_stream
from matplotlib.colors import to_rgb

from hf_clmul.report import figures as report_figures
from hf_clmul.report.stream_figure import describe_heat_map, heat_map, heat_map_width

FORGET, INK = to_rgb(report_figures.LIGHT.roles["forget"]), to_rgb(report_figures.LIGHT.ink)


def drawn(results, theme=report_figures.LIGHT):
    [axes] = heat_map(results, theme).axes
    return axes


def cells(axes, colour):
    """(row, column) of the cells whose outline has this colour."""
    found = [patch for patch in axes.patches if patch.get_edgecolor()[:3] == colour]
    return {(math.floor(patch.get_y()), math.floor(patch.get_x())) for patch in found}


def test_numbers_stand_in_their_cells():
    axes = drawn(fake_stream())
    matrix = fake_stream()["stream"]["matrix"]
    found = {(int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts}
    assert found == {
        (t, j): "–" if value is None else f"{value:.2f}" for t, row in enumerate(matrix) for j, value in enumerate(row)
    }
    assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["before learning", "learn people"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["people", "notes", "two-persons"]


def test_forgotten_cells_are_hatched_and_learned_ones_framed():
    axes = drawn(fake_stream())
    assert cells(axes, FORGET) == {(2, 2), (3, 2), (4, 1), (4, 2)}
    assert all(patch.get_hatch() for patch in axes.patches if patch.get_edgecolor()[:3] == FORGET)
    assert cells(axes, INK) == {(1, 0), (1, 2), (3, 1)}


def test_a_higher_score_is_nearer_to_full_colour():
    for theme in (report_figures.LIGHT, report_figures.DARK):
        axes = drawn(fake_stream(), theme)
        scores = [value for row in fake_stream()["stream"]["matrix"] for value in row]
        [mesh] = axes.collections
        colours = mesh.to_rgba(mesh.get_array()).reshape(-1, 4)
        assert to_rgb(axes.get_facecolor()) == to_rgb(theme.surface)  # what lies behind a cell that was not measured
        assert (colours[:, 3] == 0).tolist() == [score is None for score in scores]
        full = to_rgb(theme.roles["retain"])
        far = {
            score: sum(abs(a - b) for a, b in zip(colour[:3], full, strict=True))
            for score, colour in zip(scores, colours, strict=True)
            if score is not None
        }
        ordered = sorted(far)
        assert all(far[low] >= far[high] for low, high in zip(ordered, ordered[1:], strict=False))
        assert far[ordered[0]] > far[ordered[-1]] + 0.5


def test_many_columns_have_no_numbers_and_stay_within_the_page():
    results = fake_stream()
    columns = results["stream"]["columns"]
    columns += [dict(columns[0], name=f"task ${i}") for i in range(97)]
    results["stream"]["matrix"] = [[*row, *[1.0] * 97] for row in results["stream"]["matrix"]]
    axes = drawn(results)
    assert len(describe_heat_map(results)) < 100
    assert not axes.texts and heat_map_width(results) == 11.0
    assert report_figures.png(axes.figure).startswith(b"\x89PNG")


def test_scores_beyond_one_and_what_is_no_number_are_drawn():
    results = fake_stream()
    results["stream"]["matrix"][0] = [math.nan, math.inf, 3.5]
    assert [text.get_text() for text in drawn(results).texts[:3]] == ["–", "–", "3.50"]


def test_it_is_described_in_words():
    told = describe_heat_map(fake_stream())
    assert told.startswith(
        "ROUGE-L recall of each task after each request, heat map. people: 0.231 before learning, 0.973 "
    )
    assert "two-persons: 0.222 before learning, 0.332 after unlearn no-notes (forgotten)." in told
