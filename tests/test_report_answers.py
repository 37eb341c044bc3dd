"""The two questions of a report: the answers are those of the records, and say no more than they do."""

import json

import pytest
from fake_audit import estimate, fake_audit, write_fake_audit
from fake_pictures import fake_pictures
from fake_results import fake_results, write_fake_run
from test_report import Page

from hf_clmul.report.answers import Line, answers
from hf_clmul.report.page import write_report


def both(results, audit):
    distance, back = answers(results, audit)
    assert (
        distance.question == "How far from a model that never saw the data?" and back.question == "Does it come back?"
    )
    return distance, back


def test_the_distance_is_that_of_the_audit_with_its_intervals():
    distance, _ = both(fake_results(), fake_audit())
    # 0.119 and 0.110: the interval of the gap reaches 0; 0.332 and 0.300: from 0.012 on.
    assert distance.said == "1 of 2 metrics differs"
    assert distance.lines == (
        Line("no sure gap", False, "Answer probability", "0.119, retrained 0.110", "gap 0.009 (95 %: 0.000 to 0.039)"),
        Line("above", True, "ROUGE-L recall", "0.332, retrained 0.300", "gap 0.032 (95 %: 0.012 to 0.062)"),
    )


def test_less_than_the_reference_is_no_mark_against_the_run():
    audit = fake_audit()
    audit["before"]["rouge_l_recall"]["run"] = estimate(0.2)
    [_, line] = both(fake_results(), audit)[0].lines
    assert (line.mark, line.bad) == ("below", False)


def test_below_is_told_without_a_cause():
    told = both(fake_results(), fake_audit())[0].told
    assert told.endswith("below: less than such a model shows.") and "removed" not in told
    assert (
        "The intervals are over examples: another training run is not in them." in told
    )  # of two models, one seed each


def test_a_model_that_never_met_the_examples_is_not_blamed_for_what_it_shows():
    scope = "RUN/model was not trained on them."
    distance, _ = both(fake_results(), fake_audit() | {"held": False, "scope": [scope]})
    assert [(line.mark, line.bad) for line in distance.lines] == [("no sure gap", False), ("above", False)]
    assert distance.told.startswith(f"{scope} Of the forgotten examples, ")
    held = both(fake_results(), fake_audit() | {"scope": [scope]})[0]
    assert held.told.startswith("Of the forgotten examples, ")


@pytest.mark.parametrize(("audit", "said"), [(fake_audit(), "1 of 2 metrics differs"), (None, "gap of 0.022 at most")])
def test_an_exact_claim_comes_before_the_figures(audit, said):
    results = fake_results()
    results["stages"][-1]["how"] = "exact by deletion"
    distance, _ = both(results, audit)
    assert distance.said == f"exact; {said}" and len(distance.lines) == (2 if audit else 6)
    assert distance.told.startswith("Exact by deletion means that ")
    results["stages"].append(dict(results["stages"][-1], how="approximate, with audit"))
    assert "xact" not in both(results, audit)[0].said + both(results, audit)[0].told


def test_without_an_audit_it_is_that_of_the_record():
    distance, back = both(fake_results(), None)
    # The truth ratio's 0.7019 and 0.7241 are further apart than 0.3322 and 0.3217, ROUGE-L recall; fluency is no knowledge.
    assert distance.said == "gap of 0.022 at most"
    assert [line.title for line in distance.lines] == [
        "Answer probability", "ROUGE-L recall", "Extraction strength", "Exact memorization", "Paraphrase probability", "Truth ratio",
    ]  # fmt: skip
    assert distance.lines[1] == Line("above", False, "ROUGE-L recall", "0.332, retrained 0.322 ± 0.012", "gap +0.011")
    assert (back.said, back.lines) == ("not tried", ())


def test_without_a_reference_the_distance_is_not_known():
    distance, back = both(fake_results() | {"reference": None}, fake_audit(reference=False))
    assert (distance.said, distance.lines) == ("not known", ())
    assert back.said == "perhaps: 2 of 2 attacks raised something"
    assert back.lines[0] == Line(
        "rose", True, "Relearning what was forgotten", "answer probability 0.119 → 0.910", "20 steps"
    )


