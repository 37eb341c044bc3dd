"""Sampling: bounds by hand, against scipy and against the truth; and which answers are drawn."""

import math

import numpy as np
import pytest
from audit_probe_bed import CHATS, PAIRS, QUESTIONS, Subject
from scipy.stats import beta, binom, binomtest

from hf_clmul.data.encoding import encode_prompt
from hf_clmul.data.roles import derived_seed
from hf_clmul.evaluation.audit.protocol import Absent, AuditData
from hf_clmul.evaluation.audit.sampling import (
    clopper_pearson,
    dkw_margin,
    leakage,
    mean_bound,
    mean_probability_bound,
    quantile_bound,
    sample,
    tail_bound,
)
from hf_clmul.evaluation.metrics import rouge_l_recall
from hf_clmul.models.causal_lm import generate


def test_no_leak_in_n_samples():
    """(1 - p)^n = 0.05."""
    assert clopper_pearson(0, 16, 0.95) == pytest.approx(1 - 0.05 ** (1 / 16))
    assert clopper_pearson(0, 1, 0.95) == pytest.approx(0.95)
    assert clopper_pearson(7, 7, 0.95) == 1.0


@pytest.mark.parametrize(("leaks", "samples"), [(0, 5), (1, 5), (3, 16), (15, 16), (100, 1024)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_clopper_pearson_is_that_of_scipy(leaks, samples, confidence):
    found = clopper_pearson(leaks, samples, confidence)
    assert found == pytest.approx(beta.ppf(confidence, leaks + 1, samples - leaks), abs=1e-12)
    exact = binomtest(leaks, samples, alternative="less").proportion_ci(confidence, method="exact").high
    assert found == pytest.approx(exact, abs=1e-9)
    assert binom.cdf(leaks, samples, found) == pytest.approx(1 - confidence)


def test_the_mean_probability_of_several_questions():
    """Half of the draws always leak and half never do: the bound must be at least 1/2, and S is 8 whatever is drawn."""
    assert mean_probability_bound(8, 16, 0.95) == clopper_pearson(8, 16, 0.95) > 0.5
    assert clopper_pearson(8, 16, 0.6) < 9 / 16 == mean_probability_bound(8, 16, 0.6)
    assert mean_probability_bound(15, 16, 0.95) == 1.0 > clopper_pearson(15, 16, 0.95)
    assert mean_probability_bound(16, 16, 0.95) == 1.0


def test_the_margin_and_the_tail_by_hand():
    assert dkw_margin(8, 1 - math.exp(-1)) == pytest.approx(0.25)  # sqrt(1 / 16)
    scores, confidence = [0.0, 0.0, 0.0, 0.2, 0.2, 0.4, 0.6, 1.0], 1 - math.exp(-1)
    assert tail_bound(scores, 0.5, confidence) == pytest.approx(0.25 + 0.25)
    assert tail_bound(scores, 0.2, confidence) == pytest.approx(0.375 + 0.25)  # exceeds: not those at 0.2
    assert tail_bound(scores, -0.1, confidence) == 1.0 and tail_bound(scores, 1.0, confidence) == 0.0


def test_the_mean_by_hand_and_as_the_integral_of_the_tail():
    confidence = 1 - math.exp(-1)
    # From 0 to 0.5 min(1, 1 + 0.25), from 0.5 to 1 the margin alone.
    assert mean_bound([0.5] * 8, confidence) == pytest.approx(0.5 + 0.5 * 0.25)
    scores = np.random.default_rng(0).random(20)
    levels = (np.arange(20000) + 0.5) / 20000
    integral = np.mean([tail_bound(scores, level, 0.95) for level in levels])
    assert mean_bound(scores, 0.95) == pytest.approx(integral, abs=1e-3)
    assert scores.mean() < mean_bound(scores, 0.95) < scores.mean() + dkw_margin(20, 0.95)


def test_the_quantile_is_an_order_statistic():
    scores = np.arange(1, 17) / 16  # 0.8^16 = 0.028 < 0.05 <= P(at least 15 of 16 below) = 0.141
    assert quantile_bound(scores, 0.8, 0.95) == 1.0 and quantile_bound(scores / 2, 0.8, 0.95) == 0.5
    assert quantile_bound(scores / 2, 0.8, 0.85) == 15 / 32
    assert quantile_bound(scores / 2, 0.9, 0.95) == 1.0  # 0.9^16 = 0.185: sixteen are too few, nothing is known
    assert quantile_bound(scores[::-1] / 2, 0.5, 0.95) == 12 / 32  # P(Binomial(16, 1/2) < 12) = 0.962, < 11: 0.895


def test_the_bounds_hold_as_often_as_they_say():
    """Scores uniform on [0, 1]: mean 1/2, quantile 0.8 at 0.8, above 0.8 with probability 0.2."""
    draws = np.random.default_rng(1).random((2000, 30))
    held = {
        "leak": np.mean([clopper_pearson(int((d > 0.8).sum()), 30, 0.9) >= 0.2 for d in draws]),
        "mean": np.mean([mean_bound(d, 0.9) >= 0.5 for d in draws]),
        "quantile": np.mean([quantile_bound(d, 0.8, 0.9) >= 0.8 for d in draws]),
    }
    assert min(held.values()) >= 0.89, held
    assert held["quantile"] < 0.97 and held["leak"] < 0.97  # and they are not idle


def test_leakage_by_hand():
    values = leakage([[0.0, 1.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.2], [None] * 4], 0.5, 0.95, 0.4)
    assert values["sampled_rouge_mean"] == pytest.approx([0.5, 0.05, None])
    assert values["sampled_rouge_max"] == [1.0, 0.2, None]
    assert values["leak_share"] == [0.75, 0.0, None]
    assert values["leak_bound"] == [clopper_pearson(3, 4, 0.95), clopper_pearson(0, 4, 0.95), None]
    assert values["leak_bound_overall"] == [mean_probability_bound(3, 8, 0.95)] * 2 + [None]
    assert values["mean_bound"] == [mean_bound([0.0, 1.0, 0.5, 0.5], 0.95), mean_bound([0, 0, 0, 0.2], 0.95), None]
    assert values["quantile_bound"] == [1.0, 0.2, None]  # 0.4^4 = 0.026: the largest of four


def test_the_answers_are_those_of_their_seeds_however_they_are_batched():
    subject = Subject()
    forget = [*QUESTIONS, CHATS[0]]
    whole = list(sample(subject, AuditData(forget), 7, samples=5, max_new_tokens=8, batch_size=3))
    assert [(point.x, point.label) for point in whole] == [
        (1.0, "1 sample"), (2.0, "2 samples"), (4.0, "4 samples"), (5.0, "5 samples"),
    ]  # fmt: skip
    alone = list(sample(subject, AuditData(forget), 7, samples=4, max_new_tokens=8, batch_size=1))
    assert [point.values for point in alone] == [point.values for point in whole[:3]]
    texts = [
        generate(subject.model, subject.tokenizer, [encode_prompt(forget[1], subject.tokenizer)], 8,
                 [derived_seed(7, "sample", 1, drawn)])[0]
        for drawn in range(1, 6)
    ]  # fmt: skip
    scores = [rouge_l_recall({"answer": PAIRS[1][1], "generated": text}) for text in texts]
    assert len(set(texts)) == 5
    assert whole[-1].values["sampled_rouge_mean"][1] == pytest.approx(np.mean(scores))
    best = {
        "id": forget[1]["id"],
        "question": PAIRS[1][0],
        "answer": PAIRS[1][1],
        "generated": texts[int(np.argmax(scores))],
    }
    assert whole[-1].samples[1] == best and len(whole[-1].samples) == 3
    other = list(sample(subject, AuditData(forget), 8, samples=1, max_new_tokens=8))
    assert other[0].samples != whole[0].samples


def test_a_model_that_knows_the_answer_leaks(monkeypatch):
    """The sampler is told to say the truth every second time."""
    said = iter(range(10**6))

    def told(model, tokenizer, prompts, most, seeds):
        return [PAIRS[0][1] if next(said) % 2 else "Nothing." for _ in prompts]

    monkeypatch.setattr("hf_clmul.models.causal_lm.generate", told)
    *_, last = sample(Subject(), AuditData(QUESTIONS[:1]), 0, samples=6)
    assert last.values["leak_share"] == [0.5] and last.values["sampled_rouge_max"] == [1.0]
    assert last.samples[0]["generated"] == PAIRS[0][1]


def test_answers_without_words_to_compare_are_absent():
    with pytest.raises(Absent, match="no forgotten answer has words"):
        next(sample(Subject(), AuditData([{"question": "Wo?", "answer": "東京"}]), 0))
    mixed = AuditData([{"question": "Where?", "answer": "東京"}, QUESTIONS[0]])
    point = next(sample(Subject(), mixed, 0, samples=1, max_new_tokens=2))
    assert point.values["leak_bound"][0] is None and point.values["leak_bound"][1] is not None
    with pytest.raises(Absent, match="plain text"):
        next(sample(Subject(), AuditData([{"id": "x", "text": "Ada lives in Bern."}]), 0))
