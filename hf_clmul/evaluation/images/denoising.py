"""The plain denoising loss that attacks go down, with all that is random drawn from one seed. It knows an architecture and
a noising by what they can do (see `Architecture` and `Noising`), and no concept."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_clmul.errors import NotFinite, RunError
from hf_clmul.evaluation.images.borrowed import is_main

Conditioning = dict[str, Tensor]

_PROBES = 4  # draws per image of the loss before and after: one draw says more of its time than of the model


class Architecture(Protocol):
    """What a family knows of a class of pipelines; see `hf_clmul.models.diffusion`."""

    component: str

    def encode_images(self, pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]: ...
    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> Conditioning: ...
    def call(self, model: nn.Module, noisy: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor: ...


class Noising(Protocol):
    """Times, noisy samples, data targets and weights of a scheduler; see `hf_clmul.models.diffusion`."""

    def times(self, u: Tensor) -> Tensor: ...
    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...
    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...
    def weights(self, times: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Descent:
    """How far an attacker goes: optimizer steps of Adam, its learning rate, images in a step, and the seed of all draws."""

    steps: int
    learning_rate: float
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Draws:
    """Which images [B] are taken, at which u [B] in [0, 1), under which noise [B, C, h, w]."""

    images: Tensor
    u: Tensor
    noise: Tensor


def clean_latents(pipeline: Any, architecture: Architecture, pixels: Tensor) -> Tensor:
    """The mean latents [N, C, h, w] of pixels [N, 3, H, W] in [-1, 1], one image at a time: few are attacked with."""
    if not len(pixels):
        raise RunError("an attack needs at least one image of the concept")
    with torch.no_grad():
        return torch.cat([architecture.encode_images(pipeline, image[None])[0].float() for image in pixels])


def draw(generator: torch.Generator, clean: Tensor, count: int) -> Draws:
    """`count` images with replacement, on the CPU, so that every device sees the same."""
    images = torch.randint(len(clean), (count,), generator=generator)
    u = torch.rand(count, generator=generator)
    return Draws(images, u, torch.randn(count, *clean.shape[1:], generator=generator))


def probe(generator: torch.Generator, clean: Tensor) -> Draws:
    """The fixed draws of the loss before and after: every image at times spread evenly over the schedule."""
    count = len(clean) * _PROBES
    u = (torch.randperm(count, generator=generator) + 0.5) / count
    return Draws(torch.arange(count) % len(clean), u, torch.randn(count, *clean.shape[1:], generator=generator))


def losses(
    model: nn.Module,
    architecture: Architecture,
    noising: Noising,
    clean: Tensor,
    draws: Draws,
    conditioning: Conditioning,
) -> Tensor:
    """[B]: the weighted squared error of each draw, its mean over elements. `conditioning` has the draws' own prompts."""
    at = clean[draws.images.to(clean.device)]
    noise, times = draws.noise.to(at), noising.times(draws.u.to(at))
    output = architecture.call(model, noising.add_noise(at, noise, times), times, conditioning)
    error = (output.float() - noising.target(at, noise, times)) ** 2
    return noising.weights(times) * error.flatten(1).mean(1)


def mean_loss(loss_of: Callable[[Draws], Tensor], draws: Draws, batch_size: int) -> float:
    """The mean of the losses of many draws, without gradient, some at a time."""
    with torch.no_grad():
        some = [slice(start, start + batch_size) for start in range(0, len(draws.u), batch_size)]
        found = [loss_of(Draws(draws.images[at], draws.u[at], draws.noise[at])) for at in some]
    return float(torch.cat(found).mean())


def finite(loss: Tensor | float, attack: str, step: int) -> float:
    """The loss after so many steps as a number. Raises NotFinite where it is none."""
    value = float(torch.as_tensor(loss).detach())
    if not math.isfinite(value):
        raise NotFinite(f"{attack}: the loss is {value} after step {step}. Choose a smaller learning rate or float32.")
    return value


@dataclass(frozen=True)
class Descended:
    """The loss on fixed draws before and after, and at each step on its own draws."""

    before: float
    after: float
    losses: list[float]


def descend(
    attack: str,
    loss_of: Callable[[Draws], Tensor],
    trained: Sequence[Tensor],
    clean: Tensor,
    generator: torch.Generator,
    how: Descent,
    after_step: Callable[[int], None] | None = None,
) -> Descended:
    """Adam without weight decay, in place, on what an attack trains. `loss_of` gives the losses [B] of draws; `after_step` is told
    the number of steps done.

    Raises RunError where no gradient reaches what is trained, and NotFinite for a loss that is no number.
    """
    fixed, optimizer, found = probe(generator, clean), torch.optim.Adam(trained, lr=how.learning_rate), []
    with torch.enable_grad():
        before = finite(mean_loss(loss_of, fixed, how.batch_size), attack, 0)
        for step in tqdm(range(how.steps), desc=attack, leave=False, disable=not is_main()):
            loss = loss_of(draw(generator, clean, how.batch_size)).mean()
            found.append(finite(loss, attack, step))
            # Not backward(): what an attack does not train must get no gradient, whether it asks for one or not.
            for tensor, gradient in zip(trained, _gradients(loss, trained, attack), strict=True):
                tensor.grad = gradient
            optimizer.step()
            if after_step is not None:
                after_step(step + 1)
        after = finite(mean_loss(loss_of, fixed, how.batch_size), attack, how.steps)
    optimizer.zero_grad(set_to_none=True)
    return Descended(before, after, found)


def _gradients(loss: Tensor, trained: Sequence[Tensor], attack: str) -> tuple[Tensor | None, ...]:
    """None for what the network makes no use of, such as one of several text encoders."""
    found = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else (None,)
    if all(gradient is None for gradient in found):
        raise RunError(f"{attack}: no gradient of the loss reaches what is to be trained")
    return found


def chosen(conditioning: Conditioning, images: Tensor) -> Conditioning:
    """The conditioning of the drawn images."""
    return {name: values[images.to(values.device)] for name, values in conditioning.items()}


def one_prompt_each(pixels: Tensor, prompts: Sequence[str]) -> None:
    """Raises RunError unless every image has its prompt."""
    if len(pixels) != len(prompts):
        raise RunError(f"an attack needs one prompt for each image, found {len(pixels)} images, {len(prompts)} prompts")
