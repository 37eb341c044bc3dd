"""Runs side by side: the numbers are the records', and what cannot be compared is refused or said."""

import io

import pytest
from fake_audit import estimate, fake_audit, write_fake_audit
from fake_results import fake_results, write_fake_run
from rich.console import Console
from test_report import Page, cells
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.console_compare import comparison_tables
from hf_clmul.errors import RunError
from hf_clmul.report.compare import _widest, compare, efficient
from hf_clmul.report.compare_figure import pareto_figure
from hf_clmul.report.figures import LIGHT

GAP, WIDEST = "gap to reference, answer probability", "widest gap in the audit, answer probability"


def run(folder, name, left, kept, /, **changes):
    folder.mkdir()
    results = fake_results() | changes | {"name": name}
    last = results["stages"][-1]["groups"]
    last["forget"]["metrics"]["answer_probability"] = left
    last["retain"]["metrics"]["answer_probability"] = kept
    return write_fake_run(folder, results)


def test_a_run_is_efficient_if_none_forgets_more_and_keeps_more():
    places = [(0.1, 0.9), (0.2, 0.95), (0.2, 0.9), (0.05, 0.5), (None, 1.0), (0.1, 0.9)]
    assert efficient(places) == {0, 1, 3, 5}


def test_cells_and_places_are_those_of_the_last_stage(tmp_path):
    one, two = run(tmp_path / "a", "npo", 0.12, 0.95), run(tmp_path / "b", "ascent", 0.01, 0.4)
    write_fake_audit(one)
    found = compare([one, two])
    assert [(r.left, r.kept) for r in found.runs] == [(0.12, 0.95), (0.01, 0.4)]
    cell = dict(zip(found.columns, found.runs[0].cells, strict=True))
    assert cell["Answer probability, forget"] == "0.120" and cell["Answer probability, retain"] == "0.950"
    assert cell["how"] == "approximate"
    assert cell[GAP] == "0.011"  # |0.12 - 0.1094|
    assert cell[WIDEST] == "0.800 (relearning what was forgotten, 20 steps)"
    assert dict(zip(found.columns, found.runs[1].cells, strict=True))[WIDEST] == "–"
    assert found.reference == (0.1094, 0.9721)
    assert found.notes == ("One seed each: differences may be chance.",)


@pytest.mark.parametrize(("names", "seeds", "told"), [
    (("npo", "ascent"), (0, 1), True), (("npo", "npo"), (0, 1), False), (("npo", "npo"), (0, 0), True)])  # fmt: skip
def test_one_seed_of_each_method_is_told_whatever_the_seeds(tmp_path, names, seeds, told):
    runs = [
        run(tmp_path / str(i), name, 0.1, 0.9, seed=seed)
        for i, (name, seed) in enumerate(zip(names, seeds, strict=True))
    ]
    assert ("One seed each: differences may be chance." in compare(runs).notes) == told


def test_an_audit_of_an_earlier_model_is_not_compared(tmp_path):
    one, two = (run(tmp_path / n, n, 0.1, 0.9, finished=f, reference=None) for n, f in (("a", "2025"), ("b", "2027")))
    for folder in (one, two):
        write_fake_audit(folder)
    first, second = (
        dict(zip(found.columns, r.cells, strict=True)) for found in [compare([one, two])] for r in found.runs
    )
    assert first[WIDEST].startswith("0.800") and second[WIDEST] == "–"
    assert second[GAP] == "–"
    result = CliRunner().invoke(app, ["compare", str(one), str(two), "--output", str(tmp_path / "out")])
    told = (
        "b: its audit is of an earlier model, and nothing of it is shown here. "
        f"Audit it again with `hf-clmul audit {two}`."
    )
    lines = result.output.splitlines()
    assert result.exit_code == 0 and lines.count(told) == 1 and not any(line.startswith("a: ") for line in lines)
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert page.count(told) == 1 and page.index(told) > page.index("</table>")


def test_of_pictures_the_attack_that_brings_most_back_is_told(tmp_path):
    """UA falls where something comes back: the largest is that of the attack that did least."""
    audit = fake_audit(reference=False)
    for attack in audit["attacks"]:
        for point in attack["points"]:
            drawn = point["metrics"]["answer_probability"]["run"]["value"]
            point["metrics"] = {"unlearning_accuracy": {"run": estimate(1 - drawn), "reference": None, "gap": None}}
    assert _widest(audit, "unlearning_accuracy") == "no reference; 0.090 (relearning what was forgotten, 20 steps)"


def test_equal_names_are_told_apart_by_their_folders(tmp_path):
    found = compare([run(tmp_path / "a", "npo", 0.1, 0.9), run(tmp_path / "b", "npo", 0.2, 0.9, seed=1)])
    assert [r.name for r in found.runs] == ["npo (a)", "npo (b)"] and not found.notes


