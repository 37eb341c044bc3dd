"""The causal language model family: the only place that knows how such a model is called. It predicts what the active
terms asked for and generates text; it knows no term, role or request."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LogitsProcessor, LogitsProcessorList

from hf_clmul.errors import RunError
from hf_clmul.models import hidden
from hf_clmul.objectives.prediction import Prediction

INPUTS = ("input_ids", "attention_mask", "position_ids")


def accepted_inputs(model: nn.Module) -> frozenset[str]:
    """Names that the model's own forward takes, below any PEFT or DDP wrapper; `attention_mask` is always among them.

    Raises RunError for a model that cannot be told which tokens are padding.
    """
    from peft import PeftModel

    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = inspect.signature(inner.forward).parameters
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "attention_mask" not in parameters and not hands_on:
        raise RunError(
            f"{type(inner).__name__}.forward takes no attention_mask, so that padding would be read as text. "
            "Use a model whose forward takes one."
        )
    return frozenset(parameters) | {"attention_mask"}


def predict(
    model: nn.Module,
    batch: Mapping[str, Any],
    needs: frozenset[str],
    accepted: frozenset[str],
    layers: Collection[float] = (),
) -> Prediction:
    """One forward pass: at supervised positions, in float32, what is asked for of log-probabilities [N], logits [N, V],
    targets [N] and the hidden states [N, H] of `layers` (numbers, or fractions of the depth).

    `model` may be wrapped (DDP); `accepted` comes from `accepted_inputs` of the bare model. Logits are computed from the
    first supervised column on, never for the prompts before it, where the model's forward allows that. Where only hidden
    states are asked for, layers above them are not computed. "contexts" asks for logits in the batch's further contexts
    too, one pass for each.
    """
    if "contexts" in needs:
        own = predict(model, batch, needs - {"contexts"}, accepted, layers)
        asked = {name: predict(model, b, frozenset({"logits"}), accepted) for name, b in batch["contexts"].items()}
        return replace(own, variants=asked)
    inputs = {name: batch[name] for name in INPUTS if name in accepted}
    keep = batch["keep"]
    if "logits_to_keep" in accepted:
        inputs["logits_to_keep"] = keep
    torch.clear_autocast_cache()  # its copies of weights may be older than the weights
    forward = partial(model, **inputs, use_cache=False)
    logits = states = None
    if not layers:
        logits = _supervised(forward().logits, batch)
    else:
        read = bool(needs & {"logps", "logits"})
        stop, instead = (not read and question(model) for question in (hidden.can_stop, hidden.finds_unused))
        output, found = hidden.recorded(model, layers, forward, stop, instead)
        states = {layer: _supervised(state, batch) for layer, state in found.items()}
        if output is not None:
            logits = _supervised(output.logits, batch)
            if not read and hidden.several_ranks():
                # Ranks wait for a gradient, be it zero, of all that the output depends on; weight decay takes it for one.
                states = {layer: state + 0.0 * logits.sum() for layer, state in states.items()}
    rows, targets, pairs = batch["rows"], batch["targets"], batch["alternatives"]
    if not pairs:
        own = _prediction(logits, targets, rows, batch["input_ids"].shape[0], needs, states)
        return replace(own, classes=batch.get("classes"))
    first, second = rows < pairs, rows >= pairs
    alternative = _prediction(_chosen(logits, second), targets[second], rows[second] - pairs, pairs, needs)
    states = None if states is None else {layer: state[first] for layer, state in states.items()}
    own = _prediction(_chosen(logits, first), targets[first], rows[first], pairs, needs, states)
    return replace(own, alternative=alternative, classes=batch.get("classes"))


def _supervised(columns: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """What stands at supervised positions, [N, ...] in float32, from [B, T, ...] or its last columns."""
    kept = columns[:, -batch["keep"] :]
    return kept.float().reshape(-1, kept.shape[-1])[batch["positions"]]


def _chosen(values: Tensor | None, which: Tensor) -> Tensor | None:
    return None if values is None else values[which]


def _prediction(
    logits: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    batch_size: int,
    needs: frozenset[str],
    states: dict[float, Tensor] | None = None,
) -> Prediction:
    logps = -F.cross_entropy(logits, targets, reduction="none") if "logps" in needs else None
    return Prediction(
        rows,
        batch_size,
        logps,
        logits if "logits" in needs else None,
        targets=targets if "targets" in needs else None,
        hidden=states,
    )


@torch.no_grad()
def score(
    model: nn.Module, batch: Mapping[str, Any], accepted: frozenset[str], whole: Collection[int] | None = None
) -> list[dict[str, list]]:
    """Per sequence, at its supervised tokens: `logps`, nats; `predicted`, the most likely token; `hits`, whether that was
    right; and of the sequences `whole` (all, if None) `token_means` and `token_deviations` of log p over the vocabulary
    under p itself, nats."""
    prediction = predict(model, batch, frozenset({"logps", "logits"}), accepted)
    logits, rows = prediction.logits, prediction.rows
    predicted = logits.argmax(-1)
    found = {"logps": prediction.logps, "hits": predicted == batch["targets"], "predicted": predicted}
    scored: list[dict[str, list]] = [{name: [] for name in found} for _ in range(prediction.batch_size)]
    which = rows.tolist()
    for name, values in found.items():
        for row, value in zip(which, values.tolist(), strict=True):
            scored[row][name].append(value)
    for row in range(prediction.batch_size) if whole is None else whole:
        means, deviations = _moments(logits[rows == row])
        scored[row] |= {"token_means": means.tolist(), "token_deviations": deviations.tolist()}
    return scored


def _moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [N] of log p under p, from logits [N, V]. What is impossible counts for nothing."""
    logps = logits.log_softmax(-1)
    p = logps.exp()
    logps = logps.masked_fill(p == 0, 0.0)  # 0 log 0 is 0
    means = (p * logps).sum(-1)
    return means, (p * (logps - means[:, None]).square()).sum(-1).sqrt()


