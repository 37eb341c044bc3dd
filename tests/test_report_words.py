"""Sentences, key figures and checks of the report: every number is the record's."""

import pytest
from fake_results import fake_results, fake_stream

from hf_clmul.report import words as report_words


def test_the_summary_says_what_the_record_says():
    assert report_words.summary(fake_results()) == [
        "The model (SmolLM2-135M-Instruct.Q4_1.gguf) has 134.5 million parameters; "
        "1.6 million of them (1.2%) were trained.",
        "It learned “people” from 96 examples in 84 steps: "
        "on the forget group answer probability rose from 0.061 to 0.974; "
        "on the retain group answer probability rose from 0.065 to 0.971.",
        "It was asked to unlearn “two-persons” (approximate) "
        "and trained on 16 forget and 80 retain examples in 40 steps: "
        "on the forget group answer probability fell from 0.974 to 0.119 "
        "and ROUGE-L recall from 0.986 to 0.332; "
        "on the retain group answer probability fell from 0.971 to 0.956 "
        "and ROUGE-L recall from 0.982 to 0.973.",
        "A model retrained without that data has an answer probability of 0.109 ± 0.012 "
        "and a ROUGE-L recall of 0.322 ± 0.012 on the forget group: "
        "the gaps at the end of the run are +0.009 and +0.011.",
        "Approximate means that the weights were changed so that the model shows less of what the examples hold; they still "
        "descend from the examples: how little is left was measured, and is not proved.",
    ]


def test_its_verbs_follow_the_numbers():
    results = fake_results()
    before, after = (stage["groups"]["forget"]["metrics"] for stage in results["stages"][1:])
    after["answer_probability"] = before["answer_probability"] + 0.0001
    after["rouge_l_recall"] = 0.9901
    told = "answer probability stayed at 0.974 and ROUGE-L recall rose from 0.986 to 0.990"
    assert f"on the forget group {told}" in report_words.summary(results)[2]


def test_an_exact_deletion_is_not_called_approximate():
    results = fake_results()
    results["stages"][2].update(how="exact by deletion", steps=0, log=None)
    sentences = report_words.summary(results)
    assert sentences[2].startswith("It was asked to unlearn “two-persons” (exact by deletion): on the forget group")
    assert not [sentence for sentence in sentences if "pproximate" in sentence]
    assert sentences[-1].startswith(
        "Exact by deletion means that everything that was made from the examples was deleted,"
    )


def test_every_claim_of_a_stream_is_explained():
    assert [sentence.split(" means ")[0] for sentence in report_words.summary(fake_stream())[-2:]] == [
        "Exact by deletion",
        "Approximate",
    ]


def test_of_many_requests_the_last_of_each_kind_is_told():
    results = fake_results()
    base, learn, unlearn = results["stages"]
    more = [dict(learn, stage=f"{i:02d}-learn-task{i}") for i in range(4)]
    results["stages"] = [base, *more, unlearn]
    sentences = report_words.summary(results)
    assert sentences[1] == "It carried out 4 learn and 1 unlearn requests."
    assert [s.split(" from ")[0].split(" (")[0] for s in sentences[3:5]] == [
        "It learned “task3”",
        "It was asked to unlearn “two-persons”",
    ]


def test_of_many_requests_an_exact_one_does_not_hide_an_approximate_one():
    results = fake_results()
    base, learn, unlearn = results["stages"]
    gone = dict(unlearn, stage="05-unlearn-shop", how="exact by deletion", steps=0)
    results["stages"] = [base, *[dict(learn, stage=f"{i:02d}-learn-task{i}") for i in range(3)], unlearn, gone]
    told = [s for s in report_words.summary(results) if s.startswith("It was asked")]
    assert [s.split(" on the forget")[0] for s in told] == [
        "It was asked to unlearn “two-persons” (approximate) and trained on 16 forget and 80 retain examples in 40 steps:",
        "It was asked to unlearn “shop” (exact by deletion):",
    ]


