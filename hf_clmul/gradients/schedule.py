"""Conflict rules that know their weights before a window begins, from what came before: no gradients are compared, so that
the roles' losses are simply added up, weighted. Pure functions; no torch, no model.

Each maps (weights of the last window [m], its mean losses [m], progress) to the next window's weights [m]; before the first
window both are None. Role 0 is the one that the request is about. A role of weight 0 has no gradient in its window.
"""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

Numbers = list[float] | None


@dataclass(frozen=True)
class Progress:
    """How far training is: `roles` m, and `epoch`, in passes over role 0's data, at the end of the last window."""

    roles: int
    epoch: float


def pdu(
    weights: Numbers,
    losses: Numbers,
    progress: Progress,
    *,
    epsilon: Annotated[float, Ge(0)] = 0.3,
    step: Annotated[float, Gt(0)] = 1.0,
    start: Annotated[float, Ge(0)] = 50.0,
    warmup: Annotated[float, Ge(0)] = 5.0,
) -> list[float]:
    """Forgets subject to a retain loss of at most epsilon: w = (1, lambda), lambda <- max(0, lambda + step (loss - epsilon)).

    PDU (arXiv 2506.05314): primal-dual, one multiplier for each kept role, updated once a window from the loss over all
    ranks. `epsilon` is in the retain loss's unit (nats for `nll`); 0.3 is the authors' for TOFU, who advise 1 + tolerance
    times the loss of the model before. `start` 50 (theirs: 50 to 100), `step` 1, `warmup` 5 epochs before the first update.
    """
    if weights is None or losses is None:
        return [1.0] + [start] * (progress.roles - 1)
    if progress.epoch < warmup:
        return weights
    return [1.0] + [max(0.0, w + step * (loss - epsilon)) for w, loss in zip(weights[1:], losses[1:], strict=True)]


def alternate(
    weights: Numbers, losses: Numbers, progress: Progress, *, forget_epochs: Annotated[float, Ge(0)] = 2.0
) -> list[float]:
    """Windows in turn: one on role 0 alone, one on the kept roles alone; after `forget_epochs` on the kept roles only.

    The schedule of SCRUB (Kurmanji et al., arXiv 2302.09880), whose authors take turns of an epoch each; forgetting stops
    early and retaining repairs. 2 of 6 epochs is a common setting for its image classifiers.
    """
    forgets = progress.epoch < forget_epochs and (weights is None or weights[0] == 0)
    return [1.0, *[0.0] * (progress.roles - 1)] if forgets else [0.0, *[1.0] * (progress.roles - 1)]
