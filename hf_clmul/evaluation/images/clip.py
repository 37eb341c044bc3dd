"""The CLIP that a recipe names, which says how well a picture goes with its prompt. It knows the loader of transformers; nothing
of pipelines or requests."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from hf_clmul.errors import RecipeError, reason
from hf_clmul.evaluation.images.distances import clip_scores

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Images

KEY = "evaluation.images.clip"


class Clip(nn.Module):
    """A CLIPModel with its processor, in evaluation mode. Raises RecipeError for one that cannot be loaded whole."""

    def __init__(self, path: str) -> None:
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        super().__init__()
        try:
            kind = AutoConfig.from_pretrained(path).model_type
            if kind != "clip":
                raise RecipeError(
                    f"{KEY}: {path!r} is a model of type {kind!r}. Give a CLIP, such as openai/clip-vit-large-patch14."
                )
            self.model, told = CLIPModel.from_pretrained(path, use_safetensors=True, output_loading_info=True)
            self.processor: Any = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"{KEY}: {path!r} could not be loaded: {reason(error)}") from error
        if told["missing_keys"]:  # one half of a CLIP loads with the other half random, and scores all the same
            raise RecipeError(
                f"{KEY}: {path!r} lacks {len(told['missing_keys'])} tensors of a CLIPModel, such as "
                f"{min(told['missing_keys'])}. Give one with both its text and its image half."
            )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str], batch_size: int) -> list[float]:
        """The score of each image [N, 3, H, W] in [0, 1] with its own prompt, 0 to 100 (see `distances`)."""
        return clip_scores(images, prompts, self.model, self.processor, batch_size).tolist()


def clip_of(images: "Images") -> Clip | None:
    """None where the recipe names none. Raises RecipeError as `Clip`."""
    return None if images.clip is None else Clip(images.clip)
