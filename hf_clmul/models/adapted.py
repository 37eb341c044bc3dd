"""The weights of a model that LoRA adapters change, one by one: which adapter trains there, which older ones are frozen beside
it, and the change that it makes. Knows PEFT's layers; nothing of terms, penalties or trainers."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn


@dataclass(frozen=True)
class Adapted:
    """One weight W of the base, by its name in the model without adapters, and the adapter that trains on it."""

    name: str
    layer: Linear
    adapter: str
    older: tuple[str, ...]

    @property
    def weight(self) -> nn.Parameter:
        """The base's own, in the layout that the layer has it in."""
        return self.layer.get_base_layer().weight

    @property
    def a(self) -> nn.Parameter:
        """[r, in]"""
        return self.layer.lora_A[self.adapter].weight

    @property
    def b(self) -> nn.Parameter:
        """[out, r]"""
        return self.layer.lora_B[self.adapter].weight

    def older_a(self) -> Tensor:
        """The A factors of the older adapters, one below the other: [R, in]."""
        found = [self.layer.lora_A[name].weight.detach() for name in self.older]
        return torch.cat(found) if found else self.a.new_zeros(0, self.a.shape[1])

    def delta(self, before: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """s B A, less s B0 A0 of the factors (A0, B0) given, in the layout of the weight and in float32 or better."""
        a, b = wide(self.a), wide(self.b)
        if before is not None:
            # (B - B0) A + B0 (A - A0): exactly zero where nothing moved, and the two deltas are never held beside each other.
            a0, b0 = wide(before[0]), wide(before[1])
            a, b = torch.cat([a, a - a0]), torch.cat([b - b0, b0], 1)
        found = self.layer.scaling[self.adapter] * (b @ a)
        return found.T if self.layer.fan_in_fan_out else found


def adapted(model: PeftModel) -> list[Adapted]:
    """Every weight on which an active adapter trains, in the model's order.

    Raises ValueError for a layer whose change is not s B A of a linear one.
    """
    found = []
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        training = [a for a in layer.active_adapters if any(p.requires_grad for p in _factors(layer, a))]
        if not training:
            continue
        if not isinstance(layer, Linear) or training[0] in layer.lora_variant:
            raise ValueError(
                f"{name} is a {type(layer).__name__}{' with a LoRA variant' * isinstance(layer, Linear)}, and the change that "
                "an adapter makes is known of plain LoRA on linear layers only: leave it out of target_modules, or leave out "
                "DoRA and its like."
            )
        older = tuple(a for a in layer.active_adapters if a not in training and a in layer.lora_A)
        found.append(Adapted(f"{name}.weight", layer, training[0], older))
    return found


def wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _factors(layer: LoraLayer, adapter: str) -> list[nn.Parameter]:
    modules = [m[adapter].weight for m in (layer.lora_A, layer.lora_B) if adapter in m]
    return modules + [m[adapter] for m in (layer.lora_embedding_A, layer.lora_embedding_B) if adapter in m]
