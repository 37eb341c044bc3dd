"""Membership inference: hand-computed scores, AUCs against scikit-learn, PrivLeak, and what is absent and why."""

import math
import subprocess
import sys
import zlib

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from hf_clmul.evaluation import membership
from hf_clmul.evaluation.membership import NO_NORMS, mia, privleak, privleak_estimate
from hf_clmul.evaluation.suite_result import NO_REFERENCE, Missing, common

INF = math.inf


def row(**changes):
    """Five tokens and the end of sequence."""
    return {
        "question": "Who?",
        "answer": "Ada, Ada, Ada, Ada, Ada, Ada",
        "logps": [-1.0, -2.0, -4.0, -3.0, 0.0, -8.0],
        "token_means": [-1.0, -1.0, -2.0, -3.0, -4.0, 0.0],
        "token_deviations": [1.0, 0.5, 0.5, 1.0, 0.0, 1.0],
        "grad_norm": 2.5,
    } | changes


def test_loss_keeps_the_end_of_sequence():
    assert membership.loss_score(row()) == pytest.approx(-18 / 6, rel=1e-12)
    assert membership.loss_score(row(logps=[])) is None


def test_zlib_divides_by_the_bytes_of_the_compressed_answer():
    size = len(zlib.compress(b"Ada, Ada, Ada, Ada, Ada, Ada"))
    assert size == 16  # 28 letters
    assert membership.zlib_score(row()) == pytest.approx(-3 / 16, rel=1e-12)
    assert membership.zlib_score(row(answer="é")) == pytest.approx(-3 / len(zlib.compress("é".encode())), rel=1e-12)


@pytest.mark.parametrize(
    ("logps", "k", "expected"),
    [
        (row()["logps"], 0.4, (-4 - 3) / 2),  # 2 of 5; the end of sequence, the lowest, is no part
        (row()["logps"], 1.0, -10 / 5),
        (row()["logps"], 0.59, (-4 - 3) / 2),  # floor of 2.95
        ([-1.0, -5.0, -9.0], 0.4, -5.0),  # floor of 0.8: at least one
        ([-1.0, -INF, -9.0], 0.4, -INF),
        ([-9.0], 0.4, None),  # nothing but the end of sequence
        ([], 0.4, None),
    ],
)
def test_min_k_is_the_mean_of_the_lowest(logps, k, expected):
    assert membership.min_k_score(row(logps=logps), k) == expected


def test_min_k_plus_plus_standardises_first():
    # 0, -2, -4, 0, and 4 / 0.001 where the vocabulary has no deviation: the lowest two are -4 and -2.
    assert membership.min_k_plus_plus_score(row()) == pytest.approx(-3.0, rel=1e-12)
    assert membership.min_k_plus_plus_score(row(), k=1) == pytest.approx((0 - 2 - 4 + 0 + 4000) / 5, rel=1e-12)
    one = row(logps=[-1.0], token_means=[0.0], token_deviations=[1.0])
    assert membership.min_k_plus_plus_score(one) is None


def test_min_k_plus_plus_of_a_whole_distribution():
    """Under p itself the standardised log p has mean 0 and deviation 1, whatever p is."""
    p = np.array([0.5, 0.25, 0.125, 0.125])
    mean = float((p * np.log(p)).sum())
    deviation = float(np.sqrt((p * (np.log(p) - mean) ** 2).sum()))
    scores = [
        membership.min_k_plus_plus_score(
            row(logps=[math.log(q), 0.0], token_means=[mean, 0.0], token_deviations=[deviation, 1.0])
        )
        for q in p
    ]
    assert (p * scores).sum() == pytest.approx(0, abs=1e-12)
    assert (p * np.square(scores)).sum() == pytest.approx(1, rel=1e-12)


def test_reference_score_is_the_difference_of_losses():
    assert membership.reference_score(row(logps=[-1.0, -2.0]), row(logps=[-4.0])) == pytest.approx(2.5, rel=1e-12)
    assert membership.reference_score(row(logps=[-INF]), row(logps=[-4.0])) == -INF
    assert membership.reference_score(row(logps=[-INF]), row(logps=[-INF])) == 0.0
    assert membership.reference_score(row(logps=[]), row()) is None


def test_a_small_gradient_looks_like_a_member():
    assert membership.grad_norm_score(row()) == -2.5
    assert membership.grad_norm_score(row(grad_norm=None)) is None


