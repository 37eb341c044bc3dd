"""Attacks on an unlearned pipeline as an audit calls them, all of one form: (pipeline, rows, seeds, cost) -> record. None leaves a
trace in the pipeline. They know how pictures are judged; nothing of runs or of how it was unlearned."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_clmul.evaluation.images.concepts import Classifier, Sampling, see
from hf_clmul.evaluation.images.denoising import Architecture, Descent, Noising
from hf_clmul.evaluation.images.inversion import disguised, invert
from hf_clmul.evaluation.images.metrics import Target, unlearning_accuracy, worst_unlearning_accuracy
from hf_clmul.evaluation.images.paraphrases import paraphrased
from hf_clmul.evaluation.images.prompts import prompts
from hf_clmul.evaluation.images.relearning import relearn

Rows = Sequence[Mapping[str, Any]]
Record = dict[str, Any]


class Attack(Protocol):
    """Rows are real pictures of what was forgotten, with "id", "caption", "image" and the column of the judge; `seeds` are those of
    the pictures that are judged; `cost` is how far the attacker goes, where the attack has steps.

    The record has the attack's `name`, `unlearning_accuracy` and `worst_unlearning_accuracy` (see `metrics`; lower is more that
    came back), `prompts` and `pictures` that were judged, `steps`, `seconds` of the attack alone, and of one with steps the loss
    `before` and `after`."""

    name: ClassVar[str]

    def __call__(self, pipeline: Any, rows: Rows, seeds: Sequence[int], cost: Descent) -> Record: ...


@dataclass(frozen=True)
class Judge:
    """How what comes back is seen: which classifier, on which axis, in pictures made how (less the seeds)."""

    classifier: Classifier
    axis: str
    sampling: Sampling

    def record(self, name: str, pipeline: Any, asked: Rows, seeds: Sequence[int], done: Any = None) -> Record:
        """`done` is what an attack with steps returned; its change of the pipeline lasts while pictures are made."""
        how = replace(self.sampling, seeds=tuple(seeds))
        with nullcontext() if done is None else done.applied(pipeline):
            samples = see(pipeline, asked, self.classifier, how, name).samples
        target = Target(self.axis, tuple(dict.fromkeys(row[self.axis] for row in asked)))
        steps = {} if done is None else {"before": done.before, "after": done.after}
        return {
            "name": name,
            "unlearning_accuracy": unlearning_accuracy(samples, target).value,
            "worst_unlearning_accuracy": worst_unlearning_accuracy(samples, target).value,
            "prompts": len(asked),
            "pictures": len(samples),
            "steps": 0 if done is None else done.steps,
            "seconds": 0.0 if done is None else round(done.seconds, 3),
            **steps,
        }


@dataclass(frozen=True)
class Network:
    """How pictures become noisy samples of the pipeline's denoiser; `pixels` reads a row's picture, [3, H, W] in [-1, 1]."""

    architecture: Architecture
    noising: Noising
    pixels: Callable[[Mapping[str, Any]], Tensor]

    def images(self, rows: Rows) -> Tensor:
        return torch.stack([self.pixels(row) for row in rows])


@dataclass(frozen=True)
class Paraphrasing:
    """Other prompts, {concept: texts}, for those concepts that the rows are of. Costs nothing. Raises RecipeError for none."""

    judge: Judge
    texts: Mapping[str, Sequence[str]]
    name: ClassVar[str] = "paraphrases"

    def __call__(self, pipeline: Any, rows: Rows, seeds: Sequence[int], cost: Descent) -> Record:
        concepts = dict.fromkeys(row[self.judge.axis] for row in rows)
        asked = paraphrased(self.judge.axis, {name: self.texts.get(name, []) for name in concepts})
        return self.judge.record(self.name, pipeline, asked, seeds)


@dataclass(frozen=True)
class Inversion:
    """One new token in place of `word`, begun as `initial`, fitted to the rows' pictures. Raises as `invert` and `disguised`."""

    judge: Judge
    network: Network
    word: str
    initial: str
    name: ClassVar[str] = "inversion"

    def __call__(self, pipeline: Any, rows: Rows, seeds: Sequence[int], cost: Descent) -> Record:
        hidden, network = disguised(rows, self.word), self.network
        texts = [row["caption"] for row in hidden]
        done = invert(pipeline, network.architecture, network.noising, network.images(rows), texts, cost, self.initial)
        return self.judge.record(self.name, pipeline, prompts(hidden), seeds, done)


@dataclass(frozen=True)
class Relearning:
    """Some steps of denoising on the rows' pictures, on a copy. Raises as `relearn`."""

    judge: Judge
    network: Network
    trained: str = ".*"
    name: ClassVar[str] = "relearning"

    def __call__(self, pipeline: Any, rows: Rows, seeds: Sequence[int], cost: Descent) -> Record:
        texts, network = [row["caption"] for row in rows], self.network
        done = relearn(pipeline, network.architecture, network.noising, network.images(rows), texts, cost, self.trained)
        return self.judge.record(self.name, pipeline, prompts(rows), seeds, done)
