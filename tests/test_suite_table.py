"""Suites as pure functions of tables: hand-computed values, published values of TOFU, and reasons in place of zeros."""

import math

import pytest
from test_metrics import GOLDEN, LOG2, golden_rows, row

from hf_clmul.evaluation import EVALUATE_ONLY, IN_RECIPES, SUITES, metrics
from hf_clmul.evaluation.membership import NO_NORMS
from hf_clmul.evaluation.suite_result import NO_REFERENCE
from hf_clmul.evaluation.suite_table import NO_PARAPHRASE, NOT_FINITE, SUITE_FUNCTIONS, continual, merged, results
from hf_clmul.recipe.families import SUITES_OF

BARE = {"paraphrase_logps": None, "perturbed_logps": None}


def tables(model):
    """With answers that give each row its published ROUGE-L recall: so many words of the answer."""
    found = {}
    for name, group in model.items():
        rows = golden_rows(group)
        found[name] = [{**r, "rouge": value} for r, value in zip(rows, group["rougeL_recall"], strict=True)]
    return found


@pytest.mark.parametrize("model", ["full", "retrained"])
def test_published_values_of_tofu(tofu_golden, model, monkeypatch):
    monkeypatch.setattr(metrics, "rouge_l_recall", lambda r: r["rouge"])
    published, expected = tables(tofu_golden[model]), tofu_golden["expected"][model]
    found = results(["tofu"], published, tables(tofu_golden["retrained"]))
    for group in published:
        of_group, wanted = found["groups"][group]["metrics"], expected[group]
        general = group in ("real_authors", "world_facts")
        probability = of_group["normalised_probability" if general else "answer_probability"]
        assert probability == pytest.approx(wanted["probability"], **GOLDEN)
        assert of_group["rouge_l_recall"] == pytest.approx(wanted["rougeL_recall"], **GOLDEN)
        assert of_group["truth_ratio"] == pytest.approx(wanted["truth_ratio"], **GOLDEN)
        same = "truth_ratio_near_one" if group == "forget" else "truth_ratio_truth_first"
        assert of_group[same] == of_group["truth_ratio"]
    whole = found["suites"]["tofu"]
    assert whole["metrics"]["model_utility"] == pytest.approx(expected["model_utility"], **GOLDEN)
    assert whole["counts"] == {"model_utility": 517, "forget_quality": 300} and whole["absent"] == {}
    quality = tofu_golden["expected"]["forget_quality_full_vs_retrained"] if model == "full" else 1.0
    assert whole["metrics"]["forget_quality"] == pytest.approx(quality, rel=1e-6)


def test_general_knowledge_has_its_answer_for_a_paraphrase():
    """p(answer) = 1/4, wrong 1/4 and 1/16, in the geometric mean 1/8: r = 1/2."""
    rows = [row(paraphrase_logps=None)]
    found = results(["tofu"], {"world_facts": rows, "held_out": rows})["groups"]
    facts = found["world_facts"]["metrics"]
    assert facts["truth_ratio"] == facts["truth_ratio_truth_first"] == pytest.approx(1 / 2)
    assert facts["truth_ratio_near_one"] == pytest.approx(1 / 2)
    assert facts["truth_share"] == pytest.approx(2 / 3)
    assert facts["normalised_probability"] == pytest.approx(4 / 9)
    assert facts["paraphrase_probability"] == facts["answer_probability"]
    assert found["held_out"]["metrics"]["truth_ratio"] is None and "truth_ratio" in found["held_out"]["absent"]


def test_truth_share_of_extremes():
    assert metrics.truth_share(row()) == pytest.approx(4 / 5)  # r = 1/4
    assert metrics.truth_share(row(paraphrase_logps=[-math.inf])) == 0.0
    assert metrics.truth_share(row(perturbed_logps=[[-math.inf]])) == 1.0
    assert metrics.truth_share(row(paraphrase_logps=[-5000.0])) == 0.0
    assert metrics.truth_share(row(**BARE)) is None


def test_perplexity_is_the_geometric_mean_over_answers():
    rows = [row(base_logps=[-LOG2, -3 * LOG2]), row(base_logps=[-4 * LOG2]), row(base_logps=None)]
    found = results(["basic"], {"retain": rows})["groups"]["retain"]
    assert found["metrics"]["base_perplexity"] == pytest.approx(8)  # 2 ** ((2 + 4) / 2)
    low, high = found["intervals"]["base_perplexity"]
    assert found["counts"]["base_perplexity"] == 2 and (low, high) == pytest.approx((4, 16))


def test_values_come_with_counts_and_intervals():
    rows = [row(logps=[-k * LOG2], **(BARE if k > 2 else {})) for k in (1, 2, 3, 4)]
    found = results(["basic"], {"retain": rows})["groups"]["retain"]
    assert found["counts"]["answer_probability"] == 4 and found["counts"]["paraphrase_probability"] == 2
    value = found["metrics"]["answer_probability"]
    low, high = found["intervals"]["answer_probability"]
    assert value == pytest.approx(15 / 64) and 1 / 16 <= low < value < high <= 1 / 2
    one = results(["basic"], {"retain": rows[:1]})["groups"]["retain"]
    assert "answer_probability" not in one["intervals"] and one["counts"]["answer_probability"] == 1


