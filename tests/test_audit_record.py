"""From measured points to the record and its verdict: merged by label, read with checks, and no word beyond the numbers."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.kept import Attacked, read_kept, write_kept
from hf_clmul.evaluation.audit.merging import compared, merged
from hf_clmul.evaluation.audit.protocol import Point
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.evaluation.audit.verdict import came_back, verdict
from hf_clmul.evaluation.estimates import auc_gap_estimate, gap_estimate, mean_estimate


def value(number: float, low: float, high: float) -> dict[str, Any]:
    return {"value": number, "n": 8, "low": low, "high": high}


def entry(run: tuple, reference: tuple | None = None, gap: tuple | None = None) -> dict[str, Any]:
    parts = {"run": run, "reference": reference, "gap": gap}
    return {name: None if part is None else value(*part) for name, part in parts.items()}


def attack(*points: tuple[str, dict[str, Any]], **more: Any) -> dict[str, Any]:
    measured = [{"label": label, "x": None, "metrics": metrics, "samples": []} for label, metrics in points]
    base = {"attack": "relearn", "changes": "weights", "summary": "s", "parameters": {}, "seconds": 1.0, "absent": None,
            "reference_seconds": None, "peak_memory_bytes": None, "reference_absent": None, "points": measured}  # fmt: skip
    return {**base, **more}


def record(**more: Any) -> dict[str, Any]:
    base = {"schema": 1, "run": "r", "name": "n", "model_sha256": "0", "reference": None, "reference_missing": "none", "seed": 0,
            "created": "2026-01-01T00:00:00+00:00", "versions": {}, "hardware": {}, "before": {"p": entry((0.1, 0.0, 0.2))},
            "attacks": [attack(("before", {"p": entry((0.1, 0.0, 0.2))}))], "verdict": []}  # fmt: skip
    return {**base, **more}


def written(root: Path, content: str) -> Path:
    (root / "audit").mkdir(exist_ok=True)
    (root / "audit" / "audit.json").write_text(content)
    return root


# ---- merging ---------------------------------------------------------------------------------------------------


def test_points_with_one_label_become_one_with_the_gap_between_them():
    run = [Point("a", {"p": [0.5, 0.7]}, 1.0), Point("b", {"p": [1.0, 0.0]}, 2.0)]
    first, second = merged(run, [Point("b", {"p": [0.25, 0.25]}), Point("c", {"p": [0.0, 0.0]})])
    assert (first["label"], first["x"]) == ("a", 1.0)
    assert first["metrics"]["p"]["reference"] is None and first["metrics"]["p"]["gap"] is None
    found = second["metrics"]["p"]
    assert found["run"] == mean_estimate([1.0, 0.0]).record()
    assert found["reference"]["value"] == 0.25 and found["gap"] == gap_estimate([1.0, 0.0], [0.25, 0.25]).record()
    assert found["gap"]["value"] == 0.25


def test_what_an_attack_hides_counts_on_neither_side():
    found = compared(
        Point("a", {"p": [None, 0.6], "q": [None, None]}), Point("a", {"p": [None, 0.2], "q": [None, None]})
    )
    assert found["p"]["gap"]["value"] == pytest.approx(0.4) and found["p"]["gap"]["n"] == 1
    assert "q" not in found  # nothing was measured: no zero


def test_scores_become_aucs_and_their_distance():
    run, reference = ([2.0, 3.0], [0.0, 1.0]), ([0.0, 1.0], [0.0, 1.0])
    found = compared(Point("a", {}, against={"auc": run}), Point("a", {}, against={"auc": reference}))["auc"]
    assert (found["run"]["value"], found["reference"]["value"], found["gap"]["value"]) == (1.0, 0.5, 0.5)
    assert found["gap"] == auc_gap_estimate(run, reference).record()


def test_a_model_that_an_attack_destroyed_has_no_numbers_and_stops_no_audit():
    nan = float("nan")
    whole = Point("a", {"p": [0.5, 0.7]}, against={"auc": ([2.0, 3.0], [0.0])})
    gone = Point("a", {"p": [0.5, nan]}, against={"auc": ([2.0, nan], [0.0])})
    assert compared(gone, whole) == {}
    found = compared(whole, gone)
    assert found["p"]["run"]["value"] == 0.6 and found["auc"]["run"]["value"] == 1.0
    assert all(found[name][side] is None for name in found for side in ("reference", "gap"))


def test_samples_show_what_the_reference_said_to_the_same_question():
    ask = {"question": "Who?", "answer": "Ada", "generated": "Ada"}
    other = [{**ask, "generated": "Bo"}, {**ask, "question": "Why?"}]
    (found,) = merged([Point("a", {}, samples=[ask])], [Point("a", {}, samples=other)])
    assert found["samples"] == [{**ask, "reference": "Bo"}]


def test_kept_points_come_back_as_they_were_and_broken_files_are_measured_again(tmp_path):
    said = {"question": "q", "answer": "a", "generated": "g"}
    point = Point("a", {"p": [0.5, None]}, 1.0, {"auc": ([float("-inf")], [1.0])}, [said])
    file = tmp_path / "relearn.json"
    write_kept(file, {"run": Attacked("k", [point], 1.5, 7, None)})
    (found,) = read_kept(file).values()
    assert found == Attacked("k", [point], 1.5, 7, None)
    for content in ("", "[]", '{"run": {"key": 1}}'):
        file.write_text(content)
        assert read_kept(file) == {}


@pytest.mark.parametrize(
    ("place", "damage"),
    [
        ((), {"points": []}),
        ((), {"seconds": "1"}),
        (("points", 0), {"label": None}),
        (("points", 0), {"samples": [{"question": "q"}]}),
        (("points", 0, "values"), {"p": "abc"}),
        (("points", 0, "values"), {"p": ["0.5", 0.5]}),
        (("points", 0, "values"), {"p": [0.5]}),
        (("points", 0, "against"), {"auc": [[0.5]]}),
    ],
)
def test_what_is_damaged_of_what_was_kept_is_measured_again(tmp_path, place, damage):
    point = Point("a", {"p": [0.5, 0.7], "q": [0.1, None]}, against={"auc": ([0.5], [1.0])})
    file = tmp_path / "relearn.json"
    write_kept(file, {"run": Attacked("k", [point], 1.0), "reference": Attacked("l", [], 1.0, None, "why")})
    assert read_kept(file).keys() == {"run", "reference"}
    found = json.loads(file.read_text())
    part = found["run"]
    for step in place:
        part = part[step]
    part |= damage
    file.write_text(json.dumps(found))
    assert read_kept(file) == {"reference": Attacked("l", [], 1.0, None, "why")}


# ---- reading ---------------------------------------------------------------------------------------------------


def test_a_record_is_read_as_it_was_written_and_a_run_without_one_has_none(tmp_path):
    assert read_audit(tmp_path) is None
    assert read_audit(written(tmp_path, json.dumps(record()))) == record()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "schema null"),
        (json.dumps(record(schema=2)), "found schema 2"),
        (json.dumps(record(seed="0")), "seed: Input should be a valid integer"),
        (json.dumps({k: v for k, v in record().items() if k != "verdict"}), "verdict: Field required"),
        (json.dumps(record(attacks=[attack(changes="luck")])), "attacks.0.changes"),
        (json.dumps(record(before={"p": {"run": 0.5, "reference": None, "gap": None}})), "before.p.run"),
    ],
)
def test_other_records_are_refused_with_a_remedy(tmp_path, content, said):
    with pytest.raises(RunError, match=said) as caught:
        read_audit(written(tmp_path, content))
    assert "audit.json" in str(caught.value) and "hf-clmul audit RUN" in str(caught.value)


# ---- the verdict -----------------------------------------------------------------------------------------------

START = {"answer_probability": entry((0.10, 0.05, 0.15), (0.08, 0.04, 0.12), (0.02, 0.0, 0.05))}


def after(run: tuple, reference: tuple | None, gap: tuple | None) -> dict[str, Any]:
    return attack(("before", START), ("1 epoch", {"answer_probability": entry(run, reference, gap)}))


def test_what_rises_beyond_the_reference_came_back():
    found = after((0.60, 0.50, 0.70), (0.20, 0.10, 0.30), (0.40, 0.30, 0.50))
    assert list(came_back(found, START)) == ["answer_probability"]
    said = verdict(START, [found], None)
    assert said[0] == (
        "Gap to the retrained model on the forgotten examples before any attack: answer probability 0.020 [0.000, 0.050] "
        "(0.100 against 0.080)."
    )
    assert said[1] == (
        "relearn: answer probability came back: 0.100 [0.050, 0.150] before, 0.600 [0.500, 0.700] after (1 epoch); gap to the "
        "retrained model 0.020 [0.000, 0.050] before, 0.400 [0.300, 0.500] after the same attack on both."
    )
    assert said[2].startswith("1 of 1 attacks brought something back beyond what the same attack does to the retrained")


@pytest.mark.parametrize(
    ("run", "reference", "gap"),
    [
        ((0.60, 0.50, 0.70), (0.58, 0.48, 0.68), (0.02, 0.00, 0.06)),  # the attack taught it, to both
        ((0.60, 0.50, 0.70), (0.90, 0.80, 0.99), (0.30, 0.20, 0.40)),  # the reference learned more
        ((0.20, 0.14, 0.30), (0.10, 0.05, 0.15), (0.10, 0.06, 0.20)),  # intervals overlap
        ((0.05, 0.01, 0.09), (0.10, 0.05, 0.15), (0.05, 0.01, 0.09)),  # it fell
    ],
)
def test_nothing_else_came_back(run, reference, gap):
    found = after(run, reference, gap)
    assert came_back(found, START) == {}
    said = " ".join(verdict(START, [found], None))
    assert "came back" not in said and "None of 1 attacks" in said and "may." in said


def test_a_model_that_had_forgotten_more_than_the_reference_came_back_only_above_it():
    """The gap's interval is that of run - reference without its sign: before, it was -0.3 [-0.4, -0.2]."""
    start = {"p": entry((0.10, 0.05, 0.15), (0.40, 0.30, 0.50), (0.30, 0.20, 0.40))}
    for run, gap, back in (
        ((0.60, 0.50, 0.70), (0.20, 0.10, 0.30), ["p"]),  # a gap smaller than before, on the other side
        ((0.41, 0.30, 0.50), (0.01, 0.00, 0.10), []),  # it knows what the reference does
    ):
        found = attack(("before", start), ("1 epoch", {"p": entry(run, (0.40, 0.30, 0.50), gap)}))
        assert list(came_back(found, start)) == back


