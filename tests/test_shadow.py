"""Shadow models: hand-computed ratios, Gaussians whose AUC is known, and a runner that goes on where it was."""

import json
import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from hf_clmul.errors import RunError
from hf_clmul.evaluation import shadow
from hf_clmul.evaluation.shadow import attack, confidence, halves, log_likelihood_ratios, run_shadows, true_positives


def test_confidence_is_the_logit_of_the_probability_per_token():
    assert confidence({"logps": [math.log(0.5), math.log(0.125)]}) == pytest.approx(math.log(0.25 / 0.75), rel=1e-12)
    assert confidence({"logps": [math.log(0.5)]}) == pytest.approx(0, abs=1e-12)
    certain, impossible = (confidence({"logps": [logp]}) for logp in (0.0, -math.inf))
    assert 18 < certain < 19 and impossible == -1000


def test_halves_are_opposite_pairs_and_repeatable():
    chosen = halves(9, 20, seed=3)
    assert chosen.shape == (40, 9) and (chosen[::2] == ~chosen[1::2]).all()
    assert (chosen.sum(axis=0) == 20).all(), "every example is with half of the models"
    assert set(chosen[::2].sum(axis=1)) == {4}
    assert (chosen == halves(9, 20, seed=3)).all() and (chosen != halves(9, 20, seed=4)).any()
    assert (chosen[:10] == halves(9, 5, seed=3)).all(), "more pairs keep those that are there"
    assert 0 < chosen[::2].mean(axis=0).min() < chosen[::2].mean(axis=0).max() < 1


def test_the_ratio_of_one_example_by_hand():
    # With: 3, 5 | 4, 6 | 2, 8 ; without: 0, 1 | 1, 3 | 2, 2. Odd rows are the opposite of even ones.
    scores = np.array([[3.0], [0.0], [4.0], [1.0], [8.0], [2.0]])
    learned = np.array([[True], [False]] * 3)
    found = log_likelihood_ratios(scores, learned)
    for pair in range(3):
        others = [i for i in range(3) if i != pair]
        with_, without = scores[[2 * i for i in others], 0], scores[[2 * i + 1 for i in others], 0]
        for side in range(2):
            expected = norm.logpdf(scores[2 * pair + side, 0], with_.mean(), with_.std(ddof=1)) - norm.logpdf(
                scores[2 * pair + side, 0], without.mean(), without.std(ddof=1)
            )
            assert found[2 * pair + side, 0] == pytest.approx(expected, rel=1e-9)


def test_few_models_share_their_deviation_over_examples():
    rng = np.random.default_rng(0)
    learned = halves(4, 5, seed=0)
    scores = rng.normal(size=learned.shape) * [1, 2, 3, 4] + 2 * learned
    found = log_likelihood_ratios(scores, learned)
    others = np.arange(2, 10)
    expected = np.zeros(4)
    for sign, side in ((1, learned[others]), (-1, ~learned[others])):
        groups = [scores[others, j][side[:, j]] for j in range(4)]
        variance = sum(((g - g.mean()) ** 2).sum() for g in groups) / sum(len(g) - 1 for g in groups)
        expected += sign * np.array([norm.logpdf(scores[0, j], g.mean(), variance**0.5) for j, g in enumerate(groups)])
    assert found[0] == pytest.approx(expected, rel=1e-9)


def test_many_models_have_a_deviation_for_each_example(monkeypatch):
    rng = np.random.default_rng(0)
    learned = halves(2, 5, seed=0)
    scores = rng.normal(size=learned.shape) * [1, 5]
    shared = log_likelihood_ratios(scores, learned)
    monkeypatch.setattr(shadow, "_ENOUGH", 4)
    own = log_likelihood_ratios(scores, learned)
    side = learned[2:, 0]
    fits = [(g.mean(), g.std(ddof=1)) for g in (scores[2:, 0][side], scores[2:, 0][~side])]
    assert own[0, 0] == pytest.approx(
        norm.logpdf(scores[0, 0], *fits[0]) - norm.logpdf(scores[0, 0], *fits[1]), rel=1e-9
    )
    assert not np.allclose(own, shared)


@pytest.mark.parametrize("distance", [0.0, 1.0, 2.0])
def test_gaussians_give_the_auc_that_theory_gives(distance):
    """Scores N(0, 1) without and N(d, 1) with: the best test has AUC Phi(d / sqrt 2) and TPR Phi(d - 2.326)."""
    rng = np.random.default_rng(1)
    learned = halves(300, 40, seed=2)
    level = rng.normal(size=300) * 5  # examples differ far more than what learning does
    found = attack(level + rng.normal(size=learned.shape) + distance * learned, learned, draws=50)
    assert found.auc.value == pytest.approx(norm.cdf(distance / math.sqrt(2)), abs=0.015)
    assert found.tpr.value == pytest.approx(norm.cdf(distance - norm.ppf(0.99)), abs=0.03)
    assert found.auc.low < found.auc.value < found.auc.high
    assert np.mean(found.right) == pytest.approx(norm.cdf(distance / 2), abs=0.02)
    assert (found.models, found.auc.n, found.tpr.n, len(found.right)) == (80, 300, 300, 300)