def test_what_the_data_cannot_tell_is_absent_with_the_reason():
    found = results(["basic", "tofu"], {"forget": [row(**BARE, hits=[True], answer="東京")], "retain": [row(**BARE)]})
    forget = found["groups"]["forget"]
    gone = ("paraphrase_probability", "truth_ratio", "truth_share", "extraction_strength", "exact_memorization",
            "rouge_l_recall", "normalised_probability", "question_probability", "base_perplexity")  # fmt: skip
    assert all(forget["metrics"][name] is None for name in gone) and set(gone) <= set(forget["absent"])
    assert not set(gone) & (set(forget["counts"]) | set(forget["intervals"]))
    assert forget["absent"]["paraphrase_probability"] == NO_PARAPHRASE
    whole = found["suites"]["tofu"]
    assert whole["metrics"] == {"model_utility": None, "forget_quality": None}
    assert whole["absent"]["model_utility"].startswith("truth_ratio of `retain`: no example has both")
    assert "no such reference is at hand" in whole["absent"]["forget_quality"]


def test_model_utility_names_the_group_that_is_missing():
    rows = [row(logps=[-0.1])]
    nothing = results(["tofu"], {"forget": rows})["suites"]["tofu"]["absent"]["model_utility"]
    assert nothing == "nothing was learned that stays, so that there is no group `retain`"
    two = {"retain": rows, "real_authors": rows}
    said = results(["tofu"], two)["suites"]["tofu"]["absent"]["model_utility"]
    assert said == "group `world_facts` was not measured: name its data under `evaluation.groups`"
    whole = results(["tofu"], {**two, "world_facts": rows})["suites"]["tofu"]
    # probability e^-0.1; normalised p / (p + 1/4 + 1/16); ROUGE-L 3/5; truth ratio 1 - 1/4
    p = math.exp(-0.1)
    nine = [p, *[p / (p + 5 / 16)] * 2, *[3 / 5] * 3, *[3 / 4] * 3]
    assert whole["metrics"]["model_utility"] == pytest.approx(9 / sum(1 / value for value in nine))


def test_a_broken_model_has_no_values():
    found = results(["basic", "tofu"], {"forget": [row(logps=[math.nan])]})["groups"]["forget"]
    assert found["metrics"]["answer_probability"] is None
    assert found["absent"]["answer_probability"] == NOT_FINITE


def test_of_two_suites_a_number_wins_over_none():
    one = {"metrics": {"a": 1.0, "b": None}, "counts": {"a": 2}, "intervals": {"a": [0, 2]}, "absent": {"b": "why"}}
    two = {"metrics": {"a": None, "b": 3.0}, "counts": {"b": 4}, "intervals": {}, "absent": {"a": "why not"}}
    both = {"metrics": {"a": 1.0, "b": 3.0}, "counts": {"a": 2, "b": 4}, "intervals": {"a": [0, 2]}, "absent": {}}
    assert merged(one, two) == both == merged(two, one)


def test_every_suite_has_a_line_and_a_function():
    assert {*SUITES_OF["causal_lm"], *EVALUATE_ONLY} == {*SUITE_FUNCTIONS, "continual", "lm_eval"}
    assert {*SUITES_OF["causal_lm"], *SUITES_OF["diffusion"]} == set(IN_RECIPES)
    assert {*IN_RECIPES, *EVALUATE_ONLY} == set(SUITES)


def test_mia_is_of_no_single_group_and_always_a_distance():
    """-1 and -3 against -2: AUC 1/2 of the run; -3 and -4 against -2: 0 of the reference; gap 1/2, PrivLeak -50."""

    def some(*logps):
        return [row(question=str(i), logps=[value] * 2, token_means=[-2.0] * 2, token_deviations=[1.0] * 2)
                for i, value in enumerate(logps)]  # fmt: skip

    run, reference = (
        {"forget": some(-1.0, -3.0), "held_out": some(-2.0, -2.0)},
        {"forget": some(-3.0, -4.0), "held_out": some(-2.0, -2.0)},
    )
    found = results(["mia"], run, reference)
    assert found["groups"] == {}
    entry = found["suites"]["mia"]
    for attack in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        assert entry["metrics"][f"{attack}_auc"] == entry["metrics"][f"{attack}_auc_gap"] == pytest.approx(1 / 2)
        assert entry["counts"][f"{attack}_auc_gap"] == 4 and len(entry["intervals"][f"{attack}_auc_gap"]) == 2
    assert entry["metrics"]["reference_auc"] == 1.0 and entry["metrics"]["privleak"] == pytest.approx(-50)
    assert entry["metrics"]["grad_norm_auc"] is None and entry["absent"]["grad_norm_auc"] == NO_NORMS
    alone = results(["mia"], {"forget": run["forget"]})["suites"]["mia"]
    assert set(alone["metrics"].values()) == {None}
    assert alone["absent"]["loss_auc"] == "no examples of the group held_out were measured"
    assert results(["mia"], run)["suites"]["mia"]["absent"]["loss_auc_gap"] == NO_REFERENCE


def test_continual_is_the_metrics_of_the_stream():
    column = {"name": "a", "kind": "task", "task": "a", "learned": [1], "forgotten": []}
    entry = continual({"columns": [column], "score": "x", "matrix": [[0.0], [0.75], [0.5]]})
    assert entry["metrics"]["average_performance"] == 0.5 and entry["metrics"]["bwt_last_minus_learned"] == -0.25
    assert entry["metrics"]["relapse_best_minus_forgotten"] is None
    assert entry["absent"]["relapse_best_minus_forgotten"].startswith("there is nothing to average, or a score that it")
    assert set(entry["metrics"]) == set(entry["counts"]) | set(entry["absent"])
