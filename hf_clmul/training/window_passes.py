"""The passes over one window that looking ahead and conflict rules ask for: forward and backward of a role over all its
micro-batches. It knows the trainer's way of a loss and of ranks; no rule."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_clmul.gradients.window import Gradient

if TYPE_CHECKING:
    from hf_clmul.trainer import ClmulTrainer


class WindowPasses:
    """The passes over one window (`gradients.lookahead.Passes`): forward and backward of a role over all its micro-batches."""

    def __init__(self, trainer: "ClmulTrainer", model: nn.Module, batches: list[dict[str, Any]], counts: dict) -> None:
        self.trainer, self.model, self.batches, self.counts = trainer, model, batches, counts
        self.loss = torch.zeros((), device=trainer.args.device)
        self.displaced = trainer._window.displaced
        self.anchor = next(iter(trainer.terms))

    def gradient(self, role: str, again: bool = False) -> Gradient:
        for i, batch in enumerate(self.batches):
            last = i == len(self.batches) - 1  # gradients travel between ranks once
            with nullcontext() if last else self.trainer.deferred(self.model):
                loss = self.trainer.role_loss(self.model, role, batch[role], self.counts[role], again)
                self.trainer.accelerator.backward(loss)
            if not again:
                self.loss += loss.detach()
        if role == self.anchor:
            logged = None if again else self.trainer._log.add_loss
            value = self.trainer.penalties.add(logged, 1.0, self.trainer._loss_scale())
            self.loss += 0.0 if again else value
        return self.trainer._window.take()

    def curvature(self, role: str, direction: Gradient) -> Gradient:
        parameters = self.trainer._window.parameters
        for i, batch in enumerate(self.batches):
            with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
                loss = self.trainer.role_loss(self.model, role, batch[role], self.counts[role], again=True)
                if role == self.anchor and i == 0:
                    loss = loss + self.trainer.penalties.loss()
                found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                pairs = zip(found, direction, strict=True)
                slope = sum((g * d).sum() for g, d in pairs if g is not None and d is not None)
                slope.backward()
        return self.trainer._window.take()
