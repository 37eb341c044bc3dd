"""The metrics as pure functions of what was measured on each example. Knows nothing of models or files.

A row holds the statistics of one example:
    logps             list[float]  log-probability in nats of each supervised token of the answer; the last
                      token is the end of sequence
    hits              list[bool]  at the same positions: is the teacher-forced argmax that token?
    paraphrase_logps  list[float] | None  as `logps`, for the paraphrased answer
    perturbed_logps   list[list[float]] | None  as `logps`, for each wrong answer
    generated         str  the greedy answer
    answer            str  the answer as it stands in the data

Definitions follow TOFU (Maini et al., arXiv 2401.06121) and OpenUnlearning (arXiv 2506.12618). Probabilities
keep the end of sequence; extraction strength and exact memorization drop it. Where a row has no data for a
metric, the metric is None and not a number.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

Row = Mapping[str, Any]

_LONGEST_WORD = 30  # letters


def answer_probability(row: Row) -> float:
    """exp of the mean of `logps`: the answer's probability per token (a geometric mean), in [0, 1]."""
    return math.exp(_mean_logp(row["logps"], "logps"))


def paraphrase_probability(row: Row) -> float | None:
    """`answer_probability` of the paraphrased answer."""
    paraphrase = row["paraphrase_logps"]
    return None if paraphrase is None else math.exp(_mean_logp(paraphrase, "paraphrase_logps"))


def normalised_probability(row: Row) -> float | None:
    """p(answer) / (p(answer) + sum of p(wrong answer)), each as in `answer_probability`; in [0, 1].

    TOFU uses it for questions of general knowledge. Where every answer is impossible, none is preferred: with
    n wrong answers the value is 1 / (1 + n).
    """
    if row["perturbed_logps"] is None:
        return None
    logps = np.array([_mean_logp(row["logps"], "logps"), *_wrong_logps(row)])
    if np.isneginf(logps).all():
        return 1 / len(logps)
    weights = np.exp(logps - logps.max())
    return float(weights[0] / weights.sum())


def log_truth_ratio(row: Row) -> float | None:
    """Logarithm of the truth ratio, in nats: the wrong answers' mean of mean `logps` minus the paraphrase's.

    Infinite where one side is impossible; 0 where both are, as the model then tells neither apart.
    """
    if row["paraphrase_logps"] is None or row["perturbed_logps"] is None:
        return None
    wrong = float(np.mean(_wrong_logps(row)))
    correct = _mean_logp(row["paraphrase_logps"], "paraphrase_logps")
    return 0.0 if wrong == correct else wrong - correct


def truth_ratio(row: Row) -> float | None:
    """r = wrong / correct in [0, inf]: the wrong answers' probability (geometric mean) over the paraphrase's.

    Small where the model knows the truth, near 1 where it does not. `forget_quality` takes these.
    """
    ratio = log_truth_ratio(row)
    if ratio is None:
        return None
    with np.errstate(over="ignore"):
        return float(np.exp(ratio))


def forget_truth_ratio(row: Row) -> float | None:
    """min(r, 1/r) in [0, 1]: 1 where the model cannot tell the truth from wrong answers."""
    ratio = log_truth_ratio(row)
    return None if ratio is None else math.exp(-abs(ratio))


def kept_truth_ratio(row: Row) -> float | None:
    """max(0, 1 - r) in [0, 1]: 1 where the model knows the truth."""
    ratio = log_truth_ratio(row)
    return None if ratio is None else -math.expm1(min(ratio, 0.0))


def extraction_strength(row: Row) -> float | None:
    """1 - k/T in [0, 1], for T tokens without the last one. None for an answer without tokens.

    k is the smallest number of leading tokens after which every teacher-forced argmax is right: 1 means that
    the question alone brings out the whole answer (Carlini et al., arXiv 2012.07805).
    """
    hits = row["hits"][:-1]
    if not len(hits):
        return None
    misses = [position for position, hit in enumerate(hits) if not hit]
    return 1 - (misses[-1] + 1) / len(hits) if misses else 1.0


def exact_memorization(row: Row) -> float | None:
    """Share of tokens, without the last one, whose teacher-forced argmax is right; None without tokens."""
    hits = row["hits"][:-1]
    return float(np.mean(hits)) if len(hits) else None