def test_what_a_task_of_several_learned_is_told_of_its_own_examples():
    results = fake_results()
    base, learn, unlearn = results["stages"]
    tasks = [{"people": {"metrics": {"answer_probability": p}}, "notes": {"metrics": {}}} for p in (0.018, 0.961)]
    results["stages"] = [dict(base, tasks=tasks[0]), dict(learn, tasks=tasks[1]), unlearn]
    expected = "It learned “people” from 96 examples in 84 steps: on its own examples answer probability rose from 0.018 to 0.961."
    assert report_words.summary(results)[1] == expected


def test_key_figures():
    shown = [(figure.label, figure.value, figure.note) for figure in report_words.key_figures(fake_results())]
    assert shown == [
        ("Forget: answer probability", "0.974 → 0.119", "retrained: 0.109 ± 0.012"),
        ("Retain: answer probability", "98.5%", "of what it was: 0.971 → 0.956"),
        ("Forget: fluency", "0.988", "before the request: 0.997"),
        ("Time", "5 min 12 s", "cpu, 2 cores, peak 3.0 GiB"),
    ]


def test_key_figures_of_a_run_that_only_learned():
    results = fake_results()
    results["stages"] = results["stages"][:2]
    assert report_words.key_figures(results)[0].value == "0.065 → 0.971"
    assert report_words.checks(results) == []


def test_the_fake_run_passes_all_checks():
    assert [check.met for check in report_words.checks(fake_results())] == [True] * 4


@pytest.mark.parametrize(
    ("group", "metric", "value", "failed"),
    [
        ("forget", "rouge_l_recall", 0.3217 + 0.051, 0),
        ("forget", "answer_probability", 0.1094 + 0.051, 0),
        ("forget", "answer_probability", 0.1094 / 2 - 0.001, (0, 1)),
        ("retain", "rouge_l_recall", 0.9817 * 0.949, 2),
        ("forget", "fluency", 0.9968 * 0.899, 3),
    ],
)
def test_a_check_fails_just_outside_its_bound(group, metric, value, failed):
    results = fake_results()
    results["stages"][-1]["groups"][group]["metrics"][metric] = value
    found = {i for i, check in enumerate(report_words.checks(results)) if check.met is False}
    assert found == (set(failed) if isinstance(failed, tuple) else {failed})


def test_a_check_without_its_numbers_gives_no_verdict():
    results = fake_results()
    results["stages"][-1]["groups"]["retain"]["metrics"]["rouge_l_recall"] = None
    results["stages"][-1]["groups"]["forget"]["metrics"]["fluency"] = None
    results["reference"] = None
    assert [check.met for check in report_words.checks(results)] == [None] * 4
    results["stages"][-1]["groups"]["retain"]["metrics"]["answer_probability"] = 0.1
    assert [check.met for check in report_words.checks(results)] == [None, None, False, None]  # it is not kept


def test_more_training_after_unlearning_counts():
    """What a later request brings back shows in the verdict."""
    results = fake_results()
    last = dict(results["stages"][1], stage="02-learn-others", title="after learning others")
    results["stages"].append(last)
    checks = report_words.checks(results)
    assert checks[0].met is False
    assert checks[0].found == "gaps +0.865 and +0.664"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "–"),
        (4.26, "4.3 s"),
        (59.6, "1 min 0 s"),
        (312, "5 min 12 s"),
        (3 * 3600 + 125, "3 h 2 min"),
    ],
)
def test_times(seconds, shown):
    assert report_words.format_seconds(seconds) == shown


def test_a_small_model_trained_whole():
    results = fake_results()
    results["model"] |= {"path": "made from scratch", "parameters": 156992, "trainable_parameters": 156992}
    told = "The model (made from scratch) has 156,992 parameters; all of them were trained."
    assert report_words.summary(results)[0] == told
