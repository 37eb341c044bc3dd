"""The suite `concepts`: which concepts a classifier sees in a model's pictures, prompt by prompt and seed by seed.

It knows pipelines and classifiers by what they can do; nothing of requests or training."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.borrowed import evaluating
from hf_clmul.evaluation.images.prompts import packed, thumbnail
from hf_clmul.evaluation.images.sampling import sample

Prompt = Mapping[str, Any]


class Classifier(Protocol):
    """What judges pictures. Each axis has its own logits; names stand in the order of the logits."""

    CLASSES: Mapping[str, Sequence[str]]

    def __call__(self, images: Tensor) -> Mapping[str, Tensor]:
        """{axis: logits [B, K]} of images [B, 3, H, W] in [0, 1]."""

    def features(self, images: Tensor) -> Tensor:
        """[B, F] for the Frechet distance."""


class Scorer(Protocol):
    """What tells how well pictures go with their prompts."""

    def __call__(self, images: Tensor, prompts: Sequence[str], batch_size: int) -> list[float]:
        """A score of each of the images [N, 3, H, W] in [0, 1] with its own prompt."""


@dataclass(frozen=True)
class Sampling:
    """How pictures are made: the seeds of every prompt, steps of the scheduler, guidance scale, images in a batch."""

    seeds: tuple[int, ...]
    steps: int
    guidance: float
    batch_size: int
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Seen:
    """`samples`: the rows of `metrics`, with the prompt's "caption", prompts in order and in each its seeds in order.
    `features` [P * S, F]: of the same images in the same order, float32. `scores` of a CLIP, in that order too. `shown`: for
    each prompt its first pictures, as text (see `prompts.thumbnail`)."""

    samples: list[dict[str, Any]]
    features: Tensor
    scores: list[float] = field(default_factory=list)
    shown: list[list[str]] = field(default_factory=list)


def see(
    pipeline: Any, prompts: Sequence[Prompt], classifier: Classifier | None, how: Sampling, title: str = "sampling",
    shown: int = 0, clip: Scorer | None = None,
) -> Seen:  # fmt: skip
    """What the classifier, if there is one, sees of each prompt and seed, and how a CLIP, if there is one, scores it, complete on
    every rank; each rank samples its share of prompts.

    A prompt is {"id", "caption", and a column for each axis that it fixes}; a "class_label" takes the place of the
    caption for pipelines of class labels, and the caption is None where a pipeline takes nothing. The classifier is
    judged where it lies, in evaluation mode, which is given back.

    Raises RecipeError for no prompts and for one that fixes nothing the classifier knows, and as `sample` does.
    """
    if not prompts:
        raise RecipeError("evaluation: there are no prompts, so there is nothing to sample")
    # all ranks know of a bad one
    labels = [{} if classifier is None else labels_of(prompt, classifier.CLASSES) for prompt in prompts]
    state, count = PartialState(), len(how.seeds)
    mine = range(state.process_index, len(prompts), state.num_processes)
    found: list[tuple[int, list[dict[str, Any]], list[list[float]], list[float], list[str]]] = []
    if mine:
        conditions = [prompts[i].get("class_label", prompts[i]["caption"]) for i in mine]
        images = sample(
            pipeline, conditions, how.seeds, how.steps, how.guidance, how.batch_size, how.height, how.width, title
        )
        flat = images.flatten(0, 1)
        captions = [prompts[i]["caption"] for i in mine for _ in how.seeds]
        predicted, features = judge(flat, classifier, how.batch_size) if classifier else ([], torch.zeros(len(flat), 0))
        scores = clip(flat, captions, how.batch_size) if clip else []
        for at, i in enumerate(mine):
            share = slice(at * count, (at + 1) * count)
            rows = [
                {"prompt": prompts[i]["id"], "caption": prompts[i]["caption"], "seed": seed, "labels": labels[i],
                 "predicted": seen} for seed, seen in zip(how.seeds, predicted[share], strict=True)
            ] if classifier else []  # fmt: skip
            few = [thumbnail(one) for one in images[at, :shown]]
            found.append((i, rows, features[share].tolist(), scores[share], few))
    complete = sorted(gather_object(found), key=lambda of_prompt: of_prompt[0])
    return Seen(
        samples=[row for _, rows, *_ in complete for row in rows],
        features=torch.tensor([of_image for _, _, of_prompt, *_ in complete for of_image in of_prompt]),
        scores=[score for *_, of_prompt, _ in complete for score in of_prompt],
        shown=[of_prompt for *_, of_prompt in complete],
    )


def picture_rows(
    pipeline: Any, prompts: Sequence[Prompt], classifier: Classifier | None, how: Sampling, title: str, shown: int,
    clip: Scorer | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each prompt: its own columns, the `labels` that it fixes, what is `predicted` of each picture, their `features`
    packed, their `clip_scores` where there is a CLIP, and the first `pictures`. Where nobody judges or scores, only the
    pictures that are shown are made."""
    if classifier is None and clip is None:
        how = replace(how, seeds=how.seeds[:shown])
    seen, count = see(pipeline, prompts, classifier, how, title, shown, clip), len(how.seeds)
    rows = []
    for i, prompt in enumerate(prompts):
        share = slice(i * count, (i + 1) * count)
        own = seen.samples[share]
        row = {**prompt, "labels": own[0]["labels"] if own else {}, "predicted": [one["predicted"] for one in own],
               "features": packed(seen.features[share]) if own else ""}  # fmt: skip
        if clip is not None:
            row["clip_scores"] = [round(score, 4) for score in seen.scores[share]]
        rows.append({**row, "pictures": seen.shown[i]})
    return rows


def labels_of(prompt: Prompt, classes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{axis: name} that the prompt fixes. Raises RecipeError for none and for a name that the classifier cannot see."""
    labels = {axis: prompt[axis] for axis in classes if prompt.get(axis) is not None}
    if not labels:
        raise RecipeError(
            f"evaluation, prompt {prompt['id']}: it has none of the columns that the classifier knows, "
            f"{', '.join(classes)}; found {', '.join(prompt)}"
        )
    for axis, name in labels.items():
        if name not in classes[axis]:
            raise RecipeError(
                f"evaluation, prompt {prompt['id']}: the classifier knows no {axis} {name!r}; it knows "
                f"{', '.join(classes[axis])}"
            )
    return labels


def judge(images: Tensor, classifier: Classifier, batch_size: int) -> tuple[list[dict[str, str]], Tensor]:
    """{axis: name} of each image [N, 3, H, W], and features [N, F], float32 on the CPU."""
    device = _device(classifier)
    predicted: list[dict[str, str]] = []
    features: list[Tensor] = []
    modules = list(classifier.modules()) if isinstance(classifier, torch.nn.Module) else []
    with evaluating(modules), torch.no_grad():
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size].to(device)
            names = {
                axis: [classifier.CLASSES[axis][i] for i in logits.argmax(-1).tolist()]
                for axis, logits in classifier(some).items()
            }
            predicted += [{axis: of_axis[i] for axis, of_axis in names.items()} for i in range(len(some))]
            features.append(classifier.features(some).float().cpu())
    return predicted, torch.cat(features)


def _device(classifier: Classifier) -> torch.device:
    """Where the classifier's weights lie; the CPU if it has none."""
    first = next(classifier.parameters(), None) if isinstance(classifier, torch.nn.Module) else None
    return torch.device("cpu") if first is None else first.device
