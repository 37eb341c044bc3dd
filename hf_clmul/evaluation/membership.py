"""Membership inference: can the forgotten examples be told from examples that were never trained on? Pure functions of
rows (see `metrics`); knows no models. Population attacks: per-example attacks with shadow models are in `shadow`.

A score is larger the more the example looks like a training example; its AUC is taken over the groups `forget`
(members) and `held_out` (never trained on). No AUC is good in itself: 0.5 is no goal where retraining gives 0.45, and
an AUC of 0 tells who was forgotten as clearly as 1. So every attack comes with its distance to the reference's AUC.

LOSS, zlib and reference keep the end of sequence, min-k and min-k++ drop it, as OpenUnlearning does (arXiv 2506.12618).
"""

import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from hf_clmul.evaluation.estimates import (
    DRAWS,
    Estimate,
    Pair,
    auc,
    auc_estimate,
    auc_gap_estimate,
    drawn_aucs,
    from_draws,
)
from hf_clmul.evaluation.metrics import Row
from hf_clmul.evaluation.suite_result import Missing, SuiteResult, Tables, common, rows_of

GROUPS = ("forget", "held_out")  # members, strangers
K = 0.4  # share of tokens in min-k and min-k++, as OpenUnlearning sets it
NO_NORMS = (
    "gradient norms were not asked for (`evaluation.gradient_norms: true`: a backward pass for each example more)"
)
_SMALLEST_DEVIATION = 1e-3  # nats; where the vocabulary has none, every token would be infinitely unusual

Score = Callable[[Row], float | None]


def loss_score(row: Row) -> float | None:
    """Mean of `logps` in nats, minus the loss (Yeom et al., arXiv 1709.01604). None without tokens."""
    return float(np.mean(row["logps"])) if len(row["logps"]) else None


def zlib_score(row: Row) -> float | None:
    """`loss_score` over the bytes of the zlib-compressed answer, nats a byte (Carlini et al., arXiv 2012.07805)."""
    score = loss_score(row)
    return None if score is None else score / len(zlib.compress(row["answer"].encode()))


def min_k_score(row: Row, k: float = K) -> float | None:
    """Mean of the lowest floor(k T), at least one, of the T `logps` without the last (Shi et al., arXiv 2310.16789)."""
    return _lowest(row["logps"][:-1], k)


def min_k_plus_plus_score(row: Row, k: float = K) -> float | None:
    """As `min_k_score`, each token's logp first standardised by the mean and standard deviation of log p over the
    vocabulary, under p itself (Zhang et al., arXiv 2404.02936). A deviation counts as at least 0.001 nats."""
    columns = (row["logps"], row["token_means"], row["token_deviations"])
    if columns[1] is None or columns[2] is None:
        return None
    logps, means, deviations = (np.asarray(column, dtype=float)[:-1] for column in columns)
    return _lowest((logps - means) / np.maximum(deviations, _SMALLEST_DEVIATION), k)


def reference_score(row: Row, reference: Row) -> float | None:
    """How much better than the reference model it is predicted: `loss_score` minus the reference's (arXiv 2012.07805).

    Of two models to which it is impossible, neither predicts it better: 0.
    """
    own, other = loss_score(row), loss_score(reference)
    if own is None or other is None:
        return None
    return 0.0 if own == other else own - other


def grad_norm_score(row: Row) -> float | None:
    """Minus the gradient's norm (see `gradient_norms`): what was trained on has little left to learn."""
    return None if row["grad_norm"] is None else -row["grad_norm"]


SCORES: dict[str, Score] = {
    "loss": loss_score,
    "zlib": zlib_score,
    "min_k": min_k_score,
    "min_k_plus_plus": min_k_plus_plus_score,
    "grad_norm": grad_norm_score,
}


def privleak(value: float, retrained: float) -> float:
    """100 ((1 - AUC) - (1 - AUC of the retrained model)) / (1 - AUC of the retrained model), in percent (MUSE, Shi et
    al., arXiv 2407.06460): 0 is retraining, below 0 too little was forgotten, above 0 too much.

    Raises ValueError for a retrained model with AUC 1, which has no scale.
    """
    if retrained == 1:
        raise ValueError("PrivLeak has no value where the retrained model's AUC is 1")
    return 100 * (retrained - value) / (1 - retrained)


