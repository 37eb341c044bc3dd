"""From encoded images to one micro-batch of noisy samples, {role: model inputs}. What is drawn for a sample is a pure function of
its own seed: it depends on no neighbour, rank or accumulation. It knows a noising; no model, no term."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_clmul.objectives import FORGET, ROLES

NOISE_SEED = "noise_seed"
Conditioning = Mapping[str, Tensor]


class Noising(Protocol):
    """How a clean latent becomes a noisy one, and what the network should say of it."""

    def times(self, u: Tensor) -> Tensor: ...

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    def weights(self, times: Tensor) -> Tensor: ...


@dataclass
class NoisyCollator:
    """Collates [{role: encoded image}] into {role: batch}; a plain list of encoded images into one batch.

    A batch has `noisy` and `target` [B, C, h, w], `times` and `weights` [B], `conditioning` {name: [B, ...]}, the same
    of other prompts under `contexts` ("empty", and "anchor" where the examples have one), and `lengths`, 1 for each
    sample. Of roles that are not to be forgotten, a share `prompt_drop` of the samples is shown without its prompt.
    Where examples have a `partner`, the batch has the same four of these under that name, with noise of their own at
    the same times; where they have `concept_tokens`, these [B, T], and `apartness` [B].
    """

    noising: Noising
    empty: Conditioning
    prompt_drop: float = 0.0

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        roles = [role for role in examples[0] if role in ROLES]
        if not roles:
            return self.collate(examples)
        return {role: self.collate([e[role] for e in examples], self.prompt_drop * (role != FORGET)) for role in roles}

    def collate(self, examples: Sequence[dict[str, Any]], drop: float = 0.0) -> dict[str, Any]:
        drawn = [_draw(example) for example in examples]
        if "noisy" in examples[0]:
            noised = self._given(examples)
        else:
            noised = self._noised(drawn, self.noising.times(torch.stack([d["u"] for d in drawn])))
        shown = [self.empty if d["coin"] < drop else e["conditioning"] for d, e in zip(drawn, examples, strict=True)]
        contexts = {"empty": _stacked([self.empty] * len(examples))}
        if "anchor" in examples[0]:
            contexts["anchor"] = _stacked([e["anchor"] for e in examples])
        batch = {
            **noised, "conditioning": _stacked(shown), "contexts": contexts,
            "lengths": [1] * len(examples), "alternatives": 0,
        }  # fmt: skip
        if "partner" in examples[0]:
            batch["partner"] = self._noised([_draw(e["partner"]) for e in examples], noised["times"])
        if "concept_tokens" in examples[0]:
            batch["concept_tokens"] = torch.stack([e["concept_tokens"] for e in examples])
        if "apartness" in examples[0]:
            batch["apartness"] = torch.stack([e["apartness"] for e in examples])
        return batch

    def _given(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Of noisy samples, which no image belongs to, so that there is no target."""
        noisy, times = (torch.stack([e[name] for e in examples]) for name in ("noisy", "time"))
        target = torch.full_like(noisy, float("nan"))
        return {"noisy": noisy, "target": target, "times": times, "weights": self.noising.weights(times)}

    def _noised(self, drawn: Sequence[Mapping[str, Tensor]], times: Tensor) -> dict[str, Tensor]:
        clean, noise = (torch.stack([d[name] for d in drawn]) for name in ("clean", "noise"))
        return {
            "noisy": self.noising.add_noise(clean, noise, times), "target": self.noising.target(clean, noise, times),
            "times": times, "weights": self.noising.weights(times),
        }  # fmt: skip


def _draw(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """A latent (of a VAE's distribution), noise, and two numbers in [0, 1): for the time and for dropping the prompt."""
    generator = torch.Generator().manual_seed(example[NOISE_SEED])
    u, coin = torch.rand(2, generator=generator).unbind()
    mean = example["noisy"] if "noisy" in example else example["mean"]
    noise, spread = (torch.randn(mean.shape, generator=generator) for _ in range(2))
    return {"u": u, "coin": coin, "noise": noise, "clean": mean + example.get("std", 0.0) * spread}


def _stacked(several: Sequence[Conditioning]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name] for one in several]) for name in several[0]}
