"""Penalties on the weights of a model in training: their values, and their gradients added to the anchor role's, once in a
window. It knows weights and penalties; no batch, no rank, no conflict rule."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_clmul.models.adapted import Adapted, adapted, wide
from hf_clmul.objectives.penalties import ActivePenalty, Weight, active_penalties
from hf_clmul.training.importance import measured


def check_penalties(model: nn.Module, penalties: list[ActivePenalty]) -> None:
    """Raises ValueError for a penalty that has nothing to act on in this model."""
    for active in penalties:
        if active.penalty.of_adapters and not isinstance(model, PeftModel):
            raise ValueError(
                f"penalties/{active.name} acts on the factors of an adapter, and the model has none: give it an adapter "
                "(`adapter:` in a recipe, `peft_config` in Python), or take ewc, which also knows plain weights."
            )
    if not penalties or not isinstance(model, PeftModel):
        return
    try:
        if not adapted(model):
            raise ValueError("no linear layer has an adapter that trains.")
    except ValueError as error:
        raise ValueError(f"penalties/{penalties[0].name}: {error}") from error


class Penalties:
    """What a request's `penalties` ask for. `importance`, by weight, is what older tasks need, see `importance.accumulated`;
    an empty one is that of a first task.

    Each rank works the same out from the same weights, so that nothing has to travel; a gradient by `torch.autograd.grad`
    is one that DDP does not wait for.
    """

    def __init__(self, wanted: Any, importance: Mapping[str, Tensor] | None) -> None:
        self.active, self.importance = active_penalties(wanted), importance
        self._parts: list[_Plain | _Lora] = []
        self._device = torch.device("cpu")
        asking = [active.name for active in self.active if "importance" in active.penalty.needs]
        if asking and importance is None:
            raise ValueError(
                f"penalties/{asking[0]} needs to know what older tasks need: give importance=..., as "
                "hf_clmul.training.importance.accumulated makes it once a task is learned, or {} where nothing was learned before."
            )

    @property
    def anchored(self) -> bool:
        """Whether what the weights were when the request began has to be known."""
        return any("change" in active.penalty.needs for active in self.active)

    def start(self, model: nn.Module) -> None:
        """Takes the weights as they are for where the request begins. Raises ValueError if the importance is of others."""
        self._parts = []
        if not self.active:
            return
        self._device = next(model.parameters()).device
        weights, known = measured(model), self.importance if self.anchored else None
        if known:
            odd = [name for name, p in weights.items() if name not in known or known[name].shape != p.shape]
            if odd:
                raise ValueError(
                    f"importance has nothing that fits {len(odd)} of {len(weights)} weights that train, such as {odd[0]}: it "
                    "was measured on another model, or on another choice of layers. Measure it again."
                )
        f = {name: known[name].to(p.device) if known else None for name, p in weights.items()}
        if isinstance(model, PeftModel):
            self._parts = [_Lora(one, f[one.name], self.anchored) for one in adapted(model)]
        else:
            self._parts = [_Plain(p, f[name], self.anchored) for name, p in weights.items()]

    def add(self, log: Callable[[str, Tensor], None] | None, weight: float, loss_scale: float) -> Tensor | float:
        """Adds the gradient of all penalties, `weight` times, to `.grad`, and returns their sum, `weight` times.

        A weight of zero leaves everything alone: its role sits the window out. Call it once for each gradient of a window,
        after the last backward pass; with `log` None it is logged already.
        """
        total: Tensor | float = 0.0
        for active in self.active if weight else ():
            found, value, entries = [], torch.zeros((), device=self._device), 0
            for part, one, size in self._values(active):
                if one.requires_grad:
                    trains = [p for p in part.parameters if p.requires_grad]
                    found += zip(trains, torch.autograd.grad(one, trains, allow_unused=True), strict=True)
                value, entries = value + one.detach().to(value.device), entries + size
            share = 1 / max(entries, 1) if active.penalty.mean else 1.0
            factor = share * weight * active.weight
            for p, gradient in found:
                if gradient is not None:
                    gradient = gradient.mul_(factor * loss_scale)
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
            total = total + factor * value
            if log is not None:
                log(f"loss/penalty/{active.name}", share * value)
        return total

    def loss(self) -> Tensor | float:
        """The weighted sum of all penalties, as something to be differentiated."""
        total: Tensor | float = 0.0
        for active in self.active:
            values = [(one, size) for _, one, size in self._values(active)]
            share = 1 / max(sum(size for _, size in values), 1) if active.penalty.mean else 1.0
            total = total + share * active.weight * sum(one for one, _ in values)
        return total

    def _values(self, active: ActivePenalty) -> Iterator[tuple["_Plain | _Lora", Tensor, int]]:
        if "importance" in active.penalty.needs and not self.importance:
            return  # nothing was learned before
        for part in self._parts:
            yield part, *active.penalty.function(part.seen(active.penalty.needs), **active.parameters)


class _Plain:
    """A parameter that trains as it is."""

    def __init__(self, parameter: nn.Parameter, importance: Tensor | None, anchored: bool) -> None:
        self.parameters, self.importance = [parameter], importance
        self.before = parameter.detach().clone() if anchored else None

    def seen(self, needs: frozenset[str]) -> Weight:
        (p,) = self.parameters
        return Weight(wide(p) - wide(self.before), self.importance)


class _Lora:
    """A weight that an adapter changes. A new adapter, whose B is zero, has nothing to be remembered of it."""

    def __init__(self, one: Adapted, importance: Tensor | None, anchored: bool) -> None:
        self.one, self.importance, self.parameters = one, importance, [one.a, one.b]
        self.before = (one.a.detach().clone(), one.b.detach().clone()) if anchored and one.b.any() else None

    def seen(self, needs: frozenset[str]) -> Weight:
        return Weight(
            self.one.delta(self.before) if "change" in needs else None,
            self.importance,
            wide(self.one.a) if "a" in needs else None,
            wide(self.one.b) if "b" in needs else None,
            wide(self.one.older_a()) if "older" in needs else None,
        )
