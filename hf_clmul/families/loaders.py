"""From a recipe to its model in memory, by family. It knows which family loads how, and nothing else."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from hf_clmul.data.roles import derived_seed

if TYPE_CHECKING:
    from hf_clmul.families.loaded import Loaded
    from hf_clmul.families.pipeline import LoadedPipeline
    from hf_clmul.recipe.schema import Recipe


def load_of(recipe: "Recipe", texts: Iterable[str]) -> "Loaded | LoadedPipeline":
    """The model of a recipe in memory. `texts` train the tokenizer of one made from scratch. Raises RecipeError if it is not there
    or cannot be read."""
    return LOADERS[recipe.family](recipe, texts)


def _text(recipe: "Recipe", texts: Iterable[str]) -> "Loaded":
    from hf_clmul.models.loading import load

    return load(recipe.model, texts, derived_seed(recipe.seed, "model"))


def _pipeline(recipe: "Recipe", texts: Iterable[str]) -> "LoadedPipeline":
    from hf_clmul.families.pipeline import load

    model = recipe.model
    return load(
        model.path,
        model.dtype,
        model.revision,
        model.trust_remote_code,
        recipe.diffusion,
        recipe.evaluation.images,
        recipe.trained_part,
    )


LOADERS: dict[str, Callable[["Recipe", Iterable[str]], Any]] = {"causal_lm": _text, "diffusion": _pipeline}
