"""How a recipe's models are measured: the same way at every stage, and in the audit. Knows recipes; no models."""

from hf_clmul.evaluation.suites import Measuring
from hf_clmul.recipe.schema import Images, Recipe
from hf_clmul.training_args import ClmulConfig


def measuring(recipe: Recipe) -> Measuring | Images:
    """The same for all stages, or their figures could not be compared: of texts in bf16 only where every request trains so."""
    if recipe.family == "diffusion":
        return recipe.evaluation.images
    trainings = [recipe.request_training(i) for i in range(len(recipe.requests))]
    lengths = [training.get("max_length", ClmulConfig.max_length) for training in trainings]
    return Measuring(
        recipe.evaluation.batch_size,
        recipe.evaluation.max_new_tokens,
        all(training.get("bf16", False) for training in trainings),
        None if None in lengths else max(lengths),
    )
