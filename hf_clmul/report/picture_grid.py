"""Sampled pictures before and after requests, as PNG: a row is a prompt, a column a seed. It knows pictures, words and the rows that
stages leave behind; nothing of models. Drawn by Pillow, as matplotlib would smooth pictures of 8 x 8 pixels and be slow with
many."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_clmul.report.tables import FORGET, RETAIN
from hf_clmul.run.results_schema import read_rows

if TYPE_CHECKING:
    from PIL import Image

Rows = Sequence[Sequence["Image.Image"]]
TILE = 96  # pixels: the smallest size at which a picture of 8 x 8 and one of 512 x 512 can both be judged
LIGHT = ("#ffffff", "#1d2733")  # surface and ink, as in the other figures
DARK = ("#171c23", "#e6eaf0")

_GAP, _BETWEEN, _MARGIN = 6, 30, 12  # pixels between pictures, between before and after, and around all
_FONT = 18
_LONGEST = 34  # characters of a caption; the alternative text has all of it
_NAMED = 12  # prompts in the alternative text
_SHOWN = {FORGET: 8, RETAIN: 6}  # prompts of a grid
_SHOWN_BETWEEN = {FORGET: 6}  # in the grid of one request of several
_FEW = 4  # unlearn requests that have a grid each


@dataclass(frozen=True)
class Grid:
    """Pictures of the prompts `captions` at two stages, made with the same noise. `name` is for files, `caption` says what it
    shows."""

    name: str
    caption: str
    captions: tuple[str, ...]
    before: Rows
    after: Rows
    titles: tuple[str, str]

    @property
    def alt(self) -> str:
        return alternative_text(self.captions, len(self.before[0]), self.titles)

    def png(self, colours: tuple[str, str]) -> bytes:
        return figure(self.before, self.after, self.captions, self.titles, colours)


def grids(run: Path, results: Mapping[str, Any]) -> list[Grid]:
    """From before the first request to after the last, then, of a few unlearn requests, from before to after each of them.

    A stage whose pictures are no longer there, and a prompt that was erased, are left out.
    """
    stages = results["stages"]
    rows = {stage["stage"]: _pictured(run, stage) for stage in stages}
    asked = [(before, stage) for before, stage in zip(stages, stages[1:], strict=False) if stage["kind"] == "unlearn"]
    wanted = [("pictures", stages[0], stages[-1], _SHOWN)] if len(stages) > 1 else []
    if len(stages) > 2 and len(asked) <= _FEW:
        wanted += [(f"pictures-{after['stage']}", before, after, _SHOWN_BETWEEN) for before, after in asked]
    made = (
        _grid(name, one, other, rows[one["stage"]], rows[other["stage"]], most) for name, one, other, most in wanted
    )
    return [grid for grid in made if grid is not None]


def _grid(
    name: str, one: Mapping[str, Any], other: Mapping[str, Any], first: Mapping[tuple[str, str], Any],
    second: Mapping[tuple[str, str], Any], most: Mapping[str, int],
) -> Grid | None:  # fmt: skip
    both = [key for key in first if key in second]
    chosen = [key for group in most for key in _spread([key for key in both if key[0] == group], most[group])]
    if not chosen:
        return None
    seeds = min(len(pictures) for found in (first, second) for pictures in map(found.get, chosen))
    before, after = ([[_decoded(png) for png in found[key][:seeds]] for key in chosen] for found in (first, second))
    titles = one["title"], other["title"]
    counts = {group: sum(key[0] == group for key in chosen) for group in most}
    told = "; ".join(f"{count} prompts of the {group} group" for group, count in counts.items() if count)
    caption = f"Left: {titles[0]}; right: {titles[1]}, with the same noise. From top to bottom: {told}."
    return Grid(name, caption, tuple(caption for _, caption in chosen), before, after, titles)


def _pictured(run: Path, stage: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """{(group, prompt): pictures as PNG in base64} that a stage kept."""
    place = run / ("base" if stage["kind"] == "base" else f"requests/{stage['stage']}")
    rows = read_rows(place) if (place / "examples.jsonl").is_file() else ()
    return {
        (row["group"], row["caption"]): row["pictures"]
        for row in rows
        if isinstance(row.get("pictures"), list) and row["pictures"]  # what was erased since has a word in their place
    }


def _spread(some: Sequence[Any], most: int) -> list[Any]:
    """At most so many, from all over: neighbours are often alike."""
    return list(some) if len(some) <= most else [some[i * len(some) // most] for i in range(most)]


def _decoded(png: str) -> "Image.Image":
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")


def figure(
    before: Rows,
    after: Rows,
    captions: Sequence[str],
    titles: tuple[str, str] = ("before", "after"),
    colours: tuple[str, str] = LIGHT,
) -> bytes:
    """A PNG of pictures [prompts][seeds] before and after, made with the same noise, under a caption for each prompt.

    Small pictures are enlarged by whole pixels, large ones are made smaller. `colours`: surface and ink.
    Raises ValueError where the two differ in number or size, or the captions in number.
    """
    from PIL import Image, ImageDraw, ImageFont

    shapes = [[[picture.size for picture in row] for row in pictures] for pictures in (before, after)]
    sizes = {size for row in shapes[0] for size in row}
    lengths = {len(row) for row in shapes[0]}
    if shapes[0] != shapes[1] or len(captions) != len(before) or len(sizes) != 1 or len(lengths) != 1:
        raise ValueError(
            f"pictures before and after must be as many for each prompt and of one size, under {len(captions)} captions; found "
            f"{shapes[0]} and {shapes[1]}"
        )
    surface, ink = colours
    font = ImageFont.load_default(size=_FONT)
    texts = [_short(caption) for caption in captions]
    left = math.ceil(max(font.getlength(text) for text in texts)) + 2 * _MARGIN
    top = _FONT + 2 * _MARGIN
    wide, high = _size(*sizes)
    block = len(before[0]) * (wide + _GAP) - _GAP
    width = left + 2 * block + _BETWEEN + _MARGIN
    page = Image.new("RGB", (width, top + len(texts) * (high + _GAP) - _GAP + _MARGIN), surface)
    pen = ImageDraw.Draw(page)
    for start, title, pictures in ((left, titles[0], before), (left + block + _BETWEEN, titles[1], after)):
        pen.text((start, _MARGIN), _fitted(title, font, block), fill=ink, font=font)
        for row, of_prompt in enumerate(pictures):
            for column, picture in enumerate(of_prompt):
                at = (start + column * (wide + _GAP), top + row * (high + _GAP))
                page.paste(_tile(picture, (wide, high)), at)
    for row, text in enumerate(texts):
        pen.text((_MARGIN, top + row * (high + _GAP) + high // 2), text, fill=ink, font=font, anchor="lm")
    file = io.BytesIO()
    page.save(file, format="PNG", optimize=True)
    return file.getvalue()


def alternative_text(captions: Sequence[str], seeds: int, titles: tuple[str, str] = ("before", "after")) -> str:
    """What the grid shows, for those who do not see it."""
    named = "; ".join(captions[:_NAMED]) + (f"; and {len(captions) - _NAMED} more" if len(captions) > _NAMED else "")
    return f"Sampled pictures {titles[0]} and {titles[1]}, {seeds} for each of {len(captions)} prompts: {named}"


def _size(pixels: tuple[int, int]) -> tuple[int, int]:
    """Width and height of a tile: the larger one is TILE, or the largest whole multiple that is not above it."""
    factor = TILE / max(pixels)
    factor = math.floor(factor) if factor >= 1 else factor
    return max(1, round(pixels[0] * factor)), max(1, round(pixels[1] * factor))


def _tile(picture: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    from PIL import Image

    return picture.resize(size, Image.Resampling.NEAREST if size[0] >= picture.width else Image.Resampling.LANCZOS)


def _short(text: str) -> str:
    text = " ".join(text.split()) or "(no prompt)"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1].rstrip() + "…"


def _fitted(text: str, font: Any, width: int) -> str:
    """As much of a title as is not wider than its pictures."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text
