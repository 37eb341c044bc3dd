"""Looking inside: from which layer on a model knows the answer (logit lens), and how deep the knowledge is erased (activation
patching). Nothing is changed. It knows hidden states and scores; the mathematics of erasure are pure functions."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt

from hf_clmul.errors import reason
from hf_clmul.evaluation.audit.protocol import Absent, AuditData, Example, Point, Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

Count = Annotated[int, Ge(1)]
THRESHOLD = 0.05
"""Nats per token: a layer through which the retrained model loses less holds no knowledge to erase (arXiv 2605.24614)."""
DROP, DEPTH = "patched_drop", "unlearning_depth"


def logit_lens(
    subject: Subject, data: AuditData, seed: int, *, layers: Count = 12, batch_size: Count = 8
) -> Iterator[Point]:
    """What the model would say if it ended behind a layer: that layer's hidden states are put through the model's own final norm
    and head (logit lens, nostalgebraist 2020). A point for each of `layers` layers, evenly spaced (12: ours), x the number of
    layers passed; the last point is the whole model. Values of each example, of its answer, teacher-forced:

        lens_probability      per token (a geometric mean), the end of sequence with it
        lens_hits             share of tokens, without the end of sequence, that are the most likely one
        lens_reciprocal_rank  mean over the same tokens of 1 / rank; 1 where each is the most likely one
    """
    from hf_clmul.models import hidden

    batches = _batches(subject, data.forget, batch_size)
    depth = len(hidden.blocks(subject.model))
    for layer in chosen_layers(depth, layers):
        values = _lens(subject.model, batches, layer, len(data.forget))
        yield Point(f"layer {layer + 1} of {depth}", values, float(layer + 1))


def patching(
    subject: Subject, data: AuditData, seed: int, *,
    before: str | None = None, layers: Count | None = None, batch_size: Count = 8,
) -> Iterator[Point]:  # fmt: skip
    """The model before unlearning answers, but its hidden states behind one layer, where the answer's tokens are predicted, are
    replaced by the subject's. What the subject still holds there, the layers above can read; what it lost is missing.

    A point for each layer (`layers`: so many, evenly spaced; by default all), x the number of layers passed, with
    `patched_drop`: the log-probability of the answer that this costs, nats per token. Beside the drops of the retrained
    model these give the depth of unlearning: `unlearning_depth`.

    Unlearning depth score (Lee, Kim and Jo, arXiv 2605.24614), over the whole answer where the paper marks the words that
    tell the fact. `before`: the folder of the model before unlearning, of the same architecture and tokenizer.
    """
    if before is None:
        raise Absent("it needs the model before unlearning: give its folder as the option `before` of `patching`.")
    full = _loaded(before, subject)
    for layer, depth, drops in patched_drops(full, subject, data.forget, layers, batch_size):
        yield Point(f"layer {layer + 1} of {depth}", {DROP: drops}, float(layer + 1))


def patched_drops(
    full: Any, subject: Subject, examples: Sequence[Example], layers: int | None = None, batch_size: int = 8
) -> Iterator[tuple[int, int, list[float]]]:
    """(layer from 0, number of layers, drop of each example in nats per token) for the chosen layers of `full`, which gets the
    hidden states of the subject's model: log p of the answer without them, minus with them."""
    from hf_clmul.models import hidden

    batches = _batches(subject, examples, batch_size)
    plain = _mean_logps(full, batches, len(examples))
    depth = len(hidden.blocks(full))
    for layer in chosen_layers(depth, depth if layers is None else layers):
        found = [0.0] * len(examples)
        for some, batch in batches:
            states = _states(subject.model, batch, layer)
            with _patched(full, layer, states, _predicting(batch)):
                for i, logp in zip(some, _mean_logps_of(full, batch), strict=True):
                    found[i] = plain[i] - logp
        yield layer, depth, found


def chosen_layers(depth: int, count: int) -> list[int]:
    """At most `count` layers, from 0, evenly spaced, the last one always among them."""
    count = min(count, depth)
    return [(k + 1) * depth // count - 1 for k in range(count)]


def erasures(
    unlearned: Sequence[float], retrained: Sequence[float], threshold: Annotated[float, Gt(0)] = THRESHOLD
) -> list[float | None]:
    """Per layer, of one example: clip(drop with unlearned states / drop with retrained states, 0, 1), from drops [L] in nats
    per token. 0: all is still there; 1: as little is left as in a model that never learned it. None for a layer whose
    drop with retrained states is at most `threshold`: nothing of the answer lies there."""
    return [min(max(u / r, 0.0), 1.0) if r > threshold else None for u, r in zip(unlearned, retrained, strict=True)]


def depth_score(unlearned: Sequence[float], retrained: Sequence[float], threshold: float = THRESHOLD) -> float | None:
    """Mean of the `erasures` of one example, each layer weighted by its drop with retrained states (arXiv 2605.24614); None
    where no layer holds the answer, as where the retrained model knows it too."""
    pairs = [(r, e) for r, e in zip(retrained, erasures(unlearned, retrained, threshold), strict=True) if e is not None]
    return sum(r * e for r, e in pairs) / sum(r for r, _ in pairs) if pairs else None


def unlearning_depth(run: Sequence[Point], reference: Sequence[Point], threshold: float = THRESHOLD) -> Point:
    """One point with the `depth_score` of each example, from the points of `patching` on the run and on its reference.

    Raises ValueError if they are not of the same layers.
    """
    if not run or [point.x for point in run] != [point.x for point in reference]:
        raise ValueError("the depth of unlearning needs `patching` of the run and of its reference at the same layers")
    of_run, of_reference = (zip(*(point.values[DROP] for point in points), strict=True) for points in (run, reference))
    scores = [depth_score(u, r, threshold) for u, r in zip(of_run, of_reference, strict=True)]
    return Point("depth of unlearning", {DEPTH: scores})


Batch = tuple[list[int], Mapping[str, Any]]
"""Places of the examples, and the batch of them."""


def _batches(subject: Subject, examples: Sequence[Example], size: int) -> list[Batch]:
    """On the model's device. Where an example is longer than the model's context, its end is cut off."""
    from accelerate.utils import send_to_device

    from hf_clmul.data.collation import RoleCollator
    from hf_clmul.data.encoding import encode, example_format
    from hf_clmul.evaluation.audit.probes import context_length, turn

    tokenizer, most = subject.tokenizer, context_length(subject.model)
    turns = [example if example_format(example) == ("text",) else turn(example) for example in examples]
    encoded = [encode(example, tokenizer, most) for example in turns]
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]["input_ids"]))  # little padding
    collator = RoleCollator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    device = next(subject.model.parameters()).device
    places = [order[start : start + size] for start in range(0, len(order), size)]
    return [(some, send_to_device(collator([encoded[i] for i in some]), device)) for some in places]


def _lens(model: "nn.Module", batches: Sequence[Batch], layer: int, count: int) -> dict[str, list[float | None]]:
    import torch

    from hf_clmul.evaluation.metrics import answer_probability, exact_memorization, mean_of
    from hf_clmul.models import causal_lm

    needs, accepted = frozenset({"logps", "logits"}), causal_lm.accepted_inputs(model)
    names = ("lens_probability", "lens_hits", "lens_reciprocal_rank")
    values: dict[str, list[float | None]] = {name: [None] * count for name in names}
    for some, batch in batches:
        with torch.no_grad(), _ending_behind(model, layer):
            found = causal_lm.predict(model, batch, needs, accepted)
        own = found.logits.gather(1, batch["targets"][:, None])
        ranks = (found.logits > own).sum(-1) + 1
        hits = found.logits.argmax(-1) == batch["targets"]
        for place, i in enumerate(some):
            at = found.rows == place
            row = {"logps": found.logps[at].tolist(), "hits": hits[at].tolist()}
            values["lens_probability"][i] = answer_probability(row)
            values["lens_hits"][i] = exact_memorization(row)
            values["lens_reciprocal_rank"][i] = mean_of((1 / ranks[at][:-1]).tolist())
    return values


