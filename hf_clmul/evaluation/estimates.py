"""Numbers with the count of examples behind them and a 95 % interval. Plain arrays in; knows nothing of metrics or models.

Intervals are percentile bootstraps over examples (Efron, 1979): they say how far the value would move with other
examples of the same kind, not with another training run. Where all examples agree they have no width, and of a single
example there is none. Everything is a pure function of its arguments, `seed` included.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
LEVEL = 0.95
_BLOCK = 1_000_000  # numbers drawn at once, so that large tables need little memory

Pair = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Estimate:
    """A value, the number of examples that it is of, and its 95 % interval (None where one example cannot give any)."""

    value: float
    n: int
    low: float | None
    high: float | None

    def record(self) -> dict[str, float | int | None]:
        """As records keep it."""
        return {"value": self.value, "n": self.n, "low": self.low, "high": self.high}


def mean_estimate(values: Sequence[float | None], seed: int = 0, draws: int = DRAWS) -> Estimate | None:
    """Mean of the values that are there; None if there are none. Raises ValueError for what is not finite."""
    found = _finite([value for value in values if value is not None], "mean")
    if not len(found):
        return None
    return from_draws(float(found.mean()), len(found), _means(found, seed, draws))


def gap_estimate(
    run_values: Sequence[float | None],
    reference_values: Sequence[float | None],
    seed: int = 0,
    draws: int = DRAWS,
) -> Estimate | None:
    """|mean of the run - mean of the reference| over the examples that have both; None if there are none.

    Paired: entry i of both lists is the same example, and a draw takes it in both. The interval is that of the signed
    difference, folded at 0: it reaches down to 0 as soon as the sign is open. (Percentiles of absolute differences
    would never do so, and make a gap of two equal models.) Raises ValueError for lists of unequal length.
    """
    pairs = list(zip(run_values, reference_values, strict=True))
    both = [(run, reference) for run, reference in pairs if run is not None and reference is not None]
    if not both:
        return None
    run, reference = (_finite(side, "gap") for side in zip(*both, strict=True))
    difference = run - reference
    return _folded(from_draws(float(difference.mean()), len(difference), _means(difference, seed, draws)))


def auc(positives: Sequence[float], negatives: Sequence[float]) -> float:
    """Probability that a positive's score is above a negative's, ties counted half (Mann-Whitney U / (N M)).

    1 and 0: the two are apart; 0.5: the scores cannot tell them. Infinite scores are ordered like others. Raises
    ValueError if one side is empty or holds what is not a number.
    """
    codes, levels = _codes([(positives, negatives)])[0]
    return float(_aucs(*(_counts(side[None], levels) for side in codes))[0])


def auc_estimate(positives: Sequence[float], negatives: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Estimate:
    """`auc`; `n` counts both sides, and a draw takes as many of each side as there are."""
    (drawn,) = drawn_aucs([(positives, negatives)], seed, draws)
    n = len(positives) + len(negatives)
    return from_draws(auc(positives, negatives), n, drawn, min(len(positives), len(negatives)))


def auc_gap_estimate(run: Pair, reference: Pair, seed: int = 0, draws: int = DRAWS) -> Estimate:
    """|AUC of the run - AUC of the reference|, each from (positives, negatives) of the same examples in the same order.

    Paired and folded as `gap_estimate`. Raises ValueError for sides of unequal length.
    """
    sizes = [tuple(map(len, pair)) for pair in (run, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a gap of AUCs is over the same examples; found {sizes[0]} and {sizes[1]} scores")
    of_run, of_reference = drawn_aucs([run, reference], seed, draws)
    signed = from_draws(auc(*run) - auc(*reference), sum(sizes[0]), of_run - of_reference, min(sizes[0]))
    return _folded(signed)


def bootstrap(
    statistic: Callable[[np.ndarray], float], n: int, value: float, seed: int = 0, draws: int = DRAWS
) -> Estimate:
    """Any statistic of n examples: `statistic` gets the indices [n] of the drawn ones; `value` is that of all."""
    drawn = np.array([statistic(index) for block in _indices(np.random.default_rng(seed), n, draws) for index in block])
    return from_draws(value, n, drawn)


def from_draws(value: float, n: int, drawn: np.ndarray, smallest: int | None = None) -> Estimate:
    """The estimate of `value`, of n examples, whose `drawn` [draws] are the same statistic of other draws of them.

    `smallest`: the size of the smallest sample that was drawn from, if not n. Without an interval for a single example,
    and where the statistic is not finite in some draw.
    """
    if (n if smallest is None else smallest) < 2 or not np.isfinite(drawn).all():
        return Estimate(value, n, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, n, float(low), float(high))


def _folded(signed: Estimate) -> Estimate:
    """The estimate of |x| from that of x."""
    if signed.low is None or signed.high is None:
        return Estimate(abs(signed.value), signed.n, None, None)
    ends = (abs(signed.low), abs(signed.high))
    low = 0.0 if signed.low <= 0 <= signed.high else min(ends)
    return Estimate(abs(signed.value), signed.n, low, max(ends))


def _finite(values: Sequence[float], what: str) -> np.ndarray:
    found = np.asarray(values, dtype=float)
    if not np.isfinite(found).all():
        raise ValueError(f"a {what} needs finite numbers, found {found[~np.isfinite(found)][:3].tolist()}")
    return found


def _indices(rng: np.random.Generator, n: int, draws: int) -> Iterator[np.ndarray]:
    """Blocks [b, n] of indices, `draws` rows in all."""
    rows = max(1, _BLOCK // max(n, 1))
    for start in range(0, draws, rows):
        yield rng.integers(n, size=(min(rows, draws - start), n))


def _means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    if (values == values[0]).all():  # rounding would give equal values an interval
        return np.full(draws, values[0])
    rng = np.random.default_rng(seed)
    return np.concatenate([values[index].mean(axis=1) for index in _indices(rng, len(values), draws)])


def _codes(pairs: Sequence[Pair]) -> list[tuple[list[np.ndarray], int]]:
    """Scores as ranks of their distinct values: AUCs need no more. [(codes of positives, of negatives), levels]"""
    coded = []
    for pair in pairs:
        sides = [np.asarray(side, dtype=float) for side in pair]
        for name, side in zip(("positive", "negative"), sides, strict=True):
            if not len(side) or np.isnan(side).any():
                raise ValueError(f"an AUC needs numbers on both sides; the {name} scores are {side[:3].tolist()}")
        levels, codes = np.unique(np.concatenate(sides), return_inverse=True)
        coded.append((np.split(codes, [len(sides[0])]), len(levels)))
    return coded


def _counts(codes: np.ndarray, levels: int) -> np.ndarray:
    """codes [b, n] -> how often each level occurs in each row, [b, levels]."""
    rows = np.arange(len(codes))[:, None] * levels
    return np.bincount((codes + rows).ravel(), minlength=len(codes) * levels).reshape(len(codes), levels)


def _aucs(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Counts by level [b, levels] of both sides -> AUC [b]."""
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return (positives * below).sum(axis=1) / (positives.sum(axis=1) * negatives.sum(axis=1))


def drawn_aucs(pairs: Sequence[Pair], seed: int = 0, draws: int = DRAWS) -> list[np.ndarray]:
    """The AUCs [draws] of each pair, all pairs of the same sizes; a draw takes the same examples in all of them."""
    coded, found = _codes(pairs), [[] for _ in pairs]
    sizes = [len(side) for side in coded[0][0]]
    # One generator a side: blocks of another length must not change what the other side draws.
    generators = [np.random.default_rng([seed, side]) for side in range(2)]
    rows = max(1, _BLOCK // sum(sizes))
    for start in range(0, draws, rows):
        drawn = [rng.integers(n, size=(min(rows, draws - start), n)) for rng, n in zip(generators, sizes, strict=True)]
        for (codes, levels), aucs in zip(coded, found, strict=True):
            counts = [_counts(side[index], levels) for side, index in zip(codes, drawn, strict=True)]
            aucs.append(_aucs(*counts))
    return [np.concatenate(aucs) for aucs in found]
