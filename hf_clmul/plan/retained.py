"""What a data-free unlearn request retains where it names nothing: near neighbours that the recipe names, and the other prompts
that it knows. Knows recipes and what their data says; nothing of models."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_clmul.data.pictures import drawings
from hf_clmul.data.sources import GENERATED, Example, content, load_examples
from hf_clmul.errors import RecipeError
from hf_clmul.recipe.schema import Data, Learn, Recipe, Unlearn
from hf_clmul.recipe.streams import BASE

_SHOWN = 6


def is_data_free(recipe: Recipe, request: Any) -> bool:
    """Whether it forgets what the base model knew, by pictures that the model draws itself, and says nothing of what stays."""
    return (
        isinstance(request, Unlearn)
        and recipe.family == "diffusion"
        and request.from_task == BASE
        and request.retain is None
        and recipe.data[request.data].path == GENERATED
    )


def known_prompts(recipe: Recipe, request: Unlearn) -> list[Example]:
    """Rows of the prompts that are known to stay, near neighbours first: pictures to be drawn of `neighbours`, and the `generated`
    data that nothing learns, forgets or holds out. No prompt that any request learns or forgets, or that is held out."""
    taken = {request.data for request in recipe.requests if isinstance(request, Learn | Unlearn)}
    taken |= {recipe.evaluation.held_out, recipe.evaluation.forget}
    away = {row.get("caption") for name in taken - {None} for row in load_examples(recipe.data[name], name)}
    free = ((name, s) for name, s in recipe.data.items() if s.path == GENERATED and name not in taken)
    others = [row for name, source in free for row in load_examples(source, name)]
    there = away | {row["caption"] for row in others}
    near = [row for name, source in neighbours(recipe, request) for row in load_examples(source, name)]
    others = {content(row): row for row in others if row["caption"] not in away}
    return [row for row in near if row["caption"] not in there] + list(others.values())


def neighbours(recipe: Recipe, request: Unlearn) -> Iterator[tuple[str, Data]]:
    """The request's own prompts with the name of a near neighbour in place of the concept's, to be drawn as those are. There are
    some where `evaluation.images.near` names them and the concept's name stands in its prompts."""
    images, source = recipe.evaluation.images, recipe.data[request.data]
    found: dict[str, dict[str, Any]] = {}
    for row in {one.row["caption"]: one.row for one in drawings(source, request.data)}.values():
        for near in images.near or ():
            concept = row.get(images.axis)
            caption = _replaced(row["caption"], concept, near)
            if caption != row["caption"]:
                found[caption] = {**row, "caption": caption, images.axis: near}
    if found:
        update = {"prompts": list(found.values()), "where": None, "exclude": None}
        yield f"{request.data}-near", source.model_copy(update=update)


def drawn_sources(recipe: Recipe) -> Iterator[tuple[str, Data]]:
    """Every source of pictures that the model draws, those of neighbours too."""
    yield from ((name, source) for name, source in recipe.data.items() if source.path == GENERATED)
    for request in recipe.requests:
        if is_data_free(recipe, request):
            yield from neighbours(recipe, request)


def told(rows: list[Example]) -> str:
    """What is retained, in words."""
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    more = f" and {len(captions) - _SHOWN} more" if len(captions) > _SHOWN else ""
    listed = ", ".join(map(repr, captions[:_SHOWN]))
    return f"retain: none is named, so that it is the other prompts known from the recipe: {listed}{more}"


def nothing_known(i: int) -> RecipeError:
    return RecipeError(
        f"requests.{i}.unlearn: nothing is known that is to stay, neither learned before nor as another `generated` data "
        "section, so that nothing would hold it in place. Name prompts, such as `data: {others: {path: generated, prompts: [...]}}` "
        "with `retain: others`; or keep nothing: `unlearning: {retain: {}}`."
    )


def _replaced(caption: str, concept: Mapping[str, Any] | Any, near: str) -> str:
    """Whole words only; as names of classes may have _ for a space."""
    if not isinstance(concept, str):
        return caption
    for name, other in ((concept, near), (concept.replace("_", " "), near.replace("_", " "))):
        caption = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _, text=other: text, caption)
    return caption
