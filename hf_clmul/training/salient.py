"""The salient part of a model in training: chosen once from the forget data, kept through steps and checkpoints. It knows
masks and parameters' names; how scores come about is `gradients.saliency`, where gradients come from is the trainer's."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.gradients.options import Saliency
from hf_clmul.gradients.saliency import Held, connection_scores, gradient_scores, top, trim
from hf_clmul.models import adapters

FILE = "saliency.safetensors"
log = logging.getLogger(__name__)


class SalientPart:
    """What `saliency` asks for: which weights train (SalUn), which are drawn anew first (Scissorhands), or neither."""

    def __init__(self, wanted: Saliency | None) -> None:
        self.train = wanted.train if wanted is not None else None
        self.trim = wanted.trim if wanted is not None else None
        self._masks: dict[str, Tensor] | None = None
        self._held: Held | None = None

    @property
    def wanted(self) -> bool:
        return self.train is not None or self.trim is not None

    def check(self, model: nn.Module) -> None:
        """Raises ValueError for an adapter that changes nothing yet: where B is zero, A has no gradient and B no weight."""
        if isinstance(model, PeftModel) and adapters.is_identity(model, adapters.trained(model)):
            raise ValueError(
                f"saliency looks at gradients and weights, but adapter {adapters.trained(model)!r} has learned nothing yet: its B "
                "matrices are zero, so that no A matrix would ever train and nothing can be trimmed. Give an adapter that has "
                "learned, or train all weights."
            )

    def choose(self, model: nn.Module, gradients: dict[str, Tensor], seed: int) -> None:
        """Masks and trimming from the gradient of the forget data; both look at the model before it is trimmed."""
        named = {name: p for name, p in model.named_parameters() if name in gradients}
        found, weights = [gradients[name] for name in named], [p.detach() for p in named.values()]
        self._held = None
        if self.train is not None:
            chosen = top(gradient_scores(found), self.train)
            self._masks = dict(zip(named, chosen, strict=True))
        if self.trim is not None:
            marked = top(connection_scores(found, weights), self.trim)
            generator = torch.Generator().manual_seed(derived_seed(seed, "trim"))
            drawn = trim(list(named.items()), marked, generator)
            log.info("%d of %d weights were drawn anew", drawn, sum(p.numel() for p in named.values()))

    def hold(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """Masks in the order of the parameters, whose other entries are held from now on; None where everything trains.

        A parameter without a mask had no gradient on the forget data: it does not train.
        """
        if self._masks is None:
            return None
        names = {p: name for name, p in model.named_parameters()}
        masks = []
        for p in parameters:
            mask = self._masks.get(names[p])
            masks.append(torch.zeros_like(p, dtype=torch.bool) if mask is None else mask.to(p.device))
        self._held = Held(parameters, masks)
        return masks

    def restore(self) -> None:
        """After a step of the optimizer: what is held is again what it was."""
        if self._held is not None:
            self._held.restore()

    def save(self, folder: Path) -> None:
        if self._masks is not None:
            save_file({name: mask.contiguous().to("cpu") for name, mask in self._masks.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """The masks of a checkpoint. Raises RunError where they are missing."""
        if self.train is None:
            return
        if not (folder / FILE).is_file():
            raise RunError(f"{folder} has no {FILE}: it was made without `saliency.train`. Start the request anew.")
        self._masks, self._held = load_file(folder / FILE), None
