"""How near a prompt comes to a concept, as a text encoder sees it: what SPM anchors and gates adapters by. It knows a
pipeline through its encoder; no role, no training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_clmul.errors import RecipeError

if TYPE_CHECKING:
    from hf_clmul.models.diffusion.encoding import Encoder

STATES = "encoder_hidden_states"


def similarity(prompts: Tensor, concepts: Tensor) -> Tensor:
    """Cosine [N], to rounding, of each prompt's states [N, T, D] with those of the concept nearest to it, of [E, T, D]; over
    all tokens and channels together, padding too, as in the code of SPM (arXiv 2312.16145)."""
    one, other = (states.flatten(1).double() for states in (prompts, concepts))
    norms = one.norm(dim=1)[:, None] * other.norm(dim=1)
    return (one @ other.T / norms.clamp_min(torch.finfo(norms.dtype).tiny)).amax(1)


def apartness(similarities: Tensor, alpha: float = 1.0) -> Tensor:
    """How much each of N anchors counts, [N], mean 1: in proportion to min(1, 1 - s)^alpha, s [N] its likeness to the concept.

    SPM (arXiv 2312.16145) draws anchors and keeps one with the probability 1 - s; here each is there and weighs as often
    as it would be kept. Raises ValueError where all are the concept itself.
    """
    shares = (1 - similarities).clamp(0, 1) ** alpha
    if not shares.sum() > 0:
        raise ValueError("every anchor is the concept itself")
    return shares / shares.mean()


def of_examples(kept: Sequence[Any], forgotten: Sequence[Any], alpha: float, what: str) -> list[Any]:
    """The encoded examples to keep with their `apartness` from the prompts to be forgotten.

    Raises RecipeError where nothing is to be forgotten, where embeddings change in training or the network reads none, or where
    every prompt is one to be forgotten.
    """
    if not forgotten:
        raise RecipeError(
            f"{what} weighs prompts by their likeness to those to be forgotten, and there are none: take `distill`."
        )
    if "input_ids" in kept[0]["conditioning"]:
        raise RecipeError(
            f"{what} weighs prompts by their embeddings, which change as the text encoder trains: take `distill`."
        )
    if STATES not in kept[0]["conditioning"]:
        raise RecipeError(f"{what} weighs prompts by their embeddings, and this network reads none: take `distill`.")
    concepts = {e["row"]["caption"]: e["conditioning"][STATES] for e in forgotten}
    anchors = {e["row"]["caption"]: e["conditioning"][STATES] for e in kept}
    alike = similarity(torch.stack(list(anchors.values())), torch.stack(list(concepts.values())))
    by_prompt = dict(zip(anchors, alike, strict=True))
    try:
        weights = apartness(torch.stack([by_prompt[e["row"]["caption"]] for e in kept]), alpha)
    except ValueError as error:
        raise RecipeError(f"{what}: {error}: give other prompts to retain.") from error
    return [{**example, "apartness": weight.float()} for example, weight in zip(kept, weights, strict=True)]


def gate(encoder: "Encoder", prompt: str, concepts: Sequence[str]) -> float:
    """The strength, in [0, 1], that SPM gives an adapter for a prompt: its likeness to the nearest of `concepts`, by
    embeddings (see `similarity`) or by the share of a concept's tokens that stand in it, whichever is more.

    SPM (arXiv 2312.16145), `clipcos_tokenuni` of its code. For `set_adapters` of a pipeline, prompt by prompt.
    """
    states = [encoder.prompt(text)[STATES] for text in (prompt, *concepts)]
    by_embedding = float(similarity(states[0][None], torch.stack(states[1:])))
    words, *others = (_words(encoder.pipeline.tokenizer, text) for text in (prompt, *concepts))
    by_token = max(len(words & other) / max(len(other), 1) for other in others)
    return min(1.0, max(0.0, by_embedding, by_token))


def _words(tokenizer: Any, text: str) -> set[int]:
    return set(tokenizer(text, add_special_tokens=False)["input_ids"])
