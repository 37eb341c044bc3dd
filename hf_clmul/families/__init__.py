"""Families: what the trainer asks of a kind of model, answered once for language models and once for diffusion models. A family
is made from what goes with a model (a tokenizer, a pipeline) and must not know requests, run folders or reports."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from hf_clmul.data.roles import RoleDataset
    from hf_clmul.gradients.options import Protect
    from hf_clmul.objectives.active import ActiveTerm
    from hf_clmul.objectives.preparation import Sampled


class Family(Protocol):
    """What a trainer asks of a kind of model. `name` is that of `models.FAMILIES`; with `own_files`, models that are trained whole
    are written and read by `save` and `load`, else as Trainer does it."""

    name: str
    own_files: bool

    def check(self, model: "nn.Module") -> None:
        """Raises ValueError where data cannot be encoded or collated with what the family was made from, or the model cannot
        be trained as it is."""

    def bind(self, model: "nn.Module", checkpointing: bool = False, mixed: "torch.dtype | None" = None) -> None:
        """Told of the bare model before it is called, whether its activations are to be worked out again in the backward
        pass, and of the type of mixed precision."""

    def pattern(self, trainable: str | None) -> str | None:
        """The regular expression for names of parameters that `trainable` stands for, which may be one itself. Raises
        ValueError or RecipeError for a name of layers that the model has not."""

    def encoded(self, data: Any, what: str) -> list[dict[str, Any]]:
        """Examples as the collator takes them; encoded ones pass. Raises ValueError or RecipeError for unusable ones."""

    def roles(self, data: Mapping[str, Any], terms: Mapping[str, Sequence["ActiveTerm"]], seed: int) -> "RoleDataset":
        """The training set: the examples of every role with terms, the anchor first, with what its terms need of them
        and of the other roles' data."""

    def collator(self) -> Callable[[Sequence[dict[str, Any]]], dict[str, Any]]:
        """From [{role: example}] to {role: batch}, its method `collate` from [example] to a batch; a batch has `lengths`
        and `alternatives`, from which terms count."""

    def predict(
        self, model: "nn.Module", batch: Mapping[str, Any], needs: frozenset[str], layers: Collection[float] = ()
    ) -> Any:
        """One forward pass of a role's batch: what the terms asked for. `model` may be wrapped."""

    def likelihood(self, model: "nn.Module", batch: Mapping[str, Any]) -> "Tensor":
        """Summed over the batch, what training on it raises: a log-probability, or minus a denoising loss."""

    def knows_nothing(self, student: Any) -> Any:
        """What an incompetent teacher says where it is no model."""

    def random_like(self, model: "nn.Module", seed: int) -> "nn.Module":
        """A frozen model of the same architecture with random weights."""

    def sampled(self, model: "nn.Module", examples: "Sequence[Any]", how: "Sampled", seed: int) -> list[Any]:
        """The examples to be forgotten with noisy samples that the model makes, where a term asks for them."""

    def readers(self, model: "nn.Module") -> "dict[str, nn.Parameter]":
        """The matrices that train and read prompts. Raises ValueError or RecipeError for a model that has none."""

    def read(self, data: "RoleDataset", how: "Protect") -> "tuple[Tensor, Tensor]":
        """What these matrices read of the prompts to protect, [R, I], and of those to be forgotten, [F, I]."""

    def edited(self, model: "nn.Module", active: "ActiveTerm", data: "RoleDataset") -> "dict[str, Tensor]":
        """New values of the parameters, of those that train, that a term with the need "keys_values" edits."""

    def loss(self, model: "nn.Module", batch: Mapping[str, Any]) -> "Tensor | None":
        """Mean loss of a flat evaluation batch; None: the model's own."""

    def save(self, model: "nn.Module", folder: "Path") -> None:
        """Writes the model with its config; of one with an adapter, which is written already, what else its users read."""

    def load(self, model: "nn.Module", folder: "Path") -> None:
        """Reads what `save` wrote into the model. Raises RunError where it is not there."""

    def label(self, card: "Path") -> None:
        """Told of a model card that Trainer wrote."""


def is_text(model: Any) -> bool:
    """Whether it is, without a family being named, a model of text or the name of one. A denoiser alone is none."""
    from peft import PeftModel
    from torch import nn

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(base, str) or (
        isinstance(base, nn.Module) and not any(c.__module__.startswith("diffusers.") for c in type(base).__mro__)
    )


def of_pipeline(pipeline: Any, trainable: str | None = None) -> tuple["nn.Module", Family]:
    """What trains of a diffusers pipeline, the denoiser or its text encoder, and its family. Raises ValueError for anything
    else, for a pipeline that is not whole, and where an adapter or a hook that the trainer would know nothing of changes what
    trains."""
    from diffusers import DiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    from hf_clmul.errors import RecipeError
    from hf_clmul.families.diffusion import DiffusionFamily
    from hf_clmul.models.diffusion.loading import make_ready

    if isinstance(pipeline, nn.Module):
        raise ValueError(
            f"model is a {type(pipeline).__name__}, a part of a pipeline: give the whole pipeline, which also encodes the data; or, "
            "of a trainer before this one, its model and its family: ClmulTrainer(before.model, ..., family=before.family)."
        )
    if not isinstance(pipeline, DiffusionPipeline):
        raise ValueError(
            f"model is a {type(pipeline).__name__}: give a Hub id or folder, a model of transformers, a PeftModel, or a pipeline "
            "of diffusers."
        )
    try:
        make_ready(pipeline)
    except RecipeError as error:
        raise ValueError(str(error).removeprefix("model.path: ")) from error
    family = DiffusionFamily(pipeline, trainable=trainable)
    used = dict.fromkeys((family.architecture.trained, family.architecture.component))
    adapted = [name for name in used if any(isinstance(m, BaseTunerLayer) for m in getattr(pipeline, name).modules())]
    for name in adapted:
        raise ValueError(
            f"the pipeline's {name} has an adapter already, which would be trained and saved as if it were part of the {name}: "
            "merge it (fuse_lora, then unload_lora_weights) or take it out; to train it further, give a trainer's model and "
            "family: ClmulTrainer(before.model, ..., family=before.family)."
        )
    for name in (name for name in used if hasattr(getattr(pipeline, name), "_hf_hook")):
        raise ValueError(
            f"the pipeline's {name} has a hook of accelerate, as of offloading, which moves its weights during training: take it "
            "off with pipeline.remove_all_hooks()."
        )
    return family.trained, family