def privleak_estimate(run: Pair, retrained: Pair, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """`privleak` from scores (positives, negatives) of both models on the same examples, in the same order. It has no
    interval where the retrained model's AUC is 1 in some draw. Raises Missing where it is 1 as measured."""
    if auc(*retrained) == 1:
        raise Missing("the reference's AUC is 1, against which PrivLeak has no scale")
    value = privleak(auc(*run), auc(*retrained))
    of_run, of_retrained = drawn_aucs([run, retrained], seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = 100 * (of_retrained - of_run) / (1 - of_retrained)
    sizes = [len(side) for side in run]
    return from_draws(value, sum(sizes), drawn, min(sizes))


def mia(tables: Tables, reference: Tables | None = None, seed: int = 0, draws: int = DRAWS) -> SuiteResult:
    """The suite `mia`: `ATTACK_auc` of every attack, `ATTACK_auc_gap` to the reference's AUC, and `privleak` on min-k.

    `tables` {group: rows}; `reference` the same of the retrained model. Gaps and PrivLeak are over the examples that
    both have (see `suite_result.common`). The attack `reference` compares with the reference's loss: it has no AUC
    without one, and of the reference itself all scores are 0, and the AUC 0.5.
    """
    found = SuiteResult()
    for name, score in SCORES.items():
        found.add(f"{name}_auc", lambda score=score: auc_estimate(*sides(tables, score), seed, draws))
        found.add(
            f"{name}_auc_gap", lambda score=score: auc_gap_estimate(*_both(tables, reference, score), seed, draws)
        )
    found.add("reference_auc", lambda: auc_estimate(*_against(tables, reference)[0], seed, draws))
    found.add("reference_auc_gap", lambda: auc_gap_estimate(*_against(tables, reference), seed, draws))
    found.add("privleak", lambda: privleak_of(tables, reference, seed, draws))
    return found


def privleak_of(tables: Tables, reference: Tables | None, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """`privleak_estimate` on min-k, over the examples that both have. Raises Missing."""
    return privleak_estimate(*_both(tables, reference, min_k_score), seed, draws)


def sides(tables: Tables, score: Score) -> Pair:
    """Scores of the groups `forget` and `held_out`, without the examples that have none. Raises Missing."""
    return _pair([[_score(score, row) for row in rows_of(tables, group)] for group in GROUPS])


def _both(tables: Tables, reference: Tables | None, score: Score) -> tuple[Pair, Pair]:
    """The scores of both models on the examples that have one from both."""
    models = common(tables, reference, GROUPS)
    return _complete([[[_score(score, row) for row in model[group]] for model in models] for group in GROUPS])


def _against(tables: Tables, reference: Tables | None) -> tuple[Pair, Pair]:
    """The scores of the attack `reference`: of the run, and of the reference against itself."""
    own, other = common(tables, reference, GROUPS)
    of_groups = [zip(own[group], other[group], strict=True) for group in GROUPS]
    scores = [[reference_score(row, same) for row, same in rows] for rows in of_groups]
    return _complete([[of_run, [None if score is None else 0.0 for score in of_run]] for of_run in scores])


def _complete(groups: Sequence[Sequence[Sequence[float | None]]]) -> tuple[Pair, Pair]:
    """groups[group][model] of scores -> a pair for each model, of the examples that have a score from both models."""
    kept = [[pair for pair in zip(*models, strict=True) if None not in pair] for models in groups]
    first, second = (_pair([[pair[model] for pair in group] for group in kept]) for model in range(2))
    return first, second


def _score(score: Score, row: Row) -> float | None:
    try:
        return score(row)
    except KeyError as column:
        missing = column.args[0]
        raise Missing(NO_NORMS if missing == "grad_norm" else f"the table has no column {missing}") from None


def _pair(groups: Sequence[Sequence[float | None]]) -> Pair:
    found = [[score for score in scores if score is not None] for scores in groups]
    for name, scores in zip(GROUPS, found, strict=True):
        if not scores:
            raise Missing(f"no example of the group {name} has what this attack needs")
        if any(math.isnan(score) for score in scores):
            raise Missing(f"the model gives scores that are not numbers in the group {name}")
    return found[0], found[1]


def _lowest(scores: Sequence[float], k: float) -> float | None:
    if not len(scores):
        return None
    return float(np.sort(np.asarray(scores, dtype=float))[: max(1, int(k * len(scores)))].mean())
