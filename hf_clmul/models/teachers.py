"""Teachers: sources of targets that are never trained by gradient, always taken from the live weights. They know models
and adapters; nothing of terms or requests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hf_clmul.models import adapters
from hf_clmul.objectives.prediction import Denoised, Prediction

COPY, REINFORCED = "before_request", "reinforced"


def uniform(student: Prediction) -> Prediction:
    """The incompetent teacher at its cheapest: every token equally likely, without a model, where the student gave logits."""
    logits = student.logits.new_zeros(()).expand_as(student.logits)
    return Prediction(student.rows, student.batch_size, logits=logits, targets=student.targets)


def zero(student: Denoised) -> Denoised:
    """The incompetent denoiser at its cheapest: it predicts zero, without a network."""
    return replace(student, output=torch.zeros_like(student.output), variants=None, attention=None, partner=None)


def _of_transformers(base: nn.Module) -> nn.Module:
    return type(base)._from_config(deepcopy(base.config), dtype=base.dtype)


def random_like(model: nn.Module, seed: int, make: Callable[[nn.Module], nn.Module] = _of_transformers) -> nn.Module:
    """The incompetent teacher of the papers: a frozen model of the same architecture with random weights, in eval mode.

    Below a PEFT wrapper it is like the base. Drawn on the CPU, so the same on every device and rank; the global random state
    stays as it was. `make`: its like with weights drawn anew, from a model's configuration.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make(base)
    return made.eval().requires_grad_(False).to(base.device, base.dtype)


class Teacher:
    """A state of the student that answers in its place. What differs is a `copy` of the model, or a frozen adapter, or values
    `kept` {parameter's name: (parameter, value)} that change places with the live ones while it answers; with none of them
    it is the model with its adapter switched off."""

    name = ""  # of the frozen adapter

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copy: nn.Module | None = None
        self.is_adapter_copy = False
        self.kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.trained = adapters.trained(model) if isinstance(model, PeftModel) else None

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
        live = [p.detach().clone() if self._sharded else p.data for p, _ in self.kept.values()]
        try:
            self._put([value for _, value in self.kept.values()])
            yield
        finally:
            self._put(live)

    def _put(self, values: list[Tensor]) -> None:
        for module in self._sharded:
            module.reshard()
        for (p, _), value in zip(self.kept.values(), values, strict=True):
            if self._sharded:  # FSDP does not see that a storage was replaced
                p.copy_(value)
            else:  # storages change hands; a value is copied only where it is kept in another precision
                p.data = value.to(p.dtype)

    def follow(self, step: int) -> None:
        """Told of each optimizer step, counted from 1; a teacher that stays as it is does nothing."""

    def save(self, folder: Path) -> None:
        """Writes into a checkpoint what cannot be had again from the weights before the request."""

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""

    def release(self) -> None:
        """Forgets the copy."""
        self.copy, self.kept = None, {}
        if self.is_adapter_copy:
            adapters.remove(self.model, self.name)
            self.is_adapter_copy = False


class Nobody(Teacher):
    """One that never met the data: another model, if given one, else the student's base, below all adapters."""

    def __init__(self, model: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__(model)
        self.copy = other

    @contextmanager
    def answering(self) -> Iterator[nn.Module]:
        if self.copy is not None:
            with super().answering() as other:
                yield other
            return
        with adapters.untouched(self.model), torch.no_grad():
            self.model.eval()
            with adapters.serving(self.model, []):
                yield self.model


class BeforeRequest(Teacher):
    """The model as it was when the request began, keeping a frozen copy of what trains and of nothing else.

    A new adapter is simply switched off (no bytes); an adapter trained further in place is copied as a frozen adapter (a
    few MB); of a model that is trained in part, those parameters are kept and change places with the live ones while the
    teacher answers; a fully trained model is copied whole, or, where ranks hold parts of it (FSDP2), kept in the same way.
    Make it from the unwrapped model before training starts, with its `requires_grad` flags set; `release` takes the copy
    out again.
    """

    name = COPY

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if self.trained is None or not adapters.trains_alone(model, self.trained):
            if all(p.requires_grad for p in model.parameters()) and not self._sharded:
                self.copy = deepcopy(model).eval().requires_grad_(False)
            else:
                named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
                self.kept = {name: (p, p.detach().clone()) for name, p in named}
        elif not adapters.is_identity(model, self.trained):
            adapters.copy_frozen(model, self.trained, self.name)
            self.is_adapter_copy = True


class Reinforced(BeforeRequest):
    """The model after more training on what is to be forgotten: a frozen copy like the other, made while the model has these
    weights."""

    name = REINFORCED
