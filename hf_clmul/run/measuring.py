"""How a recipe's models are measured: the same way at every stage, and in the audit. Knows recipes; no models."""

from dataclasses import asdict
from typing import Any

from hf_clmul.evaluation.suites import Measuring
from hf_clmul.recipe.schema import Images, Recipe
from hf_clmul.training_args import ClmulConfig


def measuring(recipe: Recipe) -> Measuring | Images:
    """The same for all stages, or their figures could not be compared: of texts in bf16 only where every request trains so, if
    `evaluation` says nothing of it."""
    asked = recipe.evaluation
    if recipe.family == "diffusion":
        return asked.images
    trainings = [recipe.request_training(i) for i in range(len(recipe.requests))]
    lengths = [training.get("max_length", ClmulConfig.max_length) for training in trainings]
    longest = None if None in lengths else max(lengths)
    return Measuring(
        asked.batch_size,
        asked.max_new_tokens,
        all(training.get("bf16", False) for training in trainings) if asked.bf16 is None else asked.bf16,
        longest if asked.max_length is None else asked.max_length,
        asked.gradient_norms,
    )


def plain(how: Measuring | Images) -> dict[str, Any]:
    """What a digest of it is made from. What is not asked for leaves no trace, so that older digests stay what they are."""
    if isinstance(how, Images):
        return how.model_dump()
    return {name: value for name, value in asdict(how).items() if (name, value) != ("gradient_norms", False)}
