"""Teachers: sources of targets that are never trained by gradient, always taken from the live weights. They know models
and adapters; nothing of terms or requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_clmul.models import adapters
from hf_clmul.objectives.prediction import Prediction

COPY, REINFORCED = "before_request", "reinforced"


def uniform(student: Prediction) -> Prediction:
    """The incompetent teacher at its cheapest: every token equally likely, without a model, where the student gave logits."""
    logits = student.logits.new_zeros(()).expand_as(student.logits)
    return Prediction(student.rows, student.batch_size, logits=logits, targets=student.targets)


class BeforeRequest:
    """The model as it was when the request began, keeping a frozen copy of what trains and of nothing else.

    A new adapter is simply switched off (no bytes); an adapter trained further in place is copied as a frozen adapter (a
    few MB); of a model that is trained in part, those parameters are kept and change places with the live ones while the
    teacher answers; a fully trained model is copied whole, or, where ranks hold parts of it (FSDP2), kept in the same way.
    Make it from the unwrapped model before training starts, with its `requires_grad` flags set; `release` takes the copy
    out again.
    """

    name = COPY  # of the frozen adapter

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copy: nn.Module | None = None
        self.is_adapter_copy = False
        self.kept: list[tuple[nn.Parameter, Tensor]] = []
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.trained = adapters.trained(model) if isinstance(model, PeftModel) else None
        if self.trained is None or not adapters.trains_alone(model, self.trained):
            if all(p.requires_grad for p in model.parameters()) and not self._sharded:
                self.copy = deepcopy(model).eval().requires_grad_(False)
            else:
                self.kept = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        elif not adapters.is_identity(model, self.trained):
            adapters.copy_frozen(model, self.trained, self.name)
            self.is_adapter_copy = True

    @contextmanager
    def answering(self) -> Iterator[nn.Module]:
        """The teacher as a model to call: no gradients, eval mode; on the way out the student is exactly as it was."""
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy
            return
        with adapters.untouched(self.model), torch.no_grad():
            self.model.eval()
            if self.kept:
                with self._exchanged():
                    yield self.model
            else:  # of a stack, only the adapter that trains changes places or is left out
                instead = [self.name] if self.is_adapter_copy else []
                stack = [[name] if name != self.trained else instead for name in adapters.active(self.model)]
                with adapters.serving(self.model, sum(stack, [])):
                    yield self.model

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        live = [p.detach().clone() if self._sharded else p.data for p, _ in self.kept]
        try:
            self._put([value for _, value in self.kept])
            yield
        finally:
            self._put(live)

    def _put(self, values: list[Tensor]) -> None:
        for module in self._sharded:
            module.reshard()
        for (p, _), value in zip(self.kept, values, strict=True):
            if self._sharded:  # FSDP does not see that a storage was replaced
                p.copy_(value)
            else:  # storages change hands, no value is copied
                p.data = value

    def release(self) -> None:
        """Forgets the copy."""
        self.copy, self.kept = None, []
        if self.is_adapter_copy:
            adapters.remove(self.model, self.name)
            self.is_adapter_copy = False


class Reinforced(BeforeRequest):
    """The model after more training on what is to be forgotten: a frozen copy like the other, made while the model has these
    weights."""

    name = REINFORCED
