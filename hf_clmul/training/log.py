"""What happened in the windows since the last log line, and the guard against a collapse. It knows numbers and ranks."""

import math
from typing import TYPE_CHECKING, Any

import torch

from hf_clmul.errors import RunError

if TYPE_CHECKING:
    from accelerate import Accelerator


class WindowLog:
    """Collects losses and statistics of windows; `drain` returns their means over those since the last log line."""

    def __init__(self, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self._window: dict[str, torch.Tensor] = {}
        self._losses: dict[str, torch.Tensor] = {}
        self._statistics: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}

    def add_loss(self, name: str, loss: torch.Tensor) -> None:
        """A micro-batch's share of a term's mean over the window (its shares add up to that mean)."""
        value = loss.detach().float()
        self._window[name] = self._window[name] + value if name in self._window else value

    def add_statistics(self, values: dict[str, float]) -> None:
        """Statistics of a window; one whose gradients overflowed has none, and some are measured now and then only."""
        for name, value in values.items():
            self._statistics.setdefault(name, []).append(value)

    def window_losses(self) -> dict[str, float]:
        """The mean loss of each term in the window that is under way, over all ranks."""
        return dict(zip(self._window, self._over_ranks(self._window), strict=True))

    def end_window(self) -> None:
        """The window is whole; its losses count. A role may sit out a window."""
        for name, value in self._window.items():
            self._counts[name] = self._counts.get(name, 0) + 1
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._window = {}

    def drop_window(self) -> None:
        """Forgets a window that was never finished."""
        self._window = {}

    def stop_if_collapsed(self, step: int, losses: dict[str, float], grad_norm: Any = None) -> None:
        """Raises RunError before optimizer step `step` if a loss of its window or the gradient norm is not finite, on every
        rank alike."""
        bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if grad_norm is not None and not math.isfinite(float(grad_norm)):
            bad.append(f"the gradient norm is {float(grad_norm)}")
        if bad:
            raise RunError(
                f"training collapsed at step {step}: {bad[0]}. The step was not taken and the last checkpoint is kept. "
                "Lower `learning_rate` or the forget term's `weight`, raise a retain term's `weight`, or set `max_grad_norm`."
            )

    def drain(self) -> dict[str, float]:
        """Means since the last call; averaged over the windows that have them, a loss also over ranks."""
        losses = zip(self._losses, self._over_ranks(self._losses), strict=True)
        means = {name: value / self._counts[name] for name, value in losses}
        means |= {name: sum(values) / len(values) for name, values in self._statistics.items()}
        self._losses, self._statistics, self._counts = {}, {}, {}
        return means

    def _over_ranks(self, losses: dict[str, torch.Tensor]) -> list[float]:
        if not losses:
            return []
        return self.accelerator.reduce(torch.stack(list(losses.values())), "mean").tolist()