class Sampled(LogitsProcessor):
    """Makes greedy decoding draw from the distribution at temperature 1: the largest of logits plus Gumbel noise is such a
    draw. Each row has a generator of its own, so that what it draws depends neither on its neighbours nor on the device."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        noise = torch.stack([torch.empty(width).exponential_(generator=g) for g in self.generators])
        return scores.float() - noise.log().to(scores.device)


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
) -> list[str]:
    """Continuations of the prompts (token ids), without special tokens: greedy, or with `seeds`, one for each prompt, sampled
    at temperature 1."""
    found = continuations(model, tokenizer, prompts, max_new_tokens, seeds)
    return [text.strip() for text in tokenizer.batch_decode(found, skip_special_tokens=True)]


@torch.no_grad()
def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """As `generate`, the new token ids; what ended early is padded to the longest."""
    from hf_clmul.data.collation import pad_left

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    batch = pad_left([{"input_ids": ids, "labels": ids} for ids in prompts], pad)
    device = next(model.parameters()).device
    output = model.generate(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
        do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # whatever the model's own settings say
        max_new_tokens=max_new_tokens, pad_token_id=pad, temperature=None, top_p=None, top_k=None, use_cache=True,
        logits_processor=LogitsProcessorList([] if seeds is None else [Sampled(seeds)]),
    )  # fmt: skip
    return output[:, batch["input_ids"].shape[1] :].tolist()


_MORE = ("min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias",
         "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "force_words_ids",
         "constraints", "watermarking_config", "guidance_scale", "encoder_repetition_penalty",
         "encoder_no_repeat_ngram_size", "stop_strings")  # fmt: skip
"""Settings with which the next greedy token is more than the most likely one."""


def ends_of_greedy(model: nn.Module) -> frozenset[int] | None:
    """The tokens at which `generate` ends; None where a teacher-forced pass may not stand in for its first steps: where the
    weights are no float32, so that rounding decides, or the model's own settings choose other than the most likely token."""
    settings = model.generation_config
    given = settings.to_dict()
    if any(given.get(name) not in (None, 0, 1.0) for name in _MORE):
        return None
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        return None
    ends = settings.eos_token_id
    return frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
