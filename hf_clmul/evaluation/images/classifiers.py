"""The judge that a recipe names: the built-in one of the coloured digits, or an image classifier of transformers. It knows
classifiers' loaders; nothing of pipelines or requests."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_clmul.errors import RecipeError, reason
from hf_clmul.recipe.problems import one_of, suggestion

if TYPE_CHECKING:
    from hf_clmul.evaluation.images.concepts import Classifier
    from hf_clmul.recipe.schema import Images


def judge_of(images: "Images") -> "Classifier | None":
    """The classifier, in evaluation mode; None where the recipe names none. Raises RecipeError for one that cannot be used."""
    name = images.classifier
    if name is None:
        return None
    if name.startswith("builtin:"):
        from hf_clmul.digits import CLASSES, classifier

        if name != "builtin:coloured_digits":
            raise RecipeError(
                f"evaluation.images.classifier: there is no built-in classifier {name!r}; there is builtin:coloured_digits."
            )
        if images.axis is not None and images.axis not in CLASSES:
            raise RecipeError(f"evaluation.images.axis: {name} judges {' and '.join(CLASSES)}, not {images.axis!r}.")
        return classifier()
    if images.axis is None:
        raise RecipeError(
            "evaluation.images.axis: give the column of the data whose values are the classifier's classes, such as `object`."
        )
    return HubClassifier(name, images.axis)


def check_near(images: "Images", classes: Mapping[str, Sequence[str]]) -> None:
    """Raises RecipeError for a near neighbour that is none of the classifier's classes, or of no axis."""
    if images.near and images.axis is None:
        raise RecipeError("evaluation.images.near: near to what? Give `axis`, the column that these are values of.")
    for name in images.near or ():
        if name not in classes[images.axis]:
            meant = suggestion(name, classes[images.axis])
            known = one_of(classes[images.axis]).removeprefix("one of ")
            raise RecipeError(
                f"evaluation.images.near: the classifier knows no {images.axis} {name!r}{f'; {meant}' if meant else '.'} It "
                f"knows {known}."
            )


class HubClassifier(nn.Module):
    """An image classifier of transformers, judging one axis by the names of its labels: the first of those that a label lists
    ("cassette player, tape recorder")."""

    def __init__(self, path: str, axis: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        super().__init__()
        try:
            self.model = AutoModelForImageClassification.from_pretrained(path, use_safetensors=True)
            self.processor = AutoImageProcessor.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise RecipeError(f"evaluation.images.classifier: {path!r} could not be loaded: {reason(error)}") from error
        labels: Mapping[int, str] = self.model.config.id2label
        self.CLASSES: Mapping[str, Sequence[str]] = {axis: [labels[i].split(",")[0] for i in range(len(labels))]}
        self.axis = axis
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {self.axis: self.model(**self._inputs(images)).logits}

    def features(self, images: Tensor) -> Tensor:
        """[B, F]: the last hidden states, their mean over positions."""
        states = self.model(**self._inputs(images), output_hidden_states=True).hidden_states[-1]
        return states.mean(1) if states.dim() == 3 else states.flatten(2).mean(2)

    def _inputs(self, images: Tensor) -> Any:
        pixels = list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
        return self.processor(images=pixels, return_tensors="pt").to(images.device)
