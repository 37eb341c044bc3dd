"""Hidden states inside a model's forward pass: which layer a number or fraction names, and what it puts out.
Knows how models of transformers are built; nothing of terms or batches."""

from collections.abc import Callable, Collection
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel


class _Reached(Exception):
    """The last wanted layer has answered."""


def blocks(model: nn.Module) -> nn.ModuleList:
    """The layers of a model, below any PEFT or DDP wrapper: its first list of as many modules as its config
    has layers."""
    inner = _inner(model)
    depth = inner.config.get_text_config().num_hidden_layers
    return next(m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)


def index(layer: float, depth: int) -> int:
    """The number, from 0, of a layer given by number or by its place as a fraction of the depth.

    Raises ValueError if there is no such layer.
    """
    number = layer if isinstance(layer, int) else int(layer * depth)
    if number >= depth:
        raise ValueError(
            f"there is no layer {number}: the model has {depth}, from 0 to {depth - 1}. "
            "Give one of them, or a fraction of the depth such as 0.25."
        )
    return number


def lowest(model: nn.Module, parameters: Collection[nn.Parameter]) -> int:
    """The lowest layer that one of the parameters belongs to: -1 for what comes before the layers, such as embeddings, and
    the depth for what comes behind them, such as the final norm."""
    layers = blocks(model)
    place = {p: number for number, layer in enumerate(layers) for p in layer.parameters()}
    found, place_outside = [], -1
    for (
        p
    ) in model.parameters():  # modules stand in the order in which they are called; tied weights where they come first
        if p in place:
            place_outside = len(layers)
        if p in parameters:
            found.append(place.get(p, place_outside))
    return min(found)


def recorded(
    model: nn.Module, layers: Collection[float], forward: Callable[[], Any], stop: bool, instead: bool = False
) -> tuple[Any, dict[float, Tensor]]:
    """(what `forward()` returns, {layer: its output [B, T, H], before any final norm}).

    With `stop` the pass ends behind the last of the layers, so that nothing above it is computed, and returns
    None. With `instead` the outputs of the layers are the model's own output in the eyes of DDP, which then sees that no
    gradient will come for what is above them; None is returned likewise.
    """
    found: dict[int, Tensor] = {}
    modules = blocks(model)
    numbers = {layer: index(layer, len(modules)) for layer in layers}

    def keep(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output
            if stop and number == max(numbers.values()):
                raise _Reached

        return hook

    handles = [modules[number].register_forward_hook(keep(number)) for number in set(numbers.values())]
    if instead:
        handles.append(model.module.register_forward_hook(lambda module, inputs, output: dict(found)))
    try:
        returned = forward()
        if instead:
            found, returned = returned, None
    except _Reached:
        returned = None
    finally:
        for handle in handles:
            handle.remove()
    return returned, {layer: found[number] for layer, number in numbers.items()}


def several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def can_stop(model: nn.Module) -> bool:
    """Whether a pass may end early: wrappers for several ranks, and checkpointing, have to see its end."""
    return not several_ranks() and not _inner(model).is_activation_checkpointing


def finds_unused(model: nn.Module) -> bool:
    """Whether a DDP model looks for parameters that an output does not depend on."""
    return isinstance(model, DistributedDataParallel) and model.find_unused_parameters


def _inner(model: nn.Module) -> PreTrainedModel:
    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))
