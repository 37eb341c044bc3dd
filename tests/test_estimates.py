"""Estimates: hand-computed values, exact bootstrap distributions, and the samples that give no interval."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from hf_clmul.evaluation import estimates
from hf_clmul.evaluation.estimates import Estimate, auc, auc_estimate, auc_gap_estimate, gap_estimate, mean_estimate

INF = float("inf")


def test_mean_of_what_is_there():
    found = mean_estimate([1.0, None, 0.0, 0.5])
    assert (found.value, found.n) == (0.5, 3)
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert mean_estimate([]) is None and mean_estimate([None]) is None


def test_the_record_has_four_keys():
    assert Estimate(0.5, 3, None, 0.7).record() == {"value": 0.5, "n": 3, "low": None, "high": 0.7}


def test_two_values_reach_from_one_to_the_other():
    # Both draws are the smaller value with probability 1/4, far above the 2.5 % that the interval leaves out.
    assert mean_estimate([0.2, 0.4]) == Estimate(pytest.approx(0.3), 2, 0.2, 0.4)


@pytest.mark.parametrize(("n", "ones"), [(5, 1), (20, 10), (40, 30)])
def test_shares_have_the_binomial_interval(n, ones):
    found = mean_estimate([1.0] * ones + [0.0] * (n - ones), draws=50_000)
    exact = binom.ppf([0.025, 0.975], n, ones / n) / n
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=1e-12)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(7)
    found = [mean_estimate(rng.normal(size=60), seed=i, draws=400) for i in range(600)]
    covered = np.mean([e.low <= 0 <= e.high for e in found])
    assert 0.92 <= covered <= 0.965, covered  # 60 values: a little below 95 %


@pytest.mark.parametrize("size", [1, 2, 30])
def test_equal_values_have_no_width_and_one_value_no_interval(size):
    ends = (None, None) if size == 1 else (0.1, 0.1)
    assert mean_estimate([0.1] * size) == Estimate(pytest.approx(0.1), size, *ends)
    assert gap_estimate([0.3] * size, [0.2] * size) == Estimate(
        pytest.approx(0.1), size, *(end and pytest.approx(end) for end in ends)
    )
    ends = (None, None) if size == 1 else (0.5, 0.5)
    assert auc_estimate([1.0] * size, [1.0] * size) == Estimate(0.5, 2 * size, *ends)
    assert auc_estimate([2.0] * size, [1.0, 0.0]).low == (None if size == 1 else 1.0)


@pytest.mark.parametrize("bad", [float("nan"), INF, -INF])
def test_means_and_gaps_refuse_what_is_not_finite(bad):
    with pytest.raises(ValueError, match="mean needs finite numbers"):
        mean_estimate([0.5, bad])
    with pytest.raises(ValueError, match="gap needs finite numbers"):
        gap_estimate([0.5, bad], [0.5, bad])


def test_the_same_arguments_give_the_same_interval():
    values = np.random.default_rng(0).random(50)
    assert mean_estimate(values) == mean_estimate(list(values))
    assert mean_estimate(values, seed=1) != mean_estimate(values, seed=2)
    assert mean_estimate(values, seed=1).value == mean_estimate(values, seed=2).value
    halves = (values[:20], values[20:])
    assert auc_estimate(*halves, seed=1) == auc_estimate(*halves, seed=1) != auc_estimate(*halves, seed=2)


def test_blocks_of_draws_change_no_value_and_leave_no_draw_out(monkeypatch):
    ones = [1.0] * 30 + [0.0] * 10
    monkeypatch.setattr(estimates, "_BLOCK", 90)  # two draws at once
    found = mean_estimate(ones, draws=50_000 // 10 + 1)
    assert (found.low, found.high) == pytest.approx(tuple(binom.ppf([0.025, 0.975], 40, 0.75) / 40), abs=0.026)
    assert len(estimates._means(np.array(ones), 0, 7)) == 7
    assert [len(a) for a in estimates.drawn_aucs([(ones, ones), (ones, ones)], 0, 7)] == [7, 7]


class TestAuc:
    @pytest.mark.parametrize(
        ("positives", "negatives", "expected"),
        [
            ([3, 4], [1, 2], 1.0),
            ([1, 2], [3, 4], 0.0),
            ([1, 3], [2], 1 / 2),
            ([1, 2, 3], [2, 0], (1 + 1.5 + 2) / 6),  # 2 against 2 counts half
            ([INF, 0], [-INF, 0], 3.5 / 4),
            ([INF], [INF], 0.5),
        ],
    )
    def test_hand_computed(self, positives, negatives, expected):
        assert auc(positives, negatives) == pytest.approx(expected, abs=1e-15)

    @pytest.mark.parametrize("seed", range(5))
    def test_as_scikit_learn(self, seed):
        rng = np.random.default_rng(seed)
        positives, negatives = rng.integers(0, 12, 40) / 3, rng.integers(-2, 10, 70) / 3  # many ties
        labels = [1] * 40 + [0] * 70
        expected = roc_auc_score(labels, np.concatenate([positives, negatives]))
        assert auc(positives, negatives) == pytest.approx(expected, abs=1e-12)
        assert auc(negatives, positives) == pytest.approx(1 - expected, abs=1e-12)

    @pytest.mark.parametrize(("positives", "negatives"), [([], [1.0]), ([1.0], []), ([float("nan")], [1.0])])
    def test_refuses_what_has_no_order(self, positives, negatives):
        with pytest.raises(ValueError, match="an AUC needs numbers on both sides"):
            auc(positives, negatives)

    def test_a_draw_is_the_auc_of_the_drawn_scores(self):
        # Two positives around one level of two equal negatives: a draw is 0, 1/2 or 1.
        found = auc_estimate([0.0, 2.0], [1.0, 1.0])
        assert found == Estimate(0.5, 4, 0.0, 1.0)
        assert set(estimates.drawn_aucs([([0.0, 2.0], [1.0, 1.0])], 0, 200)[0]) == {0.0, 0.5, 1.0}

    def test_the_interval_covers_the_truth(self):
        rng = np.random.default_rng(3)
        drawn = ((rng.normal(size=40) + 1, rng.normal(size=60)) for _ in range(400))
        found = [auc_estimate(*sides, draws=300) for sides in drawn]
        truth = 0.7602499389  # Phi(1 / sqrt 2)
        covered = np.mean([e.low <= truth <= e.high for e in found])
        assert 0.91 <= covered <= 0.98, covered


class TestGaps:
    def test_the_absolute_difference_of_means_over_common_examples(self):
        found = gap_estimate([0.1, None, 0.3, 9.0], [0.4, 5.0, 0.2, None])
        assert (found.value, found.n) == (pytest.approx(0.1), 2)  # -0.3 and 0.1
        assert (found.low, found.high) == (0.0, pytest.approx(0.3))
        assert gap_estimate([None], [1.0]) is None

    def test_an_open_sign_reaches_down_to_zero_and_a_clear_one_does_not(self):
        rng = np.random.default_rng(0)
        reference = rng.random(100)
        same = reference + rng.normal(size=100) * 0.1
        assert gap_estimate(same, reference).low == 0.0
        for sign in (1, -1):
            clear = gap_estimate(same + sign * 0.5, reference)
            assert 0.4 < clear.low < clear.value < clear.high < 0.6

    def test_pairing_takes_out_what_the_examples_share(self):
        rng = np.random.default_rng(0)
        hard = rng.random(50) * 10
        found = gap_estimate(hard + 0.1, hard)
        assert found.value == pytest.approx(0.1)
        assert (found.low, found.high) == pytest.approx((0.1, 0.1))

    def test_other_lengths_are_an_error(self):
        with pytest.raises(ValueError, match="shorter|longer"):
            gap_estimate([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match=r"found \(2, 1\) and \(1, 1\)"):
            auc_gap_estimate(([1, 2], [1]), ([1], [1]))

    def test_of_aucs(self):
        run, reference = ([3.0, 4.0], [1.0, 2.0]), ([1.0, 3.0], [2.0, 2.0])
        found = auc_gap_estimate(run, reference)
        assert (found.value, found.n) == (0.5, 4)
        assert (found.low, found.high) == (0.0, 1.0)
        assert auc_gap_estimate(run, run) == Estimate(0.0, 4, 0.0, 0.0)
        assert auc_gap_estimate(reference, run) == found

    def test_of_aucs_draws_the_same_examples_for_both(self):
        rng = np.random.default_rng(1)
        scores = (rng.normal(size=30) + 0.5, rng.normal(size=40))
        louder = tuple(3 * side + 1 for side in scores)  # the same order
        assert auc_gap_estimate(scores, louder) == Estimate(0.0, 70, 0.0, 0.0)


def test_any_statistic():
    values = np.array([1.0] * 10 + [0.0] * 10)
    found = estimates.bootstrap(lambda index: float(values[index].mean()), 20, 0.5, draws=50_000)
    assert (found.low, found.high) == pytest.approx(tuple(binom.ppf([0.025, 0.975], 20, 0.5) / 20), abs=1e-12)


def test_only_numpy_is_imported():
    code = (
        "import sys, hf_clmul.evaluation.estimates;"
        "print(sorted({'numpy', 'torch', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"