def test_a_deletion_is_exact_without_figures():
    results = fake_results() | {"reference": None}
    results["stages"][-1]["how"] = "exact by deletion"
    distance, _ = both(results, None)
    assert distance.said == "exact" and distance.told.startswith(
        "Exact by deletion means that everything that was made"
    )
    results["stages"].append(dict(results["stages"][-1], how="approximate, with audit"))
    assert both(results, None)[0].said == "not known"


def test_what_comes_back_is_told_with_what_the_attack_does_to_the_reference():
    _, back = both(fake_results(), fake_audit())
    assert back.said == "yes, after 2 of 2 attacks"
    assert back.told == (
        "2 of 2 attacks brought something back beyond what the same attack does to the retrained model: relearning what was "
        "forgotten, quantization."
    )
    assert back.lines == (
        Line("came back", True, "Relearning what was forgotten", "answer probability 0.119 → 0.910, retrained 0.110",
             "20 steps; gap 0.009 → 0.800"),
        Line("came back", True, "Quantization", "answer probability 0.119 → 0.213, retrained 0.110",
             "nf4; gap 0.009 → 0.103"),
        Line("not tried", False, "Taking the adapter off", "", "the run left no adapter that could be taken off"),
    )  # fmt: skip


def test_of_a_model_that_never_met_the_examples_nothing_comes_back():
    audit = fake_audit() | {"held": False, "scope": ["RUN/model was not trained on them."]}
    _, found = answers(fake_results(), audit)
    assert found.said == "nothing was there to come back"
    assert found.told.startswith("RUN/model was not trained on them. ") and found.told.endswith("put to the test.")
    assert not any(line.bad or line.mark == "came back" for line in found.lines)


@pytest.mark.parametrize("reference", [True, False])
def test_where_nothing_came_back_it_is_told_what_was_there_before(reference):
    audit = fake_audit(reference)
    audit["attacks"] = audit["attacks"][1:2]
    audit["attacks"][0]["points"] = audit["attacks"][0]["points"][:2]
    audit["before"]["rouge_l_recall"]["run"] = estimate(0.95)
    start = "Before any attack the run already lies "
    told = both(fake_results() | {"reference": None}, audit)[1].told
    there = (
        "above the retrained model in ROUGE-L recall; how far apart " if reference else "near 1 in ROUGE-L recall, so "
    )
    assert told.startswith(start + there) and told.index("see above") > len(start + there)
    audit["before"]["rouge_l_recall"] = audit["before"]["answer_probability"]
    assert start not in both(fake_results(), audit)[1].told


def test_without_a_reference_what_no_attack_could_raise_is_told_beside_what_rose():
    audit = fake_audit(reference=False)
    audit["before"] = audit["before"] | {"exact_memorization": {"run": estimate(1.0), "reference": None, "gap": None}}
    back = both(fake_results() | {"reference": None}, audit)[1]
    assert back.said == "perhaps: 2 of 2 attacks raised something"
    assert back.told.startswith("Before any attack the run already lies near 1 in exact memorization, so")


def test_where_nothing_rose_for_sure_the_highest_point_is_told():
    audit = fake_audit()
    audit["attacks"] = audit["attacks"][1:2]
    audit["attacks"][0]["points"].pop()  # nf4
    _, back = both(fake_results(), audit)
    assert back.said == "no sure return after 1 attack"
    found = "answer probability 0.119 → 0.120, retrained 0.110"
    assert back.lines == (Line("no sure rise", False, "Quantization", found, "int8; gap 0.009 → 0.010"),)


def sampled(other):
    """An attack with a metric that there is only under it."""
    entry = {"run": estimate(0.5), "reference": estimate(other), "gap": estimate(abs(0.5 - other))}
    point = {"label": "32 samples", "x": None, "metrics": {"leak_share": entry}, "samples": []}
    return {**fake_audit()["attacks"][1], "attack": "sample", "points": [point]}


@pytest.mark.parametrize(("other", "mark"), [(0.1, "above, not counted"), (0.5, "no sure gap"), (0.9, "below")])
def test_an_attack_with_metrics_of_its_own_stands_beside_the_reference(other, mark):
    _, back = both(fake_results(), fake_audit() | {"attacks": [sampled(other)]})
    found = f"share of leaks 0.500, retrained {other:.3f}"
    assert back.lines == (Line(mark, False, "Many samples", found, "32 samples"),)


