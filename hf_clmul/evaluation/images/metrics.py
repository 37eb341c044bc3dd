"""Accuracies, UA, IRA and CRA from a table of judged samples. Pure: it knows neither pipelines nor classifiers.

A sample is a row:
    prompt     the prompt's id or text
    seed       int
    labels     {axis: name}  what the prompt asks for, e.g. {"digit": "seven", "colour": "red"}
    predicted  {axis: name}  what the classifier sees

The names are those of UnlearnCanvas (Zhang et al., arXiv 2402.11846): unlearning accuracy, in-domain and cross-domain
retain accuracy. Its two domains, style and object, are axes here, of which there may be any number. What differs: IRA
comes in two, near and far neighbours of the target apart, as their mean hides what near concepts lose; CRA leaves out the
prompts that ask for the target, as they count in UA; several targets on one axis are counted together; every share
stands with its number of samples; and shares are pooled over samples, which is the mean over concepts where each concept
has as many samples. UA alone misleads: a wrecked model draws blobs that may still be judged as the target, or never.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] of `count` judgements; None, with the `reason`, where there is nothing to count."""

    value: float | None
    count: int
    reason: str | None = None


@dataclass(frozen=True)
class Target:
    """What was unlearned: concepts `names` of one `axis`, and their `near` neighbours, on the same axis."""

    axis: str
    names: Collection[str]
    near: Collection[str] = ()


def unlearning_accuracy(samples: Sequence[Sample], target: Target) -> Share:
    """UA: share of the target's samples on which its axis is judged as something else; 1 is forgotten."""
    wrong = [not _right(sample, target.axis) for sample in samples if _asks_for(sample, target.axis, target.names)]
    return _share(wrong, f"no prompt asks for {_listed(target.names)} on the axis {target.axis}")


def worst_unlearning_accuracy(samples: Sequence[Sample], target: Target) -> Share:
    """UA of each concept under the one of its prompts where it is lowest, the mean over concepts, which are counted."""
    by_prompt: dict[str, dict[str, list[Sample]]] = {}
    for sample in samples:
        if _asks_for(sample, target.axis, target.names):
            by_prompt.setdefault(sample["labels"][target.axis], {}).setdefault(sample["prompt"], []).append(sample)
    lowest = [
        min(unlearning_accuracy(of_prompt, target).value for of_prompt in of_concept.values())
        for of_concept in by_prompt.values()
    ]
    return _share(lowest, f"no prompt asks for {_listed(target.names)} on the axis {target.axis}")


def near_retain_accuracy(samples: Sequence[Sample], target: Target) -> Share:
    """IRA over the samples of the target's near neighbours."""
    if not target.near:
        return Share(None, 0, f"no near neighbours of {_listed(target.names)} were named")
    names = set(target.near) - set(target.names)
    right = [_right(sample, target.axis) for sample in samples if _asks_for(sample, target.axis, names)]
    return _share(right, f"no prompt asks for a near neighbour of {_listed(target.names)}")


def far_retain_accuracy(samples: Sequence[Sample], target: Target) -> Share:
    """IRA over the samples of all other concepts of the axis: neither the target nor near to it."""
    left_out = {*target.names, *target.near}
    right = [
        _right(sample, target.axis)
        for sample in samples
        if target.axis in sample["labels"] and sample["labels"][target.axis] not in left_out
    ]
    return _share(right, f"no prompt asks for a far neighbour of {_listed(target.names)}")


def cross_retain_accuracy(samples: Sequence[Sample], target: Target) -> Share:
    """CRA: share of right judgements on all other axes, over the samples that do not ask for the target."""
    right = [
        _right(sample, axis)
        for sample in samples
        if not _asks_for(sample, target.axis, target.names)
        for axis in sample["labels"]
        if axis != target.axis
    ]
    return _share(right, f"no prompt without {_listed(target.names)} asks for anything on another axis")


METRICS = {
    "unlearning_accuracy": unlearning_accuracy,
    "near_retain_accuracy": near_retain_accuracy,
    "far_retain_accuracy": far_retain_accuracy,
    "cross_retain_accuracy": cross_retain_accuracy,
}


def measure_target(samples: Sequence[Sample], target: Target) -> dict[str, Share]:
    """All of METRICS for one target."""
    return {name: metric(samples, target) for name, metric in METRICS.items()}


def _right(sample: Sample, axis: str) -> bool:
    return sample["predicted"][axis] == sample["labels"][axis]


def _asks_for(sample: Sample, axis: str, names: Collection[str]) -> bool:
    return axis in sample["labels"] and sample["labels"][axis] in names


def _share(judged: Sequence[float], otherwise: str) -> Share:
    return Share(sum(judged) / len(judged), len(judged)) if judged else Share(None, 0, otherwise)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
