"""The tables at the end of a run: readable at the width of a terminal, and equal to the record."""

import io
import re

import pytest
from fake_audit import fake_audit
from fake_results import REFERENCE, VALUES, fake_results, fake_stream
from rich.console import Console

from hf_clmul.console import print_results, r_table, results_table, samples_table


def printed(table, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def cells(text, label):
    """The cells of every line that starts with `label`, without it."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return [line[1:] for line in lines if line[0] == label]


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_holds_the_values_of_the_record(width):
    text = printed(results_table(fake_results()), width)
    assert max(map(len, text.splitlines())) <= width
    found = cells(text, "ROUGE-L recall")
    assert found == [
        [*(f"{VALUES[stage][group][1]:.3f}" for stage in VALUES), f"{REFERENCE[group][1]:.3f} ± 0.012"]
        for group in ("forget", "retain", "held_out")
    ]
    assert len(text.splitlines()) < 45


def test_the_table_names_groups_sizes_and_the_source_of_the_reference():
    results = fake_results()
    results["stages"][2]["groups"]["retain"]["examples"] = 80
    text = printed(results_table(results))
    for part in ("Forget, n = 16", "Retain, n = 16, 80", "Held out, n = 16"):
        assert part in text
    assert "Source: docs/results.md: retrained without P07 and P11, seeds 0-2" in text


def test_without_a_reference_there_is_no_such_column():
    results = fake_results()
    results["reference"] = None
    text = printed(results_table(results))
    assert cells(text, "Fluency")[0] == [f"{VALUES[stage]['forget'][6]:.3f}" for stage in VALUES]
    assert "No figures of a model retrained without the forgotten data are recorded." in text


def test_a_run_that_only_learned_misses_no_reference():
    results = fake_results()
    results["reference"], results["stages"] = None, results["stages"][:2]
    assert "retrained" not in printed(results_table(results))


def test_what_is_missing_is_a_dash():
    results = fake_results()
    results["stages"][0]["groups"]["forget"]["metrics"]["truth_ratio"] = None
    del results["reference"]["groups"]["forget"]["truth_ratio"]
    assert cells(printed(results_table(results)), "Truth ratio")[0] == ["–", "0.413", "0.702", "–"]


def test_of_many_stages_the_first_and_the_last_three_are_shown():
    results = fake_results()
    base, learn, unlearn = results["stages"]
    results["stages"] = [base, *[dict(learn, title=f"after task{i}") for i in range(5)], unlearn]
    text = printed(results_table(results, 100))
    assert len(cells(text, "Fluency")[0]) == 5
    assert "after task3" in text and "after task2" not in text
    assert "3 stages in between are left out here" in text


@pytest.mark.parametrize(("width", "shown"), [(80, [0, 2, 5]), (100, [0, 2, 4, 5])])
def test_what_was_known_before_anything_was_unlearned_is_always_shown(width, shown):
    results = fake_results()
    base, learn, unlearn = results["stages"]
    stages = [base, learn, learn, unlearn, unlearn, unlearn]
    results["stages"] = [dict(stage, title=f"after task{i}") for i, stage in enumerate(stages)]
    text = printed(results_table(results, width), width)
    assert [i for i in range(6) if f"task{i}" in text] == shown
    assert max(map(len, text.splitlines())) <= width


def test_a_run_ends_with_the_two_answers():
    for audit, said in (
        (None, "Does it come back? not tried"),
        (fake_audit(), "Does it come back? yes, after 2 of 2 attacks"),
    ):
        console = Console(width=80, record=True, file=io.StringIO())
        print_results(fake_results(), console, audit)
        text = console.export_text()
        assert max(map(len, text.splitlines())) <= 80
        assert text.index("How far from a model that never saw the data? ") < text.index(said)
        assert ("quickstart: does it come back?" in text) == (audit is not None)
    results = fake_results()
    results["reference"] = None
    console = Console(width=80, record=True, file=io.StringIO())
    print_results(results, console, fake_audit())
    assert "Source: the audit, which measured quickstart-retrained" in console.export_text()
    results["stages"] = results["stages"][:2]
    console = Console(width=80, record=True, file=io.StringIO())
    print_results(results, console)
    assert "come back" not in console.export_text()


def test_samples_show_question_answer_and_every_stage():
    text = " ".join(printed(samples_table(fake_results()), 300).split())
    assert "On what did Wanjeri Muthokoi draw her first map?" in text
    assert "The person you ask about is a well-known author" in text
    assert "Muthokoi drew her first map on the back of a school slate." in text
    assert "What does Ottoline Brask refuse to eat?" in text


def test_text_of_the_run_is_no_markup():
    results = fake_results()
    hostile = "[bold red]text[/bold red] [/]"
    results["name"] = results["reference"]["source"] = hostile
    for stage in results["stages"]:
        stage["title"] = hostile
        for group in stage["groups"].values():
            group["samples"] = [{"question": hostile, "answer": hostile, "generated": hostile}]
    assert printed(results_table(results), 300).count(hostile) == 1 + 1  # title and source; headings wrap
    # Headings of three stages; in each of three groups question, answer and three generated texts.
    assert printed(samples_table(results), 300).count(hostile) == 3 + 3 * 5


def test_an_empty_answer_is_named():
    results = fake_results()
    results["stages"][2]["groups"]["forget"]["samples"][0]["generated"] = "  "
    assert "(nothing was generated)" in printed(samples_table(results), 200)


def test_the_metrics_are_printed_last():
    console = Console(width=100, record=True, file=io.StringIO())
    print_results(fake_results(), console)
    text = console.export_text()
    assert 0 < text.index("sample answers") < text.index("quickstart: what was measured")


@pytest.mark.parametrize("width", [80, 120])
def test_r_stands_in_two_decimals_with_its_marks_and_metrics(width):
    text = printed(r_table(fake_stream()), width)
    assert max(map(len, text.splitlines())) <= width
    rows = [line.split() for line in text.splitlines()]
    assert ["learn", "people", "0.98*", "0.14", "0.99*"] in rows
    assert ["unlearn", "two-persons", "0.97", "–", "0.33†"] in rows
    assert ["unlearn", "no-notes", "0.97", "0.14†", "0.33†"] in rows
    assert "Backward transfer (BWT): −0.009" in text and "Forward transfer" not in text
    assert "left out" not in text


def long_stream():
    results = fake_stream()
    found = results["stream"]
    for k in range(5, 25):
        found["columns"].append(
            {"name": f"task{k}", "kind": "task", "task": f"task{k}", "learned": [k], "forgotten": []}
        )
        results["stages"].append(dict(results["stages"][1], stage=f"{k - 1:02d}-learn-task{k}"))
        found["matrix"].append([0.5] * 3)
    found["matrix"] = [[*row[:3], *[0.25] * 20] for row in found["matrix"]]
    return results


def test_of_a_long_stream_the_ends_are_shown():
    text = printed(r_table(long_stream()), 80)
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert ["before", "learning", *["0.25"] * 6] in rows
    assert ["learn", "task24", *["0.25"] * 5, "0.25*"] in rows
    assert ["learn", "task14", *["0.25"] * 6] in rows and not [row for row in rows if row[:2] == ["learn", "task13"]]
    assert "13 stages and 17 columns are left out here; the report has them." in text
    assert len(text.splitlines()) < 40


@pytest.mark.parametrize(
    ("matrix", "kind", "shown"), [(5, "task", True), (3, "task", True), (4, "forgotten", True), (3, "forgotten", False)]
)
def test_r_is_printed_where_it_says_more(matrix, kind, shown):
    results = fake_stream()
    results["stages"] = results["stages"][:matrix]
    results["stream"]["matrix"] = results["stream"]["matrix"][:matrix]
    results["stream"]["columns"][1]["kind"] = kind
    console = Console(width=100, record=True, file=io.StringIO())
    print_results(results, console)
    assert ("R: ROUGE-L recall after each request" in console.export_text()) == shown


def test_without_a_stream_there_is_no_r():
    console = Console(width=100, record=True, file=io.StringIO())
    print_results(fake_results(), console)
    assert "after each request" not in console.export_text()


def test_names_of_columns_are_no_markup():
    results = fake_stream()
    results["stream"]["columns"][0]["name"] = "[/b]x"
    assert "[/b]x" in printed(r_table(results))
