"""Pictures that a recipe's own model draws before its first request, to be forgotten, kept or learned: PNG files in the cache, one by
one, so that a run that is killed goes on where it was. Knows pipelines and drawings; nothing of roles or requests."""

import inspect
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_clmul.data.images import drawn_file
from hf_clmul.data.pictures import Drawing, drawings
from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.evaluation.images.sampling import draw
from hf_clmul.hashes import digest
from hf_clmul.paths import atomic_write, cache_folder
from hf_clmul.plan.retained import drawn_sources

if TYPE_CHECKING:
    from hf_clmul.families.pipeline import LoadedPipeline
    from hf_clmul.recipe.schema import Recipe

log = logging.getLogger(__name__)

# Part of the cache's key: raise it with every change of the code that changes the pictures.
CODE = 1
BATCH = 16
"""Pictures that are drawn at once. A batch is drawn again whole where one of its pictures is missing: their last bits depend on the
size of a batch."""


def make_generated(
    loaded: "LoadedPipeline", recipe: "Recipe", rows: Iterable[Mapping[str, Any]], hashes: Mapping[str, str]
) -> None:
    """Draws what `rows` name and the cache lacks, each process its share, and tells the encoder where it lies.

    `loaded` is the unmodified model, `hashes` its own (of the main process; others may give none). Raises RunError for pictures
    that cannot be drawn or written, in every process.
    """
    known = {drawing.reference: drawing for name, source in drawn_sources(recipe) for drawing in drawings(source, name)}
    asked = {row["image"] for row in rows if isinstance(row.get("image"), str)}
    wanted = [drawing for reference, drawing in known.items() if reference in asked]
    if not wanted:
        return
    encoder = loaded.family(None).encoder
    (folder,) = broadcast_object_list([_folder(loaded.pipeline, hashes, encoder.size)])
    encoder.drawn = folder
    state, failure = PartialState(), None
    mine = batches(wanted)[state.process_index :: state.num_processes]
    try:
        _draw(loaded.pipeline, encoder, mine, folder, state.is_main_process)
    except Exception as error:
        failure = error
        raise
    finally:
        others = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if others:
        raise RunError(others[0])


def batches(wanted: Sequence[Drawing]) -> list[list[Drawing]]:
    """Drawings that are drawn at once: of the same settings, in order."""
    found = []
    by_settings = sorted(wanted, key=lambda drawing: (drawing.guidance, drawing.steps))
    for _, group in groupby(by_settings, key=lambda drawing: (drawing.guidance, drawing.steps)):
        alike = list(group)
        found += [alike[start : start + BATCH] for start in range(0, len(alike), BATCH)]
    return found


def _folder(pipeline: Any, hashes: Mapping[str, str], size: tuple[int, int]) -> Path:
    """Where this model's pictures of this size lie."""
    settings = {key: value for key, value in pipeline.scheduler.config.items() if not key.startswith("_")}
    key = digest([CODE, dict(hashes), type(pipeline.scheduler).__name__, settings, size])
    return cache_folder() / "generated" / key[:24]


def _draw(pipeline: Any, encoder: Any, mine: Sequence[Sequence[Drawing]], folder: Path, shows: bool) -> None:
    left = [batch for batch in mine if not all(drawn_file(folder, one.reference).is_file() for one in batch)]
    if not left:
        return
    log.info("drawing %d pictures into %s", sum(map(len, left)), folder)
    total, initial = sum(map(len, mine)), sum(map(len, mine)) - sum(map(len, left))
    takes_size = "height" in inspect.signature(pipeline.__call__).parameters
    sides = encoder.size if takes_size else (None, None)
    with tqdm(
        total=total, initial=initial, desc="drawing pictures", unit="image", leave=False, disable=not shows
    ) as bar:
        for batch in left:
            jobs = [
                (prompt, derived_seed(one.seed, "generated", one.number))  # no evaluated picture has this noise
                for prompt, one in zip(_prompts(pipeline, encoder, batch), batch, strict=True)
            ]
            images = draw(pipeline, jobs, batch[0].steps, batch[0].guidance, *sides)
            for one, image in zip(batch, images, strict=True):
                file = drawn_file(folder, one.reference)
                if not file.is_file():
                    atomic_write(file, _png(image))
            bar.update(len(batch))


def _prompts(pipeline: Any, encoder: Any, batch: Sequence[Drawing]) -> list[Any]:
    """What the pipeline takes: captions, numbers of classes, or nothing."""
    captions = [one.row["caption"] for one in batch]
    if not encoder.architecture.conditional:
        return [None] * len(batch)
    if "class_labels" in inspect.signature(pipeline.__call__).parameters:
        return encoder.architecture.encode_prompts(pipeline, captions)["class_labels"].tolist()
    return captions


def _png(image: Tensor) -> bytes:
    """Of an image [3, H, W] in [0, 1]: 8 bits a channel."""
    written = io.BytesIO()
    Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(written, "PNG")
    return written.getvalue()
