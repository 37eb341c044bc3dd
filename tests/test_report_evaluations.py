"""What `hf-clmul evaluate` measured, on the page and in a terminal: values with intervals and counts, and once why others are absent."""

import io
import json

import pytest
from fake_results import fake_results, write_fake_run
from rich.console import Console
from test_report import Page, cells

from hf_clmul.cli_tables import evaluation_table
from hf_clmul.errors import RunError
from hf_clmul.report.evaluations import evaluated
from hf_clmul.report.page import write_report
from hf_clmul.run.evaluation_record import read_evaluation

NO_PASSAGE = "no forgotten row is a passage"
NO_REFERENCE = "no reference was measured"


def muse(**changes):
    gaps = ("knowledge_memorization_gap", "privleak")
    whole = {
        "metrics": {"knowledge_memorization": 0.125, "verbatim_memorization": None, **dict.fromkeys(gaps)},
        "counts": {"knowledge_memorization": 8},
        "intervals": {"knowledge_memorization": [0.0625, 0.25]},
        "absent": {"verbatim_memorization": NO_PASSAGE, **dict.fromkeys(gaps, NO_REFERENCE)},
    }
    groups = {
        name: {"examples": 4, "metrics": {"fluency": value}, "counts": {"fluency": 4}, "intervals": {},
               "absent": {"verbatim_memorization": NO_PASSAGE}}
        for name, value in (("forget", 0.5), ("retain", None))
    }  # fmt: skip
    return {
        "schema": 1, "suite": "muse", "target": "out", "recipe": "small", "reference": None, "seed": 0,
        "created": "2026-11-22T10:00:00+00:00", "groups": groups, "suites": {"muse": whole}, **changes,
    }  # fmt: skip


def small_run(folder, *records):
    results = fake_results() | {"finished": "2026-11-21T10:00:00+00:00"}
    for stage in results["stages"]:
        stage["log"] = None
        for group in stage["groups"].values():
            group["metrics"] = {"fluency": group["metrics"]["fluency"]}
    write_fake_run(folder, results)
    (folder / "evaluation").mkdir()
    for record in records:
        (folder / "evaluation" / f"{record['suite']}.json").write_text(json.dumps(record))
    return folder


def test_the_page_has_a_table_of_each_suite(tmp_path):
    page = Page(write_report(small_run(tmp_path, muse(), muse(suite="mia", suites={}))).read_text("utf-8"))
    mia, found = page.tables[3:]
    assert [cells(row) for row in mia] == [
        ["Metric", "value", "95 % interval", "n"],
        ["Forget"],
        ["Fluency 1 minus repetition in what is generated", "0.500", "", "4"],
    ]
    assert [cells(row) for row in found[3:]] == [
        ["All groups"],
        ["Knowledge memorization ROUGE-L F1 of answers on what is forgotten", "0.125", "0.062 to 0.250", "8"],
    ]
    text = " ".join(page.text.split())
    assert f"Absent: Verbatim memorization (Forget, Retain, All groups): {NO_PASSAGE}" in text
    assert f"Absent: Knowledge memorization, gap; PrivLeak (All groups): {NO_REFERENCE}" in text
    assert "measured 2026-11-22, without a reference" in text and "earlier model" not in text
    assert {"#evaluations"} < {link["href"] for link in page.attributes("a")}


def test_a_run_that_was_not_evaluated_has_no_such_section(tmp_path):
    page = Page(write_report(small_run(tmp_path)).read_text("utf-8"))
    assert "#evaluations" not in {link["href"] for link in page.attributes("a")} and len(page.tables) == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "measured 2026-11-22, without a reference"),
        ({"reference": "retrained"}, "measured 2026-11-22, beside the reference retrained"),
        ({"created": "2026-11-20T10:00:00+00:00"},
         "measured 2026-11-20, without a reference; before the run ended: of an earlier model"),
        ({"lm_eval": {"limit": 5}},
         "measured 2026-11-22, without a reference; only the first 5 examples of each task: no result to compare with others"),
        ({"lm_eval": {"limit": None}}, "measured 2026-11-22, without a reference"),
    ],
)  # fmt: skip
def test_what_it_was_measured_with_is_said(changes, expected):
    assert evaluated(muse(**changes), "2026-11-21T10:00:00+00:00").facts == expected


def test_tasks_of_the_harness_keep_their_names_and_may_have_no_count():
    entry = {"metrics": {"mmlu/acc_norm": 0.25}, "counts": {}, "intervals": {}, "absent": {}}
    [value] = evaluated(muse(suite="lm_eval", groups={}, suites={"lm_eval": entry})).parts["All groups"]
    assert (value.label, value.value, value.interval, value.n) == ("mmlu/acc_norm", "0.250", "", "")


def test_a_damaged_record_keeps_no_other_from_the_page(tmp_path):
    folder = small_run(tmp_path, muse(groups=[]), muse(suite="mia", suites={}))
    page = Page(write_report(folder).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert len(page.tables) == 4 and "Suite mia" in text and "Suite muse" not in text
    assert "muse.json is no record of an evaluation: groups: Input should be" in text
    assert (
        "Give `hf-clmul evaluate RUN --suites muse` again, which reads back what was measured, or delete the file."
        in text
    )
    (folder / "evaluation" / "mia.json").unlink()
    page = Page(write_report(folder).read_text("utf-8"))
    assert len(page.tables) == 3 and "#evaluations" in {link["href"] for link in page.attributes("a")}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[]", "is no record of an evaluation: it is no JSON object. Give"),
        ("{}", "is no record of an evaluation: it has no `schema`. Give"),
        ("", r"cannot be read as JSON \(Expecting value: line 1 column 1 \(char 0\)\). Give"),
        (json.dumps(muse(schema="x")), 'has schema "x", and this version reads 1. Give'),
    ],
)
def test_what_is_no_record_is_explained(tmp_path, content, told):
    (tmp_path / "mia.json").write_text(content)
    with pytest.raises(RunError, match=rf"mia.json {told} `hf-clmul evaluate RUN --suites mia` again"):
        read_evaluation(tmp_path / "mia.json")


TERMINAL = """\
out: muse
┏━━━━━━━━━━━━━━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━━━━━━━┳━━━┓
┃ metric                   ┃ value ┃  95 % interval ┃ n ┃
┡━━━━━━━━━━━━━━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━━━━━━━╇━━━┩
│ Forget                   │       │                │   │
│   Fluency                │ 0.500 │                │ 4 │
├──────────────────────────┼───────┼────────────────┼───┤
│ All groups               │       │                │   │
│   Knowledge memorization │ 0.125 │ 0.062 to 0.250 │ 8 │
└──────────────────────────┴───────┴────────────────┴───┘
measured 2026-11-22, without a reference
Absent: Verbatim memorization (Forget, Retain, All
groups): no forgotten row is a passage
Absent: Knowledge memorization, gap; PrivLeak (All
groups): no reference was measured
"""


def printed():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evaluation_table(muse()))
    return console.export_text()


def lines(text):
    return [line.rstrip() for line in text.splitlines()]


def test_a_terminal_shows_the_same():
    assert lines(printed()) == lines(TERMINAL)