def test_a_gap_whose_sign_is_open_is_no_return_even_from_two_equal_models():
    start = {"p": entry((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))}
    found = attack(("before", start), ("x", {"p": entry((0.6, 0.5, 0.7), (0.58, 0.5, 0.7), (0.02, 0.0, 0.06))}))
    assert came_back(found, start) == {}


def test_what_the_reference_did_not_meet_rose_and_is_not_called_a_return():
    own = {"answer_probability": entry((0.10, 0.05, 0.15))}
    point = ("1 epoch", {"answer_probability": entry((0.6, 0.5, 0.7))})
    found = attack(("before", own), point, reference_absent="too little memory")
    assert came_back(found, START) == {}
    said = verdict(START, [found], None)
    assert said[1] == (
        "relearn: answer probability rose: 0.100 [0.050, 0.150] before, 0.600 [0.500, 0.700] after (1 epoch); the retrained "
        "model has no figure under this attack to compare with."
    )
    assert said[2] == "relearn: not tried on the retrained model, too little memory."
    assert said[3] == (
        "None of 1 attacks is known to have brought something back beyond what the same attack does to the retrained model. 1 of 1 "
        "raised something for which the retrained model has no figure: relearn."
    )
    assert "came back" not in " ".join(said)


def test_without_a_reference_the_verdict_says_so_and_compares_with_before_only():
    start = {"answer_probability": entry((0.10, 0.05, 0.15))}
    point = ("1 epoch", {"answer_probability": entry((0.6, 0.5, 0.7))})
    said = verdict(start, [attack(("before", start), point)], "none was trained")
    assert said[0].startswith("There is no retrained model to compare with (none was trained)")
    assert (
        said[1]
        == "relearn: answer probability rose: 0.100 [0.050, 0.150] before, 0.600 [0.500, 0.700] after (1 epoch)."
    )
    assert said[2] == (
        "1 of 1 attacks raised something: relearn. How much of that was still in the model, and how much such an attack teaches "
        "any model, is not known without the same attack on a retrained one."
    )


