"""The gradients of one window, role by role: taken out of `.grad`, measured against each other, combined into one.

The only code that knows how gradients are stored (bucket views, loss scale, ranks). It knows no model and no loss.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_clmul.errors import RunError

Gradient = list[Tensor | None]
"""One role's gradient: a tensor, or None where it does not reach a parameter, for each trainable parameter."""


class GradientWindow:
    """Role gradients over a fixed list of parameters (take it from the optimizer, once) of a model.

    `clone`: the storage of `.grad` is reused by the next backward pass (DDP with `gradient_as_bucket_view`), so that a
    snapshot has to be a copy. `masks`: for each parameter where it trains, a bool tensor of its shape, or None for everywhere.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        clone: bool = False,
        masks: Sequence[Tensor | None] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.parameters, self.clone = list(parameters), clone
        self.masks = list(masks) if masks is not None else [None] * len(self.parameters)
        self._sharded = [] if model is None else [m for m in model.modules() if isinstance(m, FSDPModule)]

    def take(self) -> Gradient:
        """Moves the gradient that a role has accumulated out of `.grad`, which is left empty."""
        self.apply_masks()
        taken = [p.grad.clone() if self.clone and p.grad is not None else p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None
        return taken

    @torch.no_grad()
    def apply_masks(self) -> None:
        """Zeroes the gradient in `.grad` of what does not train."""
        for p, mask in zip(self.parameters, self.masks, strict=True):
            if mask is not None and p.grad is not None:
                p.grad.mul_(mask)

    @contextmanager
    def displaced(self, gradient: Gradient, step: float) -> Iterator[None]:
        """Within it the weights are moved by `step` times `gradient`; afterwards they are restored bit for bit, whatever
        happened. A gradient that is not finite moves nothing: its window is lost anyway, and the loss would be too.

        In place, on this rank's shard: FSDP ignores replaced storage and keeps stale weights unsharded, hence `reshard`.
        """
        reached = [i for i, g in enumerate(gradient) if g is not None]
        if not math.isfinite(inner_product(gradient, gradient)):  # the same on all ranks, whatever their shards hold
            reached = []
        moved = [self.parameters[i] for i in reached]
        with torch.no_grad():
            before = [p.detach().clone() for p in moved]
        try:
            with torch.no_grad():
                self._reshard()
                for i, p in zip(reached, moved, strict=True):
                    p.add_(gradient[i].to(p.dtype), alpha=step)
            del gradient  # the passes to come need its memory, where the caller has let go of it too
            yield
        finally:
            with torch.no_grad():
                self._reshard()
                for p, value in zip(moved, before, strict=True):
                    p.copy_(value)

    def _reshard(self) -> None:
        for module in self._sharded:
            module.reshard()

    def combine(self, gradients: Sequence[Gradient], weights: Sequence[float]) -> None:
        """Writes the weighted sum of the roles' gradients into `.grad`, in the storage of the given ones."""
        self.put([weighted_sum(tensors, weights) for tensors in zip(*gradients, strict=True)])

    def put(self, gradient: Gradient) -> None:
        """Makes a gradient the update, in `.grad`."""
        for p, tensor in zip(self.parameters, gradient, strict=True):
            if tensor is not None:
                p.grad = tensor