def test_an_attack_on_single_examples_sees_what_a_population_attack_does_not():
    rng = np.random.default_rng(1)
    learned = halves(100, 20, seed=2)
    scores = rng.normal(size=100) * 50 + rng.normal(size=learned.shape) + 3 * learned
    population = roc_auc_score(learned[0], scores[0])
    assert population < 0.65 and attack(scores, learned, draws=2).auc.value > 0.97


def test_few_models_without_a_difference_look_like_guessing():
    """Were a model's opposite among its judges, one side would have more of them, and the AUC lie beside 0.5."""
    rng = np.random.default_rng(0)
    found = [attack(rng.normal(size=(6, 40)), halves(40, 3, seed=i), draws=2).auc.value for i in range(200)]
    assert np.mean(found) == pytest.approx(0.5, abs=0.01)


def test_equal_scores_tell_nothing():
    learned = halves(10, 3, seed=0)
    found = attack(np.zeros(learned.shape), learned)
    assert (found.auc.value, found.auc.low, found.auc.high, found.tpr.value) == (0.5, 0.5, 0.5, 0.0)
    assert found.right == [0.5] * 10


@pytest.mark.parametrize(
    ("negatives", "expected"),
    [
        (np.arange(100), 2 / 3),  # 99 alone may be above: the threshold is 98
        (np.arange(99), 2 / 3),  # none may: 98 again
        (np.arange(200), 1 / 3),  # 199 and 198 may: 197
        ([300.0], 0.0),
        ([-1.0], 1.0),
    ],
)
def test_true_positives_at_one_percent(negatives, expected):
    assert true_positives(np.array([98.0, 98.5, 200.0]), np.array(negatives)) == pytest.approx(expected)


@pytest.mark.parametrize("models", [4, 5, 6])
def test_shadow_models_come_in_three_opposite_pairs(models):
    learned = np.zeros((models, 3), dtype=bool)
    with pytest.raises(ValueError, match="at least three opposite pairs"):
        log_likelihood_ratios(np.zeros((models, 3)), learned)


class TestRunner:
    @staticmethod
    def train(calls):
        def train(indices, seed):
            calls.append(seed)
            return [seed + 10 * (i in indices) for i in range(5)]

        return train

    def test_each_model_learns_its_half_with_its_own_seed(self, tmp_path):
        scores, learned = run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 3})
        assert (learned == halves(5, 3, 7)).all()
        assert (scores == 10 * learned + np.arange(7, 13)[:, None]).all()

    def test_it_goes_on_where_it_was(self, tmp_path):
        calls = []
        train = self.train(calls)

        def killed(indices, seed):
            if len(calls) == 3:
                raise KeyboardInterrupt
            return train(indices, seed)

        with pytest.raises(KeyboardInterrupt):
            run_shadows(killed, 5, 3, 7, tmp_path, {"steps": 3})
        whole = run_shadows(train, 5, 3, 7, tmp_path, {"steps": 3})
        assert calls == [7, 8, 9, 10, 11, 12]
        again = run_shadows(train, 5, 3, 7, tmp_path, {"steps": 3})
        assert len(calls) == 6 and (again[0] == whole[0]).all()
        assert (whole[0] == run_shadows(train, 5, 3, 7, tmp_path / "other", {"steps": 3})[0]).all()

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": '])
    def test_a_broken_file_is_named(self, tmp_path, text):
        run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 3})
        (tmp_path / "shadow-0002.json").write_text(text)
        with pytest.raises(RunError, match="shadow-0002.json is no record of a shadow model. Delete it"):
            run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 3})

    def test_a_folder_of_other_settings_is_refused(self, tmp_path):
        run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 3})
        with pytest.raises(RunError, match="other settings"):
            run_shadows(self.train([]), 5, 3, 8, tmp_path, {"steps": 3})
        with pytest.raises(RunError, match="other settings"):
            run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 4})
        file = tmp_path / "shadow-0000.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"scores": [1.0]}))
        with pytest.raises(RunError, match="other settings"):
            run_shadows(self.train([]), 5, 3, 7, tmp_path, {"steps": 3})

    def test_a_score_for_every_candidate(self, tmp_path):
        with pytest.raises(ValueError, match="1 scores for 5 candidates"):
            run_shadows(lambda indices, seed: [0.0], 5, 3, 7, tmp_path, {"steps": 3})
        assert not list(tmp_path.glob("*.json"))
