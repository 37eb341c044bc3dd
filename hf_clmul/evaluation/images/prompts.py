"""Prompts as what is evaluated: rows of data to prompts, pictures of a prompt to a row, and rows to the metrics of a group. It
knows what `concepts` sees; nothing of requests or reports."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.distances import frechet_distance
from hf_clmul.evaluation.images.metrics import Target, measure_target, unlearning_accuracy, worst_unlearning_accuracy
from hf_clmul.evaluation.images.paraphrases import GROUP as PARAPHRASED

Row = dict[str, Any]
LARGEST = 128
"""Pixels of a picture that is kept to be looked at."""


def prompts(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each caption, in order: what the model is asked to draw. Columns that all rows of a caption share stay.
    Raises RecipeError for a row without one."""
    found: dict[str, Row] = {}
    for row in rows:
        if "caption" not in row:
            raise RecipeError(
                f"example {row.get('id')}: no column 'caption'; found {', '.join(row)}. In its data section give "
                "`columns: {caption: YOUR_NAME}`, or one for all: `caption: a photo of a {class}`."
            )
        own = {key: value for key, value in row.items() if key not in ("image", "file", "id")}
        before = found.get(row["caption"])
        if before is None:
            found[row["caption"]] = {"id": row["caption"], **own}
        elif any(own.get(key) != value for key, value in before.items() if key != "id"):
            shared = {key: value for key, value in before.items() if own.get(key) == value}
            found[row["caption"]] = {"id": row["caption"], **shared}
    return list(found.values())


def packed(features: Tensor) -> str:
    """Features [S, F] of a prompt's pictures as text: float16 numbers in base64."""
    return base64.b64encode(features.half().numpy().tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """[count, F] in float64, from `packed`."""
    return np.frombuffer(base64.b64decode(text), np.float16).astype(np.float64).reshape(count, -1)


def thumbnail(image: Tensor) -> str:
    """A picture [3, H, W] in [0, 1] as PNG in base64, made smaller where it is large."""
    from PIL import Image

    picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    picture.thumbnail((LARGEST, LARGEST))
    out = io.BytesIO()
    picture.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def samples(rows: Sequence[Row]) -> list[Row]:
    """The judged pictures of all prompts, as `metrics` takes them."""
    return [
        {"prompt": row["caption"], "seed": i, "labels": row["labels"], "predicted": predicted}
        for row in rows
        for i, predicted in enumerate(row["predicted"])
    ]


def prompt_accuracy(rows: Sequence[Row]) -> float | None:
    """Share of the pictures in which everything that the prompt fixes is seen; None where nothing is judged."""
    right = [all(one["predicted"][axis] == name for axis, name in one["labels"].items()) for one in samples(rows)]
    return sum(right) / len(right) if right else None


def aggregate(
    rows: Sequence[Row],
    group: str,
    forgotten: Sequence[Row],
    axis: str | None,
    near: Sequence[str],
    first: Sequence[Row],
) -> dict[str, float | None]:
    """The metrics of a group. `forgotten` are the rows of what is to be forgotten, `axis` the column that this is of, `near`
    values there that lie close to it, `first` the group's rows before the first request.

    "forget" has UA, other groups IRA near and far and CRA (see `metrics`), paraphrases UA in all and under the worst prompt of each
    concept; all have the share of each axis that is judged
    right, the Frechet distance of the classifier's features to those before the first request, and, where a CLIP scored the
    pictures, the mean of its scores.
    """
    found: dict[str, float | None] = {"prompt_accuracy": prompt_accuracy(rows)}
    judged = samples(rows)
    for name in dict.fromkeys(axis for one in judged for axis in one["labels"]):
        right = [one["predicted"][name] == one["labels"][name] for one in judged if name in one["labels"]]
        found[f"{name}_accuracy"] = sum(right) / len(right)
    if group == PARAPHRASED:
        target = Target(axis, tuple(dict.fromkeys(row["labels"][axis] for row in rows)))
        found["unlearning_accuracy"] = unlearning_accuracy(judged, target).value
        found["worst_unlearning_accuracy"] = worst_unlearning_accuracy(judged, target).value
        forgotten = ()
    names = [row["labels"][axis] for row in forgotten if axis in row["labels"]] if axis is not None else []
    if names:
        # A kept prompt may share the value, as "a blue seven" where only red ones go: of kept prompts all count.
        gone = tuple(dict.fromkeys(names)) if group == "forget" else ()
        shares = measure_target(judged, Target(axis, gone, tuple(near)))
        of_group = (
            ("unlearning_accuracy",) if group == "forget" else tuple(n for n in shares if n != "unlearning_accuracy")
        )
        found |= {name: shares[name].value for name in of_group}
    found["frechet_distance"] = _distance(rows, first)
    scores = [score for row in rows for score in row.get("clip_scores", ())]
    return found | ({"clip_score": sum(scores) / len(scores)} if scores else {})


def _distance(rows: Sequence[Row], first: Sequence[Row]) -> float | None:
    """None where fewer than two pictures were judged on a side, and where prompts were erased from one of them since."""
    if {row["id"] for row in rows} - {row["id"] for row in first}:
        return None
    ours, theirs = (
        [unpacked(row["features"], len(row["predicted"])) for row in some if row["predicted"]] for some in (rows, first)
    )
    if sum(map(len, ours)) < 2 or sum(map(len, theirs)) < 2:
        return None
    return frechet_distance(np.concatenate(ours), np.concatenate(theirs))


def told(row: Row) -> str:
    """What is seen in a prompt's pictures, in words."""
    seen: dict[str, int] = {}
    for predicted in row["predicted"]:
        words = " ".join(str(predicted[axis]) for axis in predicted)
        seen[words] = seen.get(words, 0) + 1
    return ", ".join(f"{count} x {words}" for words, count in sorted(seen.items(), key=lambda item: -item[1]))
