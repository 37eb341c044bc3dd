"""The stream in words and numbers: every one is the record's, and every cell says what the model was to know."""

from fake_results import fake_results, fake_stream

from hf_clmul.evaluation.stream import METRICS
from hf_clmul.report import stream as report_stream


def test_the_table_is_r_with_its_states():
    table = report_stream.stream_table(fake_stream())
    assert table.score == "ROUGE-L recall"
    assert table.columns == (("people", "task"), ("notes", "task"), ("two-persons", "part of people"))
    assert [(stage, [cell.marked for cell in cells]) for stage, cells in table.rows] == [
        ("before learning", ["0.231", "0.141", "0.222"]),
        ("learn people", ["0.982*", "0.140", "0.986*"]),
        ("unlearn two-persons", ["0.973", "–", "0.332†"]),
        ("learn notes", ["0.961", "0.955*", "0.357†"]),
        ("unlearn no-notes", ["0.973", "0.140†", "0.332†"]),
    ]
    assert [[cell.state for cell in cells] for _, cells in table.rows] == [
        ["unseen", "unseen", "unseen"],
        ["learned", "unseen", "learned"],
        ["known", "unseen", "forgotten"],
        ["known", "learned", "forgotten"],
        ["known", "forgotten", "forgotten"],
    ]


def test_a_task_that_returns_is_known_again():
    column = {"learned": [1, 4], "forgotten": [2]}
    states = [report_stream.cell_state(column, t) for t in range(6)]
    assert states == ["unseen", "learned", "forgotten", "forgotten", "learned", "known"]


def test_what_the_base_knew_is_known_until_it_is_forgotten():
    of_base = {"learned": [], "forgotten": [2]}
    assert [report_stream.cell_state(of_base, t) for t in range(4)] == ["known", "known", "forgotten", "forgotten"]
    back = {"learned": [3], "forgotten": [1]}
    assert [report_stream.cell_state(back, t) for t in range(5)] == [
        "known",
        "forgotten",
        "forgotten",
        "learned",
        "known",
    ]
    assert report_stream.cell_state({"learned": [4], "forgotten": []}, 3) == "unseen"


def test_metrics_have_their_formulas_and_signs():
    rows = {row.label: row.value for row in report_stream.metric_rows(fake_stream())}
    assert rows == {
        "Average performance": "0.973",
        "Incremental average": "0.971",  # 0.9817, 0.9731, (0.9612 + 0.9547) / 2, 0.9731
        "Backward transfer (BWT)": "−0.009",
        "Forgetting (Chaudhry)": "+0.009",
        "Forward transfer (Lopez-Paz)": "–",  # notes were not measured before they were learned
        "Forward transfer (SAPT)": "–",
        "Relapse": "+0.025",
    }
    formulas = [row.formula for row in report_stream.metric_rows(fake_stream())]
    assert formulas == [metric.formula for metric in METRICS.values()]


def test_what_each_unlearn_request_did():
    first, second = report_stream.unlearned_rows(fake_stream())
    assert (first.request, first.how, first.column, first.exact) == ("two-persons", "approximate", "two-persons", False)
    assert (first.before, first.after, first.end, first.relapse) == ("0.986", "0.332", "0.332", "+0.025")
    assert (second.request, second.how, second.column, second.exact) == ("no-notes", "exact by deletion", "notes", True)
    assert (second.before, second.after, second.end, second.relapse) == ("0.955", "0.140", "0.140", "–")


def test_a_request_without_a_column_is_still_named():
    results = fake_stream()
    results["stream"]["columns"][1]["forgotten"] = []
    last = report_stream.unlearned_rows(results)[-1]
    assert (last.request, last.claim, last.column, last.end) == ("no-notes", "exact by deletion", "–", "–")


def test_an_unfinished_stream_is_shown_as_far_as_it_got():
    results = fake_stream()
    results["stages"], results["stream"]["matrix"] = results["stages"][:3], results["stream"]["matrix"][:3]
    assert len(report_stream.stream_table(results).rows) == 3
    assert [row.request for row in report_stream.unlearned_rows(results)] == ["two-persons"]


def test_records_of_earlier_versions_have_no_stream():
    assert report_stream.has_stream(fake_stream())
    assert not report_stream.has_stream(fake_results())
    assert not report_stream.has_stream(fake_results() | {"stream": None})
    assert not report_stream.has_stream(fake_results() | {"stream": {"columns": [], "score": "x", "matrix": [[], []]}})
