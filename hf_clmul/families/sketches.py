"""What a plan asks of a model, by family: its architecture without weights, and how much of its data it sees. It knows which family
asks whom, and nothing of requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from hf_clmul.recipe.schema import Adapter, Recipe

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Sketch:
    """A model on the meta device. `unit` is what its data are counted in, and `sizes` counts it for each of some rows, as
    (rows, most tokens of one, name for messages); `adapter` and `pattern` (of what trains) are the
    recipe's as the model takes them; `beside` are the bytes of what
    is loaded with the model and never trains."""

    model: "nn.Module"
    unit: str
    sizes: Callable[[Sequence[Row], int | None, str], list[int]]
    adapter: Callable[["Adapter"], "Adapter"]
    pattern: Callable[[str | None], str | None]
    beside: int = 0


def sketch_of(recipe: "Recipe", texts: Sequence[str]) -> Sketch:
    """Of a recipe's model. `texts` train the tokenizer of one made from scratch. Raises RecipeError as loading it would."""
    return SKETCHES[recipe.family](recipe, texts)


def _text(recipe: "Recipe", texts: Sequence[str]) -> Sketch:
    from hf_clmul.data.sources import encode_dataset
    from hf_clmul.models.loading import load_architecture, make

    if recipe.model.scratch is not None:
        model, tokenizer = make(recipe.model.scratch, texts, 0)
    else:
        model, tokenizer = load_architecture(recipe.model)

    def sizes(rows: Sequence[Row], most: int | None, what: str) -> list[int]:
        return [len(one["input_ids"]) for one in encode_dataset(rows, tokenizer, most, what)]

    return Sketch(model, "tokens", sizes, lambda chosen: chosen, lambda trainable: trainable)


def _pipeline(recipe: "Recipe", texts: Sequence[str]) -> Sketch:
    from hf_clmul.models.diffusion.architectures import part_of, trained_pattern
    from hf_clmul.models.diffusion.blank import blank_parts

    wanted = recipe.model
    architecture, parts = blank_parts(wanted.path, wanted.dtype, wanted.revision)
    architecture = part_of(architecture, recipe.trained_part)
    model = parts.pop(architecture.trained)
    beside = sum(p.numel() * p.element_size() for part in parts.values() for p in part.parameters())
    return Sketch(
        model, "samples", lambda rows, most, what: [1] * len(rows), architecture.adapter,
        lambda trainable: trained_pattern(architecture, trainable), beside,
    )  # fmt: skip


SKETCHES: dict[str, Callable[["Recipe", Sequence[str]], Sketch]] = {"causal_lm": _text, "diffusion": _pipeline}