@contextmanager
def _ending_behind(model: "nn.Module", layer: int) -> Iterator[None]:
    """The last layer puts out what layer `layer` did, so that the model's own norm, head and whatever else it does to logits
    are applied to it."""
    from hf_clmul.models.hidden import blocks

    modules, kept = blocks(model), {}

    def keep(module: Any, inputs: Any, output: Any) -> None:
        kept["state"] = _state(output)

    handles = [modules[layer].register_forward_hook(keep)]
    handles.append(modules[-1].register_forward_hook(lambda module, inputs, output: _with_state(output, kept["state"])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _patched(model: "nn.Module", layer: int, states: "Tensor", where: "Tensor") -> Iterator[None]:
    """Behind `layer`, the hidden states [B, T, H] are replaced by `states` where `where` [B, T] says so."""
    from hf_clmul.models.hidden import blocks

    def patch(module: Any, inputs: Any, output: Any) -> Any:
        own = _state(output)
        return _with_state(output, own.where(~where[..., None], states.to(own.dtype)))

    handle = blocks(model)[layer].register_forward_hook(patch)
    try:
        yield
    finally:
        handle.remove()


def _state(output: Any) -> "Tensor":
    return output[0] if isinstance(output, tuple) else output


def _with_state(output: Any, state: "Tensor") -> Any:
    return (state, *output[1:]) if isinstance(output, tuple) else state


def _states(model: "nn.Module", batch: Mapping[str, Any], layer: int) -> "Tensor":
    """Hidden states [B, T, H] of a model behind a layer, of each token of the batch."""
    import torch

    from hf_clmul.models import causal_lm, hidden

    inputs = {name: batch[name] for name in causal_lm.INPUTS if name in causal_lm.accepted_inputs(model)}
    with torch.no_grad():
        found = hidden.recorded(model, [layer], lambda: model(**inputs, use_cache=False), stop=hidden.can_stop(model))
    return found[1][layer]


def _predicting(batch: Mapping[str, Any]) -> "Tensor":
    """[B, T]: the columns from which a token of the answer is predicted."""
    import torch

    from hf_clmul.data.encoding import IGNORED

    return torch.nn.functional.pad(batch["labels"][:, 1:] != IGNORED, (0, 1), value=False)


def _mean_logps(model: "nn.Module", batches: Sequence[Batch], count: int) -> list[float]:
    found = [0.0] * count
    for some, batch in batches:
        for i, logp in zip(some, _mean_logps_of(model, batch), strict=True):
            found[i] = logp
    return found


def _mean_logps_of(model: "nn.Module", batch: Mapping[str, Any]) -> list[float]:
    """Mean log-probability of each answer's tokens, nats."""
    import torch

    from hf_clmul.models import causal_lm

    with torch.no_grad():
        found = causal_lm.predict(model, batch, frozenset({"logps"}), causal_lm.accepted_inputs(model))
    return (found.sequence_logps() / found.sequence_lengths()).tolist()


def _loaded(folder: str, subject: Subject) -> Any:
    """The model before unlearning, beside the subject's. Raises Absent if it is not there, or of another kind."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_clmul.models.hidden import blocks

    like = next(subject.model.parameters())
    try:
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=like.dtype).eval().to(like.device)
        vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise Absent(f"the model before unlearning, {folder!r}, could not be loaded: {reason(error)}") from error
    ours, theirs = (
        (len(blocks(m)), m.config.get_text_config().hidden_size, m.config.model_type) for m in (subject.model, full)
    )
    if ours != theirs or vocabulary != subject.tokenizer.get_vocab():
        kind = "{0[0]} layers of width {0[1]} ({0[2]})"
        raise Absent(
            f"the model before unlearning, {folder!r}, has {kind.format(theirs)}, and the subject {kind.format(ours)}; "
            "states can be patched only between models of one architecture and one vocabulary."
        )
    return full
