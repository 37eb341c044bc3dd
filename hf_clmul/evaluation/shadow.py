"""A membership attack on each single example by shadow models (LiRA, Carlini et al., arXiv 2112.03570; for unlearning
U-LiRA, Hayes et al., arXiv 2403.01218): can a model that learned an example and unlearned it be told from one that
never saw it? For models that train in seconds. Knows numbers and a function that trains; no model, recipe or run
folder.

Population attacks such as min-k compare different examples with each other; here the same example is compared with
itself, over many trainings. Shadow models come in pairs: of the candidates, one learns (and unlearns) a random half,
the other the other half. So every example is with half of the models, and, when the models of a pair are attacked, both
kinds are judged by equally many of the others.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_clmul.errors import RunError
from hf_clmul.evaluation.estimates import DRAWS, Estimate, auc, bootstrap
from hf_clmul.evaluation.metrics import Row

FALSE_POSITIVES = 0.01
_ENOUGH = 64  # models with and without an example, from which on each example has deviations of its own (LiRA)
_SMALLEST_DEVIATION = 1e-6
_CERTAIN = 1e-8  # float32 cannot tell a probability from 1 below this
_IMPOSSIBLE = -1000.0  # nats

Train = Callable[[Sequence[int], int], Sequence[float]]
"""(indices of the candidates that the model learns and then unlearns, seed) -> `confidence` of every candidate."""


def confidence(row: Row) -> float:
    """log(p / (1 - p)) of the answer's probability per token p: what LiRA takes for Gaussian. Kept finite at both
    ends."""
    logp = min(max(float(np.mean(row["logps"])), _IMPOSSIBLE), -_CERTAIN)
    return logp - math.log(-math.expm1(logp))


def halves(candidates: int, pairs: int, seed: int) -> np.ndarray:
    """bool [2 pairs, candidates]: which candidates each shadow model learns. Rows 2i and 2i + 1 are each other's
    opposite."""
    chosen = np.zeros((2 * pairs, candidates), dtype=bool)
    for pair in range(pairs):
        first = np.random.default_rng([seed, pair]).permutation(candidates)[: candidates // 2]
        chosen[2 * pair, first] = True
        chosen[2 * pair + 1] = ~chosen[2 * pair]
    return chosen


def log_likelihood_ratios(scores: np.ndarray, learned: np.ndarray) -> np.ndarray:
    """Each model attacked by all pairs but its own: log N(s; with) - log N(s; without), [models, candidates].

    `scores` [models, candidates] of `confidence`, `learned` as `halves` gives it, at least three pairs. A Gaussian is
    fitted to the scores of the models that learned (and unlearned) the example and one to those that did not. With
    fewer than 64 models a side, all examples share one deviation a side, as LiRA does. Above 0: it looks like it was
    learned.
    """
    models = len(scores)
    if models < 6 or models % 2 or not (learned[::2] == ~learned[1::2]).all() or scores.shape != learned.shape:
        raise ValueError(
            f"shadow models come in at least three opposite pairs; found scores {scores.shape} of {learned.shape}"
        )
    ratios = np.empty_like(scores, dtype=float)
    for pair in range(0, models, 2):
        others = [i for i in range(models) if i not in (pair, pair + 1)]
        densities = [
            _log_density(scores[pair : pair + 2], scores[others], side) for side in (learned[others], ~learned[others])
        ]
        ratios[pair : pair + 2] = densities[0] - densities[1]
    return ratios


def true_positives(positives: np.ndarray, negatives: np.ndarray, allowed: float = FALSE_POSITIVES) -> float:
    """The largest share of positives above a threshold that at most the share `allowed` of negatives is above.

    With fewer than 100 negatives, 1 % allows none at all.
    """
    ordered = np.sort(np.asarray(negatives, dtype=float))[::-1]
    threshold = ordered[math.floor(allowed * len(ordered) + 1e-9)]  # the first that must not be above
    return float((np.asarray(positives) > threshold).mean())


@dataclass(frozen=True)
class ShadowAttack:
    """How well it is known what was learned and unlearned: 0.5, 0.01 and 0.5 are what guessing gives.

    auc             over all pairs of a model and an example; the interval is over examples
    tpr             true positives at 1 % false positives, likewise
    models          shadow models
    right           for each example, the share of models of which the sign of the ratio tells the truth
    """

    auc: Estimate
    tpr: Estimate
    models: int
    right: list[float]


def attack(scores: np.ndarray, learned: np.ndarray, seed: int = 0, draws: int = DRAWS) -> ShadowAttack:
    """The attack's success from `scores` and `learned` (see `log_likelihood_ratios`)."""
    ratios = log_likelihood_ratios(scores, learned)
    n = ratios.shape[1]

    def over(statistic: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        def of(index: np.ndarray) -> float:
            some, known = ratios[:, index], learned[:, index]
            return statistic(some[known], some[~known])

        return bootstrap(of, n, of(np.arange(n)), seed, draws)

    right = np.where(learned, ratios > 0, ratios < 0) + 0.5 * (ratios == 0)
    return ShadowAttack(over(auc), over(true_positives), len(scores), right.mean(axis=0).tolist())


def run_shadows(
    train: Train, candidates: int, pairs: int, seed: int, folder: Path, training: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Trains 2 `pairs` shadow models and returns (scores, learned), each [models, candidates].

    Model i is `train(indices, seed + i)`. One file a model in `folder`: a call that was interrupted goes on where it
    was, and one with more pairs adds to them. `training` (plain JSON) says what else `train` depends on: files that say
    otherwise are refused. Raises RunError for these, and for broken ones.
    """
    learned = halves(candidates, pairs, seed)
    folder.mkdir(parents=True, exist_ok=True)
    scores = np.empty(learned.shape)
    for i, chosen in enumerate(learned):
        settings = {
            "training": dict(training),
            "candidates": candidates,
            "seed": seed,
            "model": i,
            "learned": np.flatnonzero(chosen).tolist(),
        }
        file = folder / f"shadow-{i:04d}.json"
        if not file.is_file():
            found = [float(score) for score in train(settings["learned"], seed + i)]
            if len(found) != candidates:
                raise ValueError(f"training gave {len(found)} scores for {candidates} candidates")
            _write(file, {**settings, "scores": found})
        scores[i] = _scores(file, settings)
    return scores, learned


def _log_density(scores: np.ndarray, shadows: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Of scores [2, N], under the Gaussian of each example's shadow scores [M, N] where `side` [M, N]; without
    constants."""
    count = side.sum(axis=0)
    mean = np.where(side, shadows, 0).sum(axis=0) / count
    squares = np.where(side, (shadows - mean) ** 2, 0).sum(axis=0)
    variance = squares / (count - 1) if count.min() >= _ENOUGH else squares.sum() / (count - 1).sum()
    deviation = np.maximum(np.sqrt(variance), _SMALLEST_DEVIATION)
    return -(((scores - mean) / deviation) ** 2) / 2 - np.log(deviation)


def _write(file: Path, record: dict) -> None:
    aside = file.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as out:
        json.dump(record, out)
        out.flush()
        os.fsync(out.fileno())
    aside.replace(file)


def _scores(file: Path, settings: dict) -> list[float]:
    try:
        record = json.loads(file.read_text("utf-8"))
        scores = record.pop("scores")
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{file} is no record of a shadow model. Delete it; its model is then trained again.") from None
    if record != settings or len(scores) != settings["candidates"]:
        raise RunError(f"{file} is of a shadow model with other settings. Choose another folder, or delete this one.")
    return scores
