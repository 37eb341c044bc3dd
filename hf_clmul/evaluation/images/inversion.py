"""The attack by textual inversion (Gal et al., arXiv 2208.01618) on an unlearned model: one new token whose embedding is
optimised until the model draws the forgotten concept for it. Nothing of the model is trained, and nothing of it changes."""

import inspect
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.borrowed import evaluating, modules_of
from hf_clmul.evaluation.images.denoising import (
    Architecture,
    Descent,
    Draws,
    Noising,
    clean_latents,
    descend,
    losses,
    one_prompt_each,
)
from hf_clmul.evaluation.images.new_token import PLACEHOLDER, check_prompts, initial_embeddings, with_token


@dataclass(frozen=True)
class Inversion:
    """The new token's embedding [D] in each text encoder, the word that it began as, the loss on fixed draws before and
    after, the loss at each step, the cost."""

    embeddings: Mapping[str, Tensor]
    initial: str
    before: float
    after: float
    losses: list[float]
    steps: int
    seconds: float

    @contextmanager
    def applied(self, pipeline: Any) -> Iterator[None]:
        """The pipeline knows PLACEHOLDER in its prompts; afterwards it knows nothing of it."""
        with with_token(pipeline, self.embeddings, self.initial):
            yield


def disguised(prompts: Sequence[Mapping[str, Any]], word: str) -> list[dict[str, Any]]:
    """The prompts with PLACEHOLDER in place of a word of their captions. Raises RecipeError where the word is missing."""
    found = []
    for prompt in prompts:
        caption, count = re.subn(rf"\b{re.escape(word)}\b", PLACEHOLDER, prompt["caption"])
        if not count:
            raise RecipeError(
                f"inversion, prompt {prompt['id']}: {prompt['caption']!r} has no word {word!r} to replace"
            )
        found.append({**prompt, "caption": caption})
    return found


def invert(
    pipeline: Any,
    architecture: Architecture,
    noising: Noising,
    pixels: Tensor,
    prompts: Sequence[str],
    how: Descent,
    initial: str,
) -> Inversion:
    """The embedding under which the model best denoises images [N, 3, H, W] in [-1, 1], each under its own prompt.

    Every prompt has PLACEHOLDER in it. `initial` is the word that the token begins as, e.g. a neighbour of the concept; of
    several tokens the mean. All text encoders of the pipeline get an embedding of their own. The pipeline, its tokenizers,
    weights, gradients, flags and modes are as they were when this returns or fails.

    Raises RunError for a pipeline without text encoders, for prompts that lose PLACEHOLDER (too long) or images without
    prompts, and for an encoding of prompts that no gradient passes; NotFinite for a loss that is no number.
    """
    one_prompt_each(pixels, prompts)
    started = time.perf_counter()
    generator = torch.Generator().manual_seed(how.seed)
    # A family encodes prompts without gradient, by a decorator, as nobody else needs one.
    encode = inspect.unwrap(architecture.encode_prompts)
    model = getattr(pipeline, architecture.component)
    embeddings = initial_embeddings(pipeline, initial)
    with with_token(pipeline, embeddings, initial), evaluating(modules_of(pipeline)):
        check_prompts(pipeline, prompts)
        clean = clean_latents(pipeline, architecture, pixels)

        def loss_of(draws: Draws) -> Tensor:
            conditioning = encode(pipeline, [prompts[i] for i in draws.images.tolist()])
            return losses(model, architecture, noising, clean, draws, conditioning)

        done = descend("inversion", loss_of, list(embeddings.values()), clean, generator, how)
    kept = {name: vector.detach() for name, vector in embeddings.items()}
    seconds = time.perf_counter() - started
    return Inversion(kept, initial, done.before, done.after, done.losses, how.steps, seconds)
