"""The one statistic of an example that needs a backward pass, for the gradient-norm attack. Knows the family's `predict`;
nothing of groups, attacks or training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import encode
from hf_clmul.models import causal_lm


def gradient_norms(
    model: nn.Module, tokenizer: Any, examples: Sequence[Mapping[str, Any]], max_length: int | None = None
) -> list[float]:
    """For each example the mean over parameter tensors of the 2-norm of the gradient of its mean loss (nats a token), one
    example at a time, in eval mode, as OpenUnlearning measures it (arXiv 2506.12618).

    All parameters that the loss depends on count, whether they are trained or not: a frozen base remembers too. `model`
    is the bare model; its gradients, flags and mode are left as they were.
    """
    collator = RoleCollator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    accepted = causal_lm.accepted_inputs(model)
    with _all_trainable(model) as parameters:
        return [
            _norm(
                model,
                send_to_device(collator([encode(example, tokenizer, max_length)]), model.device),
                accepted,
                parameters,
            )
            for example in examples
        ]


def _norm(
    model: nn.Module, batch: Mapping[str, Any], accepted: frozenset[str], parameters: list[nn.Parameter]
) -> float:
    with torch.enable_grad():
        loss = -causal_lm.predict(model, batch, frozenset({"logps"}), accepted).logps.mean()
    # Not `backward`: whatever stands in `.grad` may belong to a training step.
    found = [g for g in torch.autograd.grad(loss, parameters, allow_unused=True) if g is not None]
    return float(torch.stack([torch.linalg.vector_norm(g.float()) for g in found]).mean())


@contextmanager
def _all_trainable(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Every floating-point parameter, each once, with gradients on; flags and mode are given back."""
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for p, _ in flags:
        p.requires_grad_(True)
    try:
        yield [p for p, _ in flags]
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode
