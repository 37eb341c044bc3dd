"""The public names, loaded on first use. Importing the package must import nothing heavy, such as torch."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_clmul.recipe.load import Recipe, load_recipe
    from hf_clmul.run.runner import run_recipe
    from hf_clmul.trainer import ClmulTrainer
    from hf_clmul.training_args import ClmulConfig

__version__ = "0.1.0"

__all__ = ["ClmulConfig", "ClmulTrainer", "Recipe", "__version__", "load_recipe", "run_recipe"]

_MODULE_OF = {
    "ClmulConfig": "hf_clmul.training_args",
    "ClmulTrainer": "hf_clmul.trainer",
    "Recipe": "hf_clmul.recipe.load",
    "load_recipe": "hf_clmul.recipe.load",
    "run_recipe": "hf_clmul.run.runner",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