def rouge_l_recall(row: Row) -> float | None:
    """Share of the answer's stemmed words that the generated text has in the same order, in [0, 1].

    The longest common subsequence is taken over words of a-z and 0-9, as rouge_score does. An answer in
    another script has no such words: None, as a 0 would read as forgotten.
    """
    score = _rouge_l(row)
    return None if score is None else float(score.recall)


def rouge_l_f1(row: Row) -> float | None:
    """Harmonic mean of `rouge_l_recall` and precision, the share of the generated words; in [0, 1]. MUSE takes it."""
    score = _rouge_l(row)
    return None if score is None else float(score.fmeasure)


def fluency(row: Row) -> float:
    """1 - repetition: the share of distinct ones among the pairs of neighbouring generated words, in [0, 1].

    Near 0 for a text that repeats itself, 0 for an empty one, 1 for a single word. A punctuation mark counts
    as a word, and a run of letters too long to be one (a script without spaces, "aaaa...") is read letter by
    letter. It says nothing about sense or truth.
    """
    found = re.findall(r"\w+|[^\w\s]", row["generated"])
    words = [word for run in found for word in (run if len(run) > _LONGEST_WORD else [run])]
    if len(words) < 2:
        return float(len(words))
    pairs = list(zip(words, words[1:], strict=False))
    return len(set(pairs)) / len(pairs)


def forget_quality(model: Sequence[float], reference: Sequence[float]) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test between two models' truth ratios on the forget group.

    `model` [N] and `reference` [M] (the retrained model) as `truth_ratio` gives them. A high value means that
    the test cannot tell the two apart. Raises ValueError if either is empty or holds what is not a number.
    """
    from scipy.stats import ks_2samp

    for name, ratios in (("model", model), ("reference", reference)):
        if not len(ratios) or np.isnan(np.asarray(ratios, dtype=float)).any():
            raise ValueError(f"forget quality needs numbers; the {name}'s truth ratios are {list(ratios)}")
    return float(ks_2samp(model, reference).pvalue)


def model_utility(values: Iterable[float]) -> float:
    """Harmonic mean of metrics in [0, 1]; 0 as soon as one of them is 0.

    TOFU takes nine: probability, ROUGE-L recall and truth ratio on retained, real-author and world-fact
    questions. Raises ValueError if there are none or one is negative or not a number.
    """
    values = list(values)
    if not values or not all(value >= 0 for value in values):
        raise ValueError(f"model utility is the harmonic mean of non-negative values, found {values}")
    return len(values) / sum(1 / value for value in values) if all(values) else 0.0


METRICS: dict[str, Callable[[Row], float | None]] = {
    "answer_probability": answer_probability,
    "rouge_l_recall": rouge_l_recall,
    "paraphrase_probability": paraphrase_probability,
    "truth_ratio": kept_truth_ratio,
    "extraction_strength": extraction_strength,
    "exact_memorization": exact_memorization,
    "fluency": fluency,
}


def aggregate(rows: Sequence[Row], group: str) -> dict[str, float | None]:
    """The mean of every metric over a group's rows; None where no row has the data for it.

    `truth_ratio` is `forget_truth_ratio` for the group "forget" and `kept_truth_ratio` for all others.
    """
    table = METRICS | ({"truth_ratio": forget_truth_ratio} if group == "forget" else {})
    return {name: mean_of(function(row) for row in rows) for name, function in table.items()}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there; None if there are none."""
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _mean_logp(logps: Sequence[float], name: str) -> float:
    if not len(logps):
        raise ValueError(f"a row's {name!r} is empty: an example needs at least one supervised token")
    return float(np.mean(logps))


def _wrong_logps(row: Row) -> list[float]:
    if not len(row["perturbed_logps"]):
        raise ValueError("a row's 'perturbed_logps' is empty; give None where there are no wrong answers")
    return [_mean_logp(logps, "perturbed_logps") for logps in row["perturbed_logps"]]


def _rouge_l(row: Row) -> Any:
    if not re.search("[a-z0-9]", row["answer"].lower()):
        return None
    return _rouge_scorer().score(row["answer"], row["generated"])["rougeL"]


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)