def weighted_sum(tensors: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    """In the storage of the first tensor there is; None if there is none."""
    parts = [(tensor, weight) for tensor, weight in zip(tensors, weights, strict=True) if tensor is not None]
    if not parts:
        return None
    total, weight = parts[0]
    total.mul_(weight)
    for tensor, weight in parts[1:]:
        total.add_(tensor, alpha=weight)
    return total


def total(gradients: Sequence[Gradient]) -> Gradient:
    """The sum of gradients; a single one as it is, several in new storage."""
    if len(gradients) == 1:
        return gradients[0]
    return [
        weighted_sum([None if t is None else t.clone() for t in tensors], [1.0] * len(tensors))
        for tensors in zip(*gradients, strict=True)
    ]


def inner_product(one: Gradient, other: Gradient) -> float:
    """Summed in float64 over tensors."""
    pairs = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return _whole_sum([torch.dot(a.reshape(-1).float(), b.reshape(-1).float()) for a, b in pairs])


def _whole_sum(parts: Sequence[Tensor]) -> float:
    """Of scalars, in float64. A sharded one is a rank's part of a sum: taken for the whole, ranks would see other angles."""
    sharded = [part for part in parts if isinstance(part, DTensor)]
    plain = [part for part in parts if not isinstance(part, DTensor)]
    found = float(torch.stack(plain).double().sum()) if plain else 0.0
    return found + float(torch.stack(sharded).double().sum().full_tensor()) if sharded else found


def scale(gradients: Sequence[Gradient], factor: float) -> None:
    """Multiplies gradients in place; a power of two, such as a loss scale or its inverse, leaves no
    rounding."""
    if factor != 1.0:
        for tensor in (t for gradient in gradients for t in gradient if t is not None):
            tensor.mul_(factor)


def gram_matrix(gradients: Sequence[Gradient], loss_scale: float = 1.0) -> list[list[float]]:
    """Inner products [m, m] of the roles' gradients, summed in float64 over tensors, with the loss scale divided out.

    Give it gradients that are already reduced over ranks: rank-local ones can have the wrong sign.
    """
    m = len(gradients)
    sums: dict[tuple[int, int], list[Tensor]] = {(i, j): [] for i in range(m) for j in range(i, m)}
    for tensors in zip(*gradients, strict=True):
        flat = [None if t is None else t.reshape(-1).float() for t in tensors]
        for i, j in sums:
            if flat[i] is not None and flat[j] is not None:
                sums[i, j].append(torch.dot(flat[i], flat[j]))
    gram = [[0.0] * m for _ in range(m)]
    for (i, j), parts in sums.items():
        value = _whole_sum(parts) / loss_scale**2
        gram[i][j] = gram[j][i] = value
    return gram


def save_gradient(gradient: Gradient, file: Path) -> None:
    """Writes a gradient as safetensors, its tensors named by their place among the trainable parameters."""
    save_file({str(i): t.contiguous() for i, t in enumerate(gradient) if t is not None}, file)


def load_gradient(file: Path, parameters: Sequence[torch.nn.Parameter]) -> Gradient:
    """What `save_gradient` wrote. Raises RunError if it is for other parameters."""
    found = load_file(file)
    shapes = {str(i): p.shape for i, p in enumerate(parameters)}
    if any(shapes.get(name) != tensor.shape for name, tensor in found.items()):
        raise RunError(f"{file} is for other parameters: resume with the model and adapter that made it.")
    return [found[str(i)].to(p.device) if str(i) in found else None for i, p in enumerate(parameters)]


def is_finite(gram: Sequence[Sequence[float]]) -> bool:
    return all(math.isfinite(value) for row in gram for value in row)


def agreed(weights: Sequence[float], device: torch.device) -> list[float]:
    """Rank 0's weights, on every rank: rounding must not let replicas drift apart."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(weights)
    shared = torch.tensor(list(weights), dtype=torch.float64, device=device)
    dist.broadcast(shared, src=0)
    return shared.tolist()


def statistics(gram: Sequence[Sequence[float]], roles: Sequence[str]) -> dict[str, float]:
    """What the log shows of a window: `grad_norm/ROLE`, `cosine/A/B` and `conflict_rate` (1 if any pair conflicts)."""
    norms = [math.sqrt(max(gram[i][i], 0.0)) for i in range(len(roles))]
    logged = {f"grad_norm/{role}": norm for role, norm in zip(roles, norms, strict=True)}
    conflict = False
    for i in range(len(roles)):
        for j in range(i + 1, len(roles)):
            scale = norms[i] * norms[j]
            logged[f"cosine/{roles[i]}/{roles[j]}"] = gram[i][j] / scale if scale > 0 else 0.0
            conflict |= gram[i][j] < 0
    logged["conflict_rate"] = float(conflict)
    return logged