def test_what_keeps_runs_from_being_compared_is_said(tmp_path):
    other = fake_results()
    other["model"]["sha256"] = "0" * 64
    other["stages"][-1]["groups"]["forget"]["examples"] = 3
    found = compare([run(tmp_path / "a", "x", 0.1, 0.9), run(tmp_path / "b", "y", 0.2, 0.9, **other)])
    assert found.notes[:2] == (
        "The runs began with different models.",
        "The runs were not measured on the same examples.",
    )


def test_one_run_an_unfinished_one_and_other_families_are_refused(tmp_path):
    one = run(tmp_path / "a", "npo", 0.1, 0.9)
    with pytest.raises(RunError, match="at least two"):
        compare([one])
    with pytest.raises(RunError, match="is named twice, and a run is not compared with itself: leave one out"):
        compare([one, tmp_path / "c" / ".." / "a"])
    with pytest.raises(RunError, match="not complete"):
        compare([one, run(tmp_path / "b", "npo", 0.1, 0.9, status="running")])
    pictures = fake_results()
    pictures["model"]["family"] = "diffusion"
    with pytest.raises(RunError, match="different families"):
        compare([one, run(tmp_path / "c", "npo", 0.1, 0.9, **pictures)])


def test_the_figure_fills_efficient_runs_and_marks_the_reference(tmp_path):
    folders = [
        run(tmp_path / n, n, left, kept) for n, left, kept in (("a", 0.1, 0.9), ("b", 0.2, 0.8), ("c", 0.3, 0.95))
    ]
    axes = pareto_figure(compare(folders), LIGHT).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == "none" for line in dots] == [False, True, False]
    [cross] = [line for line in axes.lines if line.get_marker() == "X"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (0.1094, 0.9721)


def test_the_reference_of_an_audit_is_a_line(tmp_path):
    folders = [run(tmp_path / n, n, left, 0.9, reference=None) for n, left in (("a", 0.1187), ("b", 0.2))]
    write_fake_audit(folders[0])
    found = compare(folders)
    gaps = [dict(zip(found.columns, r.cells, strict=True))[GAP] for r in found.runs]
    assert gaps == ["0.009", "–"]  # |0.1187 - 0.11|
    assert found.reference == (0.11, None)
    axes = pareto_figure(found, LIGHT).axes[0]
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [[0.11, 0.11]]
    assert not [line for line in axes.lines if line.get_marker() == "X"]


AT_80 = """\
 run                                                          npo       ascent
 ──────────────────────────────────────────────────────────────────────────────
 how                                                  approximate  approximate
 Answer probability, forget                                 0.120        0.010
 ROUGE-L recall, forget                                     0.332        0.332
 Answer probability, retain                                 0.950        0.400
 ROUGE-L recall, retain                                     0.973        0.973
 gap to reference, answer                                   0.011        0.099
 probability
 widest gap in the audit,              0.800 (relearning what was            –
 answer probability                          forgotten, 20 steps)
 time                                                  5 min 12 s   5 min 12 s
"""


def test_in_a_terminal_runs_stand_side_by_side(tmp_path):
    one, two = run(tmp_path / "a", "npo", 0.12, 0.95), run(tmp_path / "b", "ascent", 0.01, 0.4)
    write_fake_audit(one)
    console = Console(width=80, record=True, file=io.StringIO())
    [table] = comparison_tables(compare([one, two]))
    console.print(table)
    assert lines(console.export_text()) == lines(AT_80)


def lines(text):
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_of_many_runs_there_are_several_tables(tmp_path):
    found = compare([run(tmp_path / f"run{i}", f"run{i}", 0.1, 0.9) for i in range(5)])
    shown = [[str(column.header) for column in table.columns] for table in comparison_tables(found)]
    assert shown == [["run", "run0", "run1", "run2", "run3"], ["run", "run4"]]


def test_the_command_prints_the_table_and_writes_the_page(tmp_path):
    folders = [str(run(tmp_path / n, n, left, 0.9)) for n, left in (("npo", 0.1), ("simnpo", 0.2))]
    result = CliRunner().invoke(app, ["compare", *folders, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    page = Page((tmp_path / "out" / "compare.html").read_text("utf-8"))
    assert [cells(row)[0] for row in page.tables[0]] == ["run", "npo", "simnpo"]
    assert (tmp_path / "out" / "compare.png").is_file() and "npo" in result.output


def test_a_missing_run_is_one_clear_line(tmp_path):
    result = CliRunner().invoke(app, ["compare", str(tmp_path / "x"), str(tmp_path / "y")])
    assert result.exit_code != 0 and "results.json" in result.output and "Traceback" not in result.output