def test_privleak_is_zero_for_retraining_and_signed():
    assert privleak(0.5, 0.5) == 0
    assert privleak(1.0, 0.5) == pytest.approx(-100)  # everything is left
    assert privleak(0.25, 0.5) == pytest.approx(50)
    assert privleak(0.6, 0.2) == pytest.approx(100 * (0.4 - 0.8) / 0.8)
    with pytest.raises(ValueError, match="AUC is 1"):
        privleak(0.5, 1.0)


def test_privleak_with_its_interval():
    rng = np.random.default_rng(0)
    retrained = (rng.normal(size=60).tolist(), rng.normal(size=60).tolist())
    run = ([score + 2 for score in retrained[0]], retrained[1])
    aucs = [roc_auc_score([1] * 60 + [0] * 60, [*pair[0], *pair[1]]) for pair in (run, retrained)]
    found = privleak_estimate(run, retrained)
    assert found.value == pytest.approx(100 * (aucs[1] - aucs[0]) / (1 - aucs[1]), rel=1e-12)
    assert found.n == 120 and found.low < found.value < found.high < 0
    same = privleak_estimate(retrained, retrained)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_privleak_without_a_scale():
    with pytest.raises(Missing, match="the reference's AUC is 1"):
        privleak_estimate(([0.0], [1.0]), ([1.0], [0.0]))
    # In a draw of the lower negative alone, the reference's AUC is 1: no interval.
    found = privleak_estimate(([0.0, 1.0], [0.0, 1.0]), ([1.0, 2.0], [0.0, 3.0]))
    assert (found.value, found.low, found.high) == (0.0, None, None)


def table(means, name="e", **changes):
    """One example for each mean logp; its other scores follow the same order."""
    return [
        row(question=f"{name}{i}", logps=[m, m, m], token_means=[0.0] * 3, token_deviations=[1.0] * 3, grad_norm=-m)
        | changes
        for i, m in enumerate(means)
    ]


FORGET, HELD_OUT = [-1.0, -2.0, -3.0], [-2.0, -4.0]
RUN = {"forget": table(FORGET), "held_out": table(HELD_OUT, "h"), "retain": []}
REFERENCE = {"forget": table([-4.0, -3.0, -5.0]), "held_out": table([-3.0, -4.0], "h")}
AUC = (2 + 1.5 + 1) / 6
REFERENCE_AUC = (0.5 + 1.5 + 0) / 6


def test_every_attack_has_its_auc_and_its_distance_to_the_reference():
    found = mia(RUN, REFERENCE)
    assert found.absent == {}
    attacks = ("loss", "zlib", "min_k", "min_k_plus_plus", "grad_norm")
    assert set(found.metrics) == {
        *(f"{a}_auc{gap}" for a in (*attacks, "reference") for gap in ("", "_gap")), "privleak"
    }  # fmt: skip
    for attack in attacks:
        assert found.metrics[f"{attack}_auc"].value == pytest.approx(AUC, rel=1e-12), attack
        assert found.metrics[f"{attack}_auc_gap"].value == pytest.approx(AUC - REFERENCE_AUC, rel=1e-12), attack
        assert found.metrics[f"{attack}_auc"].n == 5
    # run minus reference: 3, 1, 2 against 1, 0
    assert found.metrics["reference_auc"].value == pytest.approx((2 + 1.5 + 2) / 6, rel=1e-12)
    assert found.metrics["reference_auc_gap"].value == pytest.approx((2 + 1.5 + 2) / 6 - 0.5, rel=1e-12)
    assert found.metrics["privleak"].value == pytest.approx(100 * (REFERENCE_AUC - AUC) / (1 - REFERENCE_AUC))
    for name, estimate in found.metrics.items():
        assert name == "privleak" or 0 <= estimate.low <= estimate.value <= estimate.high <= 1, name


def test_the_reference_against_itself_has_no_gap():
    found = mia(REFERENCE, REFERENCE).metrics
    assert {e.value for name, e in found.items() if name.endswith("_gap")} == {0.0}
    assert (found["reference_auc"].value, found["privleak"].value) == (0.5, 0.0)


def test_the_suite_is_as_scikit_learn_on_random_tables():
    rng = np.random.default_rng(5)
    forget, held_out = -rng.integers(1, 9, 30) / 2, -rng.integers(1, 12, 25) / 2
    found = mia({"forget": table(forget), "held_out": table(held_out, "h")})
    expected = roc_auc_score([1] * 30 + [0] * 25, np.concatenate([forget, held_out]))
    assert found.metrics["min_k_auc"].value == pytest.approx(expected, rel=1e-12)