@pytest.mark.parametrize("referenced", [True, False])
def test_where_nothing_was_forgotten_unmoved_figures_do_not_read_as_success(referenced):
    other = ((0.11, 0.05, 0.2), (0.86, 0.80, 0.90)) if referenced else ()
    start = {"answer_probability": entry((0.97, 0.95, 0.99), *other), "p": entry((0.2, 0.1, 0.3))}
    said = verdict(start, [attack(("before", start), ("int8", start))], None if referenced else "none was trained")
    assert said[1] == (
        "Before any attack the run already lies above the retrained model in answer probability; how far apart two retrained models "
        "lie is not in these intervals."
        if referenced
        else "Before any attack the run already lies near 1 in answer probability, so that no attack could raise that far."
    )
    assert "This does not mean that the data were forgotten" in said[-1]
    low = {"answer_probability": entry((0.10, 0.05, 0.15), *other[:1], *([(0.01, 0.0, 0.05)] if referenced else ()))}
    said = verdict(low, [attack(("before", low), ("int8", low))], None if referenced else "none was trained")
    assert "Before any attack the run already" not in " ".join(said)
    assert ("How much the run still showed before the attacks is not known" in said[-1]) != referenced


def test_one_example_has_no_interval_and_proves_nothing():
    single = {"value": 0.1, "n": 1, "low": None, "high": None}
    start = {"p": {"run": single, "reference": None, "gap": None}}
    found = attack(("x", {"p": {"run": {**single, "value": 0.9}, "reference": None, "gap": None}}))
    assert came_back(found, start) == {}
    assert "0.100 (one example) before, 0.900 (one example) after (x)" in " ".join(verdict(start, [found], "none"))


