"""What some terms need beside a batch of examples, with its settings: parameters of the term that no loss sees. No torch, no
model."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt

NEGATED = "to negate an adapter's factors is not to negate their product"
"""Why an edit that subtracts weights is refused with an adapter."""
NO_BASE = "`weights: base` asks the model below its adapter, and this one has none: pass `peft_config`, or take `weights: uniform`."
WITHOUT_A_MODEL = {"causal_lm": "uniform", "diffusion": "zero"}
"""The `weights` of a teacher that knows nothing and is no model."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """`alternatives`: other answers to each example, written by the model itself.

    5 is the number of AltPO (arXiv 2409.13474), whose grid for beta is 0.05, 0.1 and 0.5.
    """

    alternatives: Annotated[int, Ge(1)] = 5


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """`novice`, `expert`: texts that stand before the prompt when the teacher is asked once more.

    ELM (arXiv 2410.02760) names the concept to be erased in them; these name none, as the prompt does that.
    """

    novice: str = "What follows was written by somebody who has never heard of this subject:\n\n"
    expert: str = "What follows was written by somebody who knows everything about this subject:\n\n"


@dataclass(frozen=True, kw_only=True)
class Incompetent:
    """`weights` of the teacher that knows nothing: `random`, a whole model of the same architecture, frozen; `uniform`, every
    token equally likely, without a model; or `base`, the model with its adapters switched off, as it was before it learned anything
    in one.

    Random weights are the papers' (arXiv 2205.08096, 2408.11374), and what they say hardly depends on the input. The base is ours:
    it speaks as a model does that never met the data, if it did not.
    """

    weights: Literal["random", "uniform", "base"] = "random"


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """`anchor`: what takes the concept's place: a prompt, or words of the prompts to replace, {seven: eight}; left out, the
    data's column `anchor`."""

    anchor: str | dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Apartness:
    """`alpha`: the power of 1 less a prompt's likeness to the concept by which it counts; at 0 all count alike.

    1 is the acceptance probability in the code of SPM (arXiv 2312.16145).
    """

    alpha: Annotated[float, Ge(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class KeyValues:
    """What an edit of keys and values reads. `anchor`: what takes the concept's place: a prompt, the empty one by
    default; words of the prompts to replace, {seven: eight}; or null, the data's column `anchor`. `preserve`: prompts
    that stay as they are, beside the empty one, which always does; left out, the captions of the data to retain and of
    the memory. `tokens`: `all` tokens of a prompt, padding too, or its `last` word's last.

    UCE (arXiv 2308.14761) takes the last token, and is given names of concepts. Captions need not end with the concept,
    and a text encoder that reads from left to right repeats it in every later token, padding included: hence `all`.
    """

    anchor: str | dict[str, str] | None = ""
    preserve: list[str] | None = None
    tokens: Literal["all", "last"] = "all"


@dataclass(frozen=True, kw_only=True)
class Words:
    """`words` that name the concept in its captions, such as [seven]: their tokens are those that get no attention.
    Every caption to be forgotten has one of them at least."""

    words: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """`sampled`: train on so many noisy samples of each prompt to be forgotten that the model made itself, instead of
    on images, which the data need not have then. They are sampled before training, with this `guidance`, and left at a
    random one of `sampling_steps`.

    Defaults of the authors' code of ESD (arXiv 2303.07345) for Stable Diffusion 1.4, which makes a new one for each of
    its 200 steps; for SDXL its guidance is 2.
    """

    sampled: Annotated[int, Ge(1)] | None = None
    guidance: Annotated[float, Ge(0)] = 3.0
    sampling_steps: Annotated[int, Ge(2)] = 50


@dataclass(frozen=True, kw_only=True)
class IncompetentDenoiser:
    """`weights` of the denoiser that knows nothing: `random`, a whole network of the same architecture, frozen; or `zero`, which
    predicts zero, without a network.

    Random weights as of language models; zero is the cheap choice of ours.
    """

    weights: Literal["random", "zero"] = "random"


@dataclass(frozen=True, kw_only=True)
class Reinforced:
    """The model trained further on what is to be forgotten, with `nll`: for so many `epochs` at a constant `learning_rate`.

    Defaults of Eldan and Russinovich (arXiv 2310.02238) for Llama-2-7B; a small adapter needs a much higher rate.
    """

    epochs: Annotated[int, Ge(1)] = 3
    learning_rate: Annotated[float, Gt(0)] = 3e-6


@dataclass(frozen=True, kw_only=True)
class FineTuned(Reinforced):
    """The same, with the defaults of the code of MUSE (arXiv 2407.06460) for task vectors."""

    epochs: Annotated[int, Ge(1)] = 5
    learning_rate: Annotated[float, Gt(0)] = 1e-5