def test_without_a_reference_nothing_is_invented():
    found = mia(RUN)
    assert set(found.metrics) == {f"{name}_auc" for name in membership.SCORES}
    assert set(found.absent.values()) == {NO_REFERENCE}
    assert set(found.absent) == {f"{a}_auc_gap" for a in membership.SCORES} | {
        "reference_auc", "reference_auc_gap", "privleak"
    }  # fmt: skip


@pytest.mark.parametrize("group", ["forget", "held_out"])
def test_without_one_of_the_groups_all_is_absent(group):
    found = mia({**RUN, group: []}, REFERENCE)
    assert found.metrics == {}
    assert set(found.absent.values()) == {f"no examples of the group {group} were measured"}
    assert "privleak" in found.absent and "min_k_auc" in found.absent


def test_without_columns_only_what_needs_them_is_absent():
    bare = {
        group: [{k: v for k, v in r.items() if k not in ("token_means", "grad_norm")} for r in rows]
        for group, rows in RUN.items()
    }
    found = mia(bare, REFERENCE)
    assert found.absent == {
        "min_k_plus_plus_auc": "the table has no column token_means",
        "min_k_plus_plus_auc_gap": "the table has no column token_means",
        "grad_norm_auc": NO_NORMS,
        "grad_norm_auc_gap": NO_NORMS,
    }
    assert found.metrics["min_k_auc"].value == pytest.approx(AUC, rel=1e-12)


def test_rows_without_a_score_are_left_out_in_both_models():
    bare = dict(RUN["forget"][0], logps=[-1.0], token_means=[0.0], token_deviations=[1.0])
    run = {**RUN, "forget": [bare, *RUN["forget"][1:]]}
    found = mia(run, REFERENCE).metrics
    assert (found["min_k_auc"].n, found["min_k_auc_gap"].n, found["loss_auc"].n) == (4, 4, 5)
    assert found["min_k_auc_gap"].value == pytest.approx((1.5 + 1) / 4 - (1.5 + 0) / 4, rel=1e-12)
    none = {**RUN, "held_out": [dict(r, logps=[-1.0], token_means=None, grad_norm=None) for r in RUN["held_out"]]}
    absent = mia(none, REFERENCE).absent
    assert absent["min_k_auc"] == absent["privleak"] == absent["grad_norm_auc"]
    assert absent["min_k_auc"] == "no example of the group held_out has what this attack needs"


def test_a_broken_model_has_no_auc():
    run = {**RUN, "forget": table([math.nan, -1.0])}
    assert mia(run).absent["loss_auc"] == "the model gives scores that are not numbers in the group forget"


def test_an_impossible_answer_is_the_least_member_like():
    run = {**RUN, "forget": table([-INF, -1.0])}
    assert mia(run).metrics["loss_auc"].value == pytest.approx((0 + 2) / 4)


class TestCommonExamples:
    def test_are_those_with_the_same_question_and_answer_in_the_runs_order(self):
        run, reference = table([-1, -2, -3]), table([-7, -8, -9])[::-1]
        own, other = common({"forget": run}, {"forget": reference[:2]}, ["forget"])
        assert [r["logps"][0] for r in own["forget"]] == [-2, -3]
        assert [r["logps"][0] for r in other["forget"]] == [-8, -9]

    def test_equal_ones_go_with_each_other_one_by_one(self):
        run, reference = ([row(grad_norm=i) for i in range(n)] for n in (3, 2))
        own, other = common({"forget": run}, {"forget": reference}, ["forget"])
        assert [r["grad_norm"] for r in own["forget"]] == [r["grad_norm"] for r in other["forget"]] == [0, 1]

    @pytest.mark.parametrize("reference", [{}, {"forget": []}, {"forget": table([-1], "other")}])
    def test_none_is_missing_and_no_error(self, reference):
        with pytest.raises(Missing, match="measured on none of the examples of the group forget"):
            common(RUN, reference, ["forget"])


def test_only_numpy_is_imported():
    code = (
        "import sys, hf_clmul.evaluation.membership;"
        "print(sorted({'numpy', 'torch', 'scipy', 'sklearn', 'rouge_score'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"