def test_what_is_not_counted_stands_behind_what_came_back_or_rose():
    audit = fake_audit()
    relearn, quantize, removed = audit["attacks"]
    alone = {**fake_audit(reference=False)["attacks"][1], "attack": "benign"}
    calm = {**quantize, "attack": "prefix", "points": quantize["points"][:2]}
    audit["attacks"] = [removed, destroyed(quantize), sampled(0.1), calm, alone, relearn]
    marks = [line.mark for line in both(fake_results(), audit)[1].lines]
    assert marks == ["came back", "rose", "above, not counted", "no sure rise", "no figures", "not tried"]
    audit["held"] = False
    marks = [line.mark for line in both(fake_results(), audit)[1].lines]
    assert marks == ["rose", "rose", "above, not counted", "no sure rise", "no figures", "not tried"]


def test_what_came_back_stands_first_and_what_was_not_tried_last():
    audit = fake_audit()
    relearn, quantize, removed = audit["attacks"]
    calm = {**quantize, "attack": "prefix", "points": quantize["points"][:2]}
    audit["attacks"] = [removed, calm, quantize, relearn]
    _, back = both(fake_results(), audit)
    titles = ["Quantization", "Relearning what was forgotten", "Making it begin the answer", "Taking the adapter off"]
    assert [line.title for line in back.lines] == titles


def destroyed(attack, metrics=None):
    """What is left of an attack that ends before the first figures from after it."""
    first, second, *_ = attack["points"]
    points = [{**first, "label": "before", "metrics": metrics or first["metrics"]}, {**second, "metrics": {}}]
    return {**attack, "points": points, "stopped": "the fine-tuning diverged at step 5"}


def test_an_attack_after_which_nothing_could_be_measured_is_not_counted():
    audit = fake_audit()
    relearn, *_ = audit["attacks"]
    audit["attacks"] = [destroyed(relearn), audit["attacks"][1]]
    _, back = both(fake_results(), audit)
    assert back.said == "yes, after 1 of 1 attack"
    note = "nothing could be measured after it: the fine-tuning diverged at step 5"
    assert back.lines[1] == Line("no figures", False, "Relearning what was forgotten", "", note)


def test_an_only_attack_after_which_nothing_could_be_measured_was_made():
    audit = fake_audit()
    relearn, _, removed = audit["attacks"]
    own = {"leak_share": {"run": estimate(0.9), "reference": estimate(0.1), "gap": estimate(0.8)}}
    audit["attacks"] = [destroyed(relearn, own), removed]
    _, back = both(fake_results(), audit)
    assert (back.said, back.told) == ("not known", "Nothing could be measured after 1 attack.")
    assert [line.mark for line in back.lines] == ["no figures", "not tried"]
    audit["attacks"] = [removed]
    assert both(fake_results(), audit)[1].told == "No attack could be made on this model."
    audit |= {"attacks": [relearn], "before": {}}
    told = both(fake_results(), audit)[1].told
    assert told == "Nothing could be measured of the forgotten examples before any attack."


def test_of_pictures_what_is_still_drawn_is_told():
    before = {
        "unlearning_accuracy": {"run": estimate(0.9), "reference": estimate(0.95), "gap": estimate(0.05)},
        "still_drawn": {"run": estimate(0.1), "reference": estimate(0.05), "gap": estimate(0.05)},
    }
    distance, _ = both(fake_pictures(), {**fake_audit(), "before": before, "attacks": []})
    assert [line.title for line in distance.lines] == ["Still drawn"]


def test_a_run_that_only_learned_is_asked_neither():
    results = fake_results()
    results["stages"] = results["stages"][:2]
    assert answers(results, None) == []


def test_the_answers_stand_before_all_else_on_the_page(tmp_path):
    results = fake_results()
    for stage in results["stages"]:
        stage["log"] = None
        for group in stage["groups"].values():
            group["metrics"] = {"fluency": group["metrics"]["fluency"]}
    audit = write_fake_audit(write_fake_run(tmp_path, results))
    audit["attacks"] = [{**audit["attacks"][2], "attack": f"a{i}"} for i in range(9)]
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(audit))
    page = Page(write_report(tmp_path).read_text("utf-8"))
    text = " ".join(page.text.split())
    assert text.index("Does it come back? Not tried") < text.index("What was asked and done") < text.index("Held out")
    first, rest = text[text.index("Does it come back?") : text.index("What was asked and done")].split("3 more")
    assert "A5" in first and "A6" not in first and "A8" in rest  # six of nine, then folded up
