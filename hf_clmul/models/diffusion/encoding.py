"""Images and prompts as a denoiser sees them, latents and embeddings, each worked out once. It knows a pipeline through its
architecture; nothing of roles, requests or training."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_clmul.data.images import drawn_file, pixels
from hf_clmul.data.noisy import NOISE_SEED
from hf_clmul.data.pictures import GENERATED, Held, held_rows
from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RecipeError
from hf_clmul.models.diffusion.architectures import Architecture, architecture_of, part_of
from hf_clmul.models.diffusion.prompts import check_lengths, readings

Encoded = dict[str, Any]
"""`mean` and `std` [C, h, w] of a latent, `conditioning` {name: tensor} of its prompt, and a seed for its noise."""
BATCH = 16


class Encoder:
    """Encodes with a pipeline's VAE and text encoders. Prompts are kept by their text, latents by what the image is known by;
    both on the CPU. Images are of `resolution` pixels each way, or else of the size that the model was made for; with `resize`
    those of another size are scaled and cut. `trainable` says whether a text encoder trains."""

    def __init__(
        self, pipeline: Any, resolution: int | None = None, resize: bool = False, trainable: str | None = None
    ) -> None:
        self.pipeline, self.resize = pipeline, resize
        self.architecture: Architecture = part_of(architecture_of(pipeline), trainable)
        self.size = image_size(pipeline, self.architecture)
        if resolution is not None:
            _check_resolution(pipeline, self.architecture, resolution)
            self.size = resolution, resolution
        self.drawn: Path | None = None
        """The folder of the pictures that the pipeline drew itself."""
        self._blanks = False
        self._prompts: dict[str, dict[str, Tensor]] = {}
        self._latents: dict[str, tuple[Tensor, Tensor]] = {}

    def check_prompts(self, texts: Sequence[str], what: str) -> None:
        """Raises RecipeError for a prompt that would be cut."""
        check_lengths(self.pipeline, list(dict.fromkeys(texts)), what)

    def prompt(self, text: str) -> dict[str, Tensor]:
        """The conditioning of one prompt, without a batch dimension."""
        self._learn_prompts([text], "the prompt")
        return self._prompts[text]

    def text_states(self, names: Sequence[str]) -> Tensor | None:
        """[N, T, D]: what the text encoders make of names alone, such as those of classes; None where the pipeline has none."""
        if "tokenizer" not in self.architecture.needs:
            return None
        texts = [name.replace("_", " ") for name in names]
        encode_prompts = architecture_of(
            self.pipeline
        ).encode_prompts  # of a text encoder that trains, too, what it says
        with torch.no_grad():
            found = [encode_prompts(self.pipeline, [text]) for text in texts]
        return torch.cat([one["encoder_hidden_states"].float().cpu() for one in found])

    def encode(self, rows: Sequence[Mapping[str, Any]], what: str) -> list[Encoded]:
        """Encoded examples of rows with `image` and, where the model takes prompts, `caption`; encoded ones pass. Each
        has a seed for its noise that its place gives it; a training set gives others. Rows that have a caption alone
        become examples without a latent. Raises RecipeError for unusable rows."""
        if not hasattr(rows, "__len__"):
            raise ValueError(
                f"{what}: a streaming data set cannot be counted, and forgetting must be: give one with a length."
            )
        if isinstance(rows, datasets.Dataset) and rows.format["type"] is None:
            rows = held_rows(rows)  # all pictures at once would fill the memory
        if len(rows) and "conditioning" in rows[0]:
            return list(rows)
        rows = [self._checked(row, f"{what}, example {row.get('id', i)}") for i, row in enumerate(rows)]
        if self.architecture.conditional:
            self._learn_prompts([row["caption"] for row in rows], what)
        self._learn_latents([row for row in rows if "image" in row and not self._is_blank(row)], what)
        found = []
        for i, row in enumerate(rows):
            latent = dict(zip(("mean", "std"), self._latent(row), strict=True)) if "image" in row else {}
            conditioning = self._prompts[row["caption"]] if self.architecture.conditional else {}
            seed = derived_seed("evaluation", i)
            found.append({**latent, "conditioning": conditioning, NOISE_SEED: seed, "row": _texts(row)})
        return found

    @contextmanager
    def before_drawing(self) -> Iterator[None]:
        """Pictures that the pipeline has yet to draw get latents of zeros here, so that all else can be tried before hours of
        drawing."""
        self._blanks = True
        try:
            yield
        finally:
            self._blanks = False

    def _is_blank(self, row: Mapping[str, Any]) -> bool:
        return self._blanks and isinstance(row["image"], str) and row["image"].startswith(GENERATED)

    def _latent(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        if self._is_blank(row):
            shape = latent_shape(self.pipeline, self.architecture, self.size)
            return torch.zeros(shape), torch.zeros(shape)
        return self._latents[_key(row)]

    def with_anchors(
        self, examples: Sequence[Encoded], anchor: str | Mapping[str, str] | None, what: str
    ) -> list[Encoded]:
        """The examples with the conditioning of what takes the concept's place: the prompt `anchor`, or their own one with
        words replaced, or that of their column `anchor`. Raises RecipeError where none of it is there or changes nothing."""
        texts = [anchored(example["row"], anchor, what) for example in examples]
        self._learn_prompts(texts, f"{what}, anchor")
        own = readings(self.pipeline, self.architecture, [example["row"]["caption"] for example in examples])
        for example, text, one, other in zip(
            examples, texts, own, readings(self.pipeline, self.architecture, texts), strict=True
        ):
            if one == other:
                raise RecipeError(
                    f"{what}: the anchor {text!r} is the same to the model as the caption {example['row']['caption']!r}, so that "
                    "nothing would take the concept's place. Give another anchor."
                )
        return [{**example, "anchor": self._prompts[text]} for example, text in zip(examples, texts, strict=True)]

    def with_partners(self, examples: Sequence[Encoded], what: str) -> list[Encoded] | None:
        """The examples with the latents of the images in their column `partner`; None where they have no such column.
        Raises RecipeError where some of them have."""
        has = ["partner" in example["row"] for example in examples]
        if not any(has):
            return None
        if not all(has):
            raise RecipeError(
                f"{what}: {len(has) - sum(has)} of {len(has)} examples have no second image: give all of them a "
                "`partner`, or none, to have images of the data to retain in its place."
            )
        seconds = [_second(example["row"]) for example in examples]
        self._learn_latents(seconds, f"{what}, partner")
        return [
            {**example, "partner": dict(zip(("mean", "std"), self._latents[_key(second)], strict=True))}
            for example, second in zip(examples, seconds, strict=True)
        ]

    def with_concept_tokens(self, examples: Sequence[Encoded], words: Sequence[str], what: str) -> list[Encoded]:
        """The examples with the places [T] of these words' tokens in their captions, ones among zeros. Raises
        RecipeError for a caption with none of the words."""
        places = {text: self._places(text, words, what) for text in {e["row"]["caption"] for e in examples}}
        return [{**example, "concept_tokens": places[example["row"]["caption"]]} for example in examples]

    def _places(self, caption: str, words: Sequence[str], what: str) -> Tensor:
        tokenizer = self.pipeline.tokenizer
        most = tokenizer.model_max_length
        (ids,) = tokenizer([caption], padding="max_length", max_length=most, truncation=True)["input_ids"]
        found = torch.zeros(len(ids))
        for word in words:
            own = tokenizer(word, add_special_tokens=False)["input_ids"]
            for start in range(len(ids) - len(own) + 1):
                if own and ids[start : start + len(own)] == own:
                    found[start : start + len(own)] = 1
        if not found.any():
            raise RecipeError(
                f"{what}: none of the `words` ({', '.join(words)}) stands in the caption {caption!r}: give those that "
                "name the "
                "concept in every caption to be forgotten."
            )
        return found

    def _checked(self, row: Mapping[str, Any], where: str) -> Mapping[str, Any]:
        wanted = ("caption",) if self.architecture.conditional else ("image",)
        missing = [name for name in wanted if name not in row]
        if missing:
            raise RecipeError(
                f"{where}: no column {missing[0]!r}; found {', '.join(map(str, row))}. Rename columns with "
                f"`columns: {{{missing[0]}: YOUR_NAME}}` in the recipe's data section."
            )
        return row

    def _located(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        image = row["image"]
        if self.drawn is None or not (isinstance(image, str) and image.startswith(GENERATED)):
            return row
        return {**row, "file": str(drawn_file(self.drawn, image))}

    def _learn_prompts(self, texts: Sequence[str], what: str) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._prompts]
        check_lengths(self.pipeline, new, what)
        for start in range(0, len(new), BATCH):
            some = new[start : start + BATCH]
            with torch.no_grad():
                found = self.architecture.encode_prompts(self.pipeline, some)
            if "time_ids" in found:  # as the pipeline gives them for pictures of this size
                height, width = self.size
                found["time_ids"][:] = found["time_ids"].new_tensor([height, width, 0, 0, height, width])
            for i, text in enumerate(some):
                self._prompts[text] = {name: value[i].detach().cpu() for name, value in found.items()}

    def _learn_latents(self, rows: Sequence[Mapping[str, Any]], what: str) -> None:
        new = {_key(row): (i, row) for i, row in enumerate(rows) if _key(row) not in self._latents}
        keys = list(new)
        with tqdm(total=len(keys), desc=f"encoding {what}", leave=False, disable=len(keys) < 4 * BATCH) as bar:
            for start in range(0, len(keys), BATCH):
                some = keys[start : start + BATCH]
                images = [
                    pixels(
                        self._located(new[k][1]),
                        self.size,
                        self.resize,
                        f"{what}, example {new[k][1].get('id', new[k][0])}",
                    )
                    for k in some
                ]
                with torch.no_grad():
                    mean, std = self.architecture.encode_images(self.pipeline, torch.stack(images))
                for i, k in enumerate(some):
                    self._latents[k] = mean[i].float().cpu(), std[i].float().cpu()
                bar.update(len(some))


def check_images(examples: Sequence[Encoded], what: str) -> None:
    """Raises RecipeError for an example without an image."""
    without = [i for i, example in enumerate(examples) if "mean" not in example]
    if without:
        raise RecipeError(
            f"{what}, example {without[0]} ({len(without)} of {len(examples)}): no column 'image'. Rename columns with "
            "`columns: {image: YOUR_NAME}` in the recipe's data section; to forget by prompts alone give `esd` a "
            "number of `sampled`."
        )


def latent_shape(pipeline: Any, architecture: Architecture, size: tuple[int, int]) -> tuple[int, int, int]:
    """[C, h, w] of what the denoiser makes noisy, of images of `size` (height, width) pixels."""
    if "vae" not in architecture.needs:
        return (getattr(pipeline, architecture.component).config.in_channels, *size)
    scale = _scale(pipeline)
    return (pipeline.vae.config.latent_channels, size[0] // scale, size[1] // scale)


def _scale(pipeline: Any) -> int:
    return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def image_size(pipeline: Any, architecture: Architecture) -> tuple[int, int]:
    """Height and width of the images that the denoiser was made for, in pixels."""
    if architecture.name == "FluxPipeline":  # its network takes any size
        size = pipeline.default_sample_size
    else:
        size = getattr(pipeline, architecture.component).config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    scale = _scale(pipeline) if "vae" in architecture.needs else 1
    return height * scale, width * scale


def _check_resolution(pipeline: Any, architecture: Architecture, side: int) -> None:
    """Raises RecipeError for pictures that the pipeline cannot draw, or whose latents its network cannot cut into patches."""
    if "tokenizer" not in architecture.needs:  # it has no setting for another size
        if (side, side) != (own := image_size(pipeline, architecture)):
            raise RecipeError(
                f"diffusion.resolution: {side}, and a {architecture.name} draws {own[0]} x {own[1]} pixels alone: leave it out."
            )
        return
    unit = 2 * _scale(pipeline) if architecture.component == "transformer" else 8
    if side % unit:
        near = max(1, round(side / unit)) * unit
        raise RecipeError(
            f"diffusion.resolution: {side} is no multiple of {unit}, as this pipeline needs; such as {near}."
        )


def anchored(row: Mapping[str, Any], anchor: str | Mapping[str, str] | None, what: str) -> str:
    """The prompt that takes the place of a row's own: whole words and phrases are replaced, whatever stands around them."""
    caption = row["caption"]
    if anchor is None:
        if not isinstance(row.get("anchor"), str):
            raise RecipeError(
                f"{what}: what takes the concept's place? Give the term `anchor`: a prompt, or words to replace such "
                "as "
                "{seven: eight}; or the data a column `anchor`."
            )
        return row["anchor"]
    if isinstance(anchor, str):
        return anchor
    longest = "|".join(re.escape(phrase) for phrase in sorted(anchor, key=len, reverse=True))
    found = re.sub(rf"(?<!\w)(?:{longest})(?!\w)", lambda phrase: anchor[phrase[0]], caption) if longest else caption
    if found == caption:
        raise RecipeError(
            f"{what}: none of the words to replace ({', '.join(anchor)}) stands in the caption {caption!r}: give "
            "`anchor` a word "
            "of every caption to be forgotten, or a whole prompt."
        )
    return found


def _texts(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("id", "caption", "anchor", "partner", "partner_file") if name in row}


def _second(row: Mapping[str, Any]) -> dict[str, Any]:
    """The second image of a row as one of its own."""
    named = {"id": "id", "image": "partner", "file": "partner_file"}
    return {name: row[column] for name, column in named.items() if column in row}


def _key(row: Mapping[str, Any]) -> str:
    """What an image is known by: its reference, or a hash of one in memory."""
    image = row["image"]
    if isinstance(image, str):
        return image
    if isinstance(image, Held):
        return image.reference()
    content = image.numpy() if isinstance(image, Tensor) else np.asarray(image)
    return f"{content.shape} {content.dtype} {sha256(content.tobytes()).hexdigest()}"
