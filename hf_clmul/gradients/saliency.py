"""Which weights matter for what is to be forgotten: masks that let only those train (SalUn), and trimming, which draws them
anew (Scissorhands). It knows tensors and their names; no model kind, no term, no trainer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def top(scores: Sequence[Tensor], fraction: float) -> list[Tensor]:
    """Bool tensors that mark the `fraction` of all entries with the largest scores, over all tensors together.

    Entries of score zero are never marked; ties at the threshold all are.
    """
    flat = torch.cat([s.reshape(-1).float() for s in scores])
    chosen = round(fraction * flat.numel())
    threshold = float(flat.kthvalue(flat.numel() - chosen + 1).values) if chosen else math.inf
    return [(s.float() >= threshold) & (s > 0) for s in scores]


def gradient_scores(gradients: Sequence[Tensor]) -> list[Tensor]:
    """|g|: SalUn (Fan et al., arXiv 2310.12508, eq. 3), whose default is to train the top half."""
    return [g.abs() for g in gradients]


def connection_scores(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """|g w|: SNIP's connection sensitivity (Lee et al., arXiv 1810.02340), as used for trimming by Scissorhands (ECCV 2024)."""
    return [(g * w).abs() for g, w in zip(gradients, weights, strict=True)]


@torch.no_grad()
def trim(parameters: Sequence[tuple[str, nn.Parameter]], marked: Sequence[Tensor], generator: torch.Generator) -> int:
    """Draws the marked entries of matrices anew (Kaiming uniform) and sets those of a LoRA's B matrices to zero, their
    initial value; vectors (biases, norms) are left alone. Returns how many entries were drawn.

    Scissorhands (Wu and Harandi, ECCV 2024) trims the top 1 to 10 % before it repairs.
    """
    drawn = 0
    for (name, p), mask in zip(parameters, marked, strict=True):
        if p.ndim < 2 or not mask.any():
            continue
        fresh = torch.zeros(p.shape)
        if "lora_B" not in name:
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
        p.copy_(torch.where(mask, fresh.to(p), p))
        drawn += int(mask.sum())
    return drawn


class Held:
    """The entries that a mask keeps from training, as they are now; `restore` puts them back.

    A zero gradient is not enough: weight decay and momentum move weights without one.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], masks: Sequence[Tensor]) -> None:
        self._kept = [(p, mask, p.detach()[~mask]) for p, mask in zip(parameters, masks, strict=True)]

    @torch.no_grad()
    def restore(self) -> None:
        for p, mask, values in self._kept:
            p.masked_scatter_(~mask, values)