def test_an_attack_starts_from_its_own_first_point_and_absence_is_told():
    own = {"answer_probability": entry((0.50, 0.45, 0.55))}  # of fewer examples than before
    point = ("1 epoch", {"answer_probability": entry((0.52, 0.46, 0.60))})
    assert came_back(attack(("before", own), point), START) == {}
    said = verdict(START, [attack(absent="the run is no filter")], None)
    assert said[1:] == ["relearn: not tried, the run is no filter."]


def test_an_attack_that_ended_early_says_so_of_each_model():
    found = attack(("before", START), ("1 step", START), stopped="it diverged", reference_stopped="so did it")
    said = verdict(START, [found], None)
    assert said[2:4] == [
        "relearn: it ended early, it diverged.",
        "relearn: it ended early on the retrained model, so did it.",
    ]


def test_an_attack_after_which_nothing_could_be_measured_raised_nothing_and_did_not_fail_to():
    """The first point behind the start has no numbers: the model is destroyed."""
    found = attack(("before", START), ("1 step", {}), stopped="it diverged")
    said = verdict(START, [found], None)
    assert said[1:] == ["relearn: nothing could be measured after it.", "relearn: it ended early, it diverged."]


def test_of_a_model_that_never_met_the_examples_nothing_is_said_to_be_forgotten_or_to_come_back():
    start = {"answer_probability": entry((0.97, 0.95, 0.99), (0.80, 0.75, 0.85), (0.17, 0.15, 0.19))}
    point = {"answer_probability": entry((0.999, 0.995, 1.0), (0.70, 0.60, 0.75), (0.29, 0.25, 0.35))}
    found = attack(("before", start), ("1 epoch", point))
    plain = verdict(start, [found], None)
    assert "already lies above the retrained model" in plain[1] and "came back: 0.970" in plain[2]
    scope, _, already, rose, last = verdict(start, [found], None, ["It never met them."], False)
    assert scope == "It never met them."
    assert already == (
        "Before any attack the run lies above the retrained model in answer probability, though it was not trained on the examples."
    )
    assert rose.startswith("relearn: answer probability rose: 0.970")
    assert last == (
        "1 of 1 attacks raised something: relearn. It is no return: the model was not trained on them. No forgetting was put to the "
        "test."
    )
    last = verdict(start, [attack(("before", start), ("int8", start))], None, (), False)[-1]
    assert (
        last
        == "None of 1 attacks raised a metric so far that its intervals are apart. No forgetting was put to the test."
    )


def own(name: str, *parts: tuple, missing: str | None = None) -> list[str]:
    """What is said of a metric that only the attack has, at points named after their order."""
    points = [(f"point {i}", {name: entry(*part)}) for i, part in enumerate(parts, 1)]
    start = START if missing is None else {"answer_probability": entry((0.10, 0.05, 0.15))}
    return verdict(start, [attack(*points)], missing)[1:-1]


@pytest.mark.parametrize(
    ("run", "gap", "said"),
    [
        ((0.40, 0.35, 0.45), (0.20, 0.10, 0.30), "above the retrained model"),
        ((0.10, 0.05, 0.15), (0.10, 0.05, 0.15), "below the retrained model"),
        ((0.22, 0.10, 0.30), (0.02, 0.00, 0.10), "cannot be told apart from the retrained model"),
    ],
)
def test_what_only_an_attack_measures_is_stated_beside_the_reference(run, gap, said):
    reference = (0.20, 0.10, 0.30)
    numbers = [f"{v:.3f} [{low:.3f}, {high:.3f}]" for v, low, high in (run, reference, gap)]
    told = "mean ROUGE-L recall of samples {} against {} (point 2; gap {})".format(*numbers)
    assert own("sampled_rouge_mean", (run, reference, (0.9, 0.8, 1.0)), (run, reference, gap)) == [
        f"relearn: {said}: {told}."
    ]
    apart = ((0.5, 0.4, 0.6), (0.2, 0.1, 0.3)), ((0.2, 0.15, 0.25), (0.2, 0.1, 0.3))
    assert own("leak_share", apart[0])[0].startswith("relearn: above the retrained model: share of leaks 0.500")
    assert own("leak_share", apart[1])[0].startswith("relearn: cannot be told apart from the retrained model")


def test_one_number_of_all_examples_is_not_judged_by_an_interval_that_it_has_not():
    (said,) = own("leak_bound_overall", ((0.02, 0.02, 0.02), (0.01, 0.01, 0.01), (0.01, 0.01, 0.01)))
    assert said.startswith(
        "relearn: beside the retrained model, without intervals that would tell chance: upper bound on "
    )


def test_of_layers_the_one_is_told_where_the_models_are_furthest_apart():
    layers = ((0.1, 0.1, 0.1), (0.1, 0.1, 0.1), (0, 0, 0)), ((2.0, 1.9, 2.1), (3.0, 2.9, 3.1), (1.0, 0.9, 1.1)), (
        (0.5, 0.4, 0.6), (0.6, 0.5, 0.7), (0.1, 0.0, 0.2))  # fmt: skip
    (said,) = own("patched_drop", *layers)
    assert (
        said.startswith("relearn: below the retrained model: log-probability lost by patching 2.000")
        and "point 2" in said
    )


def test_depth_is_explained_and_without_a_reference_only_the_run_is_told():
    (depth,) = own("unlearning_depth", ((0.4, 0.3, 0.5),))
    assert depth.startswith("relearn: depth of unlearning 0.400 [0.300, 0.500], where 0 means that the layers hold all")
    (alone,) = own("lens_hits", ((0.4, 0.3, 0.5),), missing="none was trained")
    assert alone == (
        "relearn: right tokens inside 0.400 [0.300, 0.500] (point 1). The retrained model to compare with is missing."
    )
    assert came_back(attack(("x", {"lens_hits": entry((0.9, 0.8, 1.0))})), START) == {}
