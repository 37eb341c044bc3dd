"""Numbers, groups and metrics as they are shown."""

import math

import pytest
from fake_results import fake_results

from hf_clmul.evaluation.audit.verdict import WORDS
from hf_clmul.report import tables as report_tables


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0.000"),
        (1, "1.000"),
        (0.12345, "0.123"),
        (0.0005, "0.001"),
        (1.834e-21, "1.8e-21"),
        (-0.25, "-0.250"),
        (123456.0, "1.2e+05"),
        (math.nan, "NaN"),
        (math.inf, "inf"),
    ],
)
def test_values(value, shown):
    assert report_tables.format_value(value) == shown


@pytest.mark.parametrize(("gap", "shown"), [(None, "–"), (0.0124, "+0.012"), (-0.2, "−0.200"), (-0.0001, "+0.000")])
def test_gaps(gap, shown):
    assert report_tables.format_gap(gap) == shown


def test_every_metric_of_an_audit_has_a_label():
    assert set(WORDS) - set(report_tables.METRICS) == set()
    assert report_tables.metric_label("question_rouge_l_recall") == "Question, ROUGE-L recall"


def test_unknown_groups_and_metrics_come_last_and_are_named_plainly():
    results = fake_results()
    results["stages"][0]["groups"] = {"world_facts": {"examples": 2, "metrics": {"new_metric": 0.5}, "samples": []}}
    *_, table = report_tables.group_tables(results)
    assert (table.title, table.examples, table.rows[0].label) == (
        "World facts",
        ("2", "–", "–"),
        "New metric",
    )
    assert table.rows[0].values == ("0.500", "–", "–")
