"""The attack by relearning: a few steps of plain denoising on the forgotten images, on a copy of the denoiser. What comes
back quickly was hidden rather than forgotten. It knows nothing of how it was unlearned."""

import copy
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_clmul.errors import RunError
from hf_clmul.evaluation.images.borrowed import evaluating, exchanged, modules_of
from hf_clmul.evaluation.images.denoising import (
    Architecture,
    Descent,
    Draws,
    Noising,
    chosen,
    clean_latents,
    descend,
    losses,
    one_prompt_each,
)


@dataclass(frozen=True)
class Relearned:
    """The attacked copy of the denoiser, the loss on fixed draws before and after, the loss at each step, the cost."""

    component: str
    denoiser: nn.Module
    before: float
    after: float
    losses: list[float]
    steps: int
    seconds: float

    @contextmanager
    def applied(self, pipeline: Any) -> Iterator[None]:
        """The pipeline with the attacked denoiser, to sample from; afterwards with its own again."""
        with exchanged(pipeline, **{self.component: self.denoiser}):
            yield


def relearn(
    pipeline: Any,
    architecture: Architecture,
    noising: Noising,
    pixels: Tensor,
    prompts: Sequence[str],
    how: Descent,
    trained: str = ".*",
    watch: Callable[[int, nn.Module], None] | None = None,
) -> Relearned:
    """`how.steps` steps on forgotten images [N, 3, H, W] in [-1, 1], each under its own prompt; the original is not touched.

    `trained` is a regular expression for the whole names of the parameters that the attacker trains: all of them by
    default, whatever was trained to unlearn. Adam without weight decay, no dropout. `watch` is shown the copy after each step,
    with the number of steps done.

    Raises RunError if no parameter is meant and for images without prompts, NotFinite for a loss that is no number.
    """
    one_prompt_each(pixels, prompts)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(how.seed)
    denoiser = copy.deepcopy(getattr(pipeline, architecture.component))
    parameters = _attacked(denoiser, trained)
    with evaluating(modules_of(pipeline)), torch.no_grad():
        clean = clean_latents(pipeline, architecture, pixels)
        conditioning = architecture.encode_prompts(pipeline, list(prompts))

    def loss_of(draws: Draws) -> Tensor:
        told = chosen(conditioning, draws.images)
        return losses(denoiser, architecture, noising, clean, draws, told)

    with evaluating(list(denoiser.modules())):
        shown = None if watch is None else partial(_shown, watch, denoiser)
        done = descend("relearning", loss_of, parameters, clean, generator, how, shown)
    seconds = time.perf_counter() - started
    return Relearned(architecture.component, denoiser, done.before, done.after, done.losses, how.steps, seconds)


def _shown(watch: Callable[[int, nn.Module], None], denoiser: nn.Module, step: int) -> None:
    watch(step, denoiser)


def _attacked(denoiser: nn.Module, trained: str) -> list[nn.Parameter]:
    """The parameters that are trained, alone with a gradient and without an old one."""
    denoiser.zero_grad(set_to_none=True)
    denoiser.requires_grad_(False)
    meant = [parameter for name, parameter in denoiser.named_parameters() if re.fullmatch(trained, name)]
    if not meant:
        raise RunError(f"relearning: no parameter of the denoiser is called {trained!r}")
    for parameter in meant:
        parameter.requires_grad_(True)
    return meant
