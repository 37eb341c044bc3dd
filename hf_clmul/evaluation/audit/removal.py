"""Attacks that take something out of a model: the adapter that hides, or one direction of the residual stream. They know modules
and weights; nothing of how a model was unlearned."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Lt

from hf_clmul.evaluation.audit.protocol import BEFORE, Absent, AuditData, Example, Point, Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

WRITERS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense", "dense_4h_to_h", "wo", "w2")
"""Last names of the modules of a layer that write to the residual stream, in the models of transformers."""


def remove_adapter(subject: Subject, data: AuditData, seed: int) -> Iterator[Point]:
    """Switches the adapter off, as anyone can who has the folder. What answers then is the base model.

    Only a filter has one: of other runs the change stands in the weights that are deployed, or is a task's own.
    """
    from peft import PeftModel

    if not isinstance(subject.model, PeftModel):
        raise Absent(
            "the model has no adapter that unlearned and could be switched off: the run is no filter, or its adapter was merged"
        )
    yield subject.measure(BEFORE)
    with subject.model.disable_adapter():
        yield subject.measure("adapter off")


def remove_direction(
    subject: Subject, data: AuditData, seed: int, *, depth: Annotated[float, Ge(0), Lt(1)] = 0.5,
    examples: Annotated[int, Ge(1)] = 128,
) -> Iterator[Point]:  # fmt: skip
    """Takes one direction out of all that is written to the residual stream, and measures.

    r = mean over forgotten prompts - mean over retained ones of the state behind the layer at `depth` (a fraction of all
    layers), at the prompt's last token; u = r / |r|. Every matrix W that writes to the stream becomes W - u u^T W, its bias
    b - u (u . b), the embeddings likewise (Arditi et al., arXiv 2406.11717, difference of means, weight
    orthogonalization). A model that recognises what it should not say by one direction says it again then. They choose layer and
    position by a search; the middle of the model is our default. `examples` caps each side; 128 are theirs. The prompt of
    a conversation is all before its last answer.
    """
    import torch
    from peft import PeftModel

    from hf_clmul.data.encoding import example_format
    from hf_clmul.evaluation.audit.probes import turn

    forget = [turn(example) for example in data.forget[:examples]]
    retain = [turn(example) for example in data.retain if example_format(example) != ("text",)][:examples]
    if not retain:
        raise Absent(
            "no examples are retained that have a prompt, and so there is nothing that forgotten prompts differ from"
        )
    if isinstance(subject.model, PeftModel):  # what an adapter writes lies along the direction too
        subject.model = subject.model.merge_and_unload()
    model = subject.model
    writers = _writers(model)
    if not writers:
        raise Absent(f"which modules of {type(model).__name__} write to the residual stream is not known")
    yield subject.measure(BEFORE)
    sides = [_states(subject, side, depth) for side in (forget, retain)]
    difference = sides[0].mean(0) - sides[1].mean(0)
    size = float(difference.norm())
    if not size > 0:
        raise Absent(
            "forgotten and retained prompts have the same mean state, so that there is no direction between them"
        )
    with torch.no_grad():
        _untie(model)
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(without(embeddings, difference, of_rows=True))
        for module, transposed in writers:
            module.weight.copy_(without(module.weight, difference, of_rows=transposed))
            if module.bias is not None:
                module.bias.copy_(without(module.bias, difference, of_rows=True))
    yield subject.measure("direction removed")


def without(weight: "Tensor", direction: "Tensor", of_rows: bool) -> "Tensor":
    """The weight without what lies along the direction [H]: of each row (`of_rows`: [..., H]), or of each column ([H, ...])."""
    unit = (direction / direction.norm()).to(weight.device)
    wide = weight.float()
    if of_rows:
        return (wide - (wide @ unit)[..., None] * unit).to(weight.dtype)
    return (wide - unit[:, None] * (unit @ wide)).to(weight.dtype)


def _states(subject: Subject, examples: Sequence[Example], depth: float) -> "Tensor":
    """The state at the last token of each prompt, [N, H] in float32."""
    import torch

    from hf_clmul.data.encoding import encode_prompt
    from hf_clmul.models.hidden import recorded

    model, found = subject.model, []
    device = next(model.parameters()).device
    for example in examples:
        ids = torch.tensor([encode_prompt(example, subject.tokenizer) or [_first(subject.tokenizer)]], device=device)
        with torch.no_grad():
            _, states = recorded(model, (depth,), lambda ids=ids: model(input_ids=ids, use_cache=False), stop=True)
        found.append(states[depth][0, -1].float())
    return torch.stack(found)


def _first(tokenizer: Any) -> int:
    """Where a text has no prompt, what it begins after."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def _writers(model: Any) -> "list[tuple[nn.Module, bool]]":
    """The modules that write to the residual stream, each with whether its weight is transposed, [in, H]."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from hf_clmul.models.hidden import blocks

    width = model.config.get_text_config().hidden_size
    found: list[tuple[nn.Module, bool]] = []
    for name, module in blocks(model).named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear | Conv1D) and last in WRITERS:
            transposed = isinstance(module, Conv1D)
            if module.weight.shape[1 if transposed else 0] == width:
                found.append((module, transposed))
    return found


def _untie(model: Any) -> None:
    """What reads the stream stays as it is, where it shares its weights with what writes to it."""
    from torch import nn

    output = model.get_output_embeddings()
    if output is not None and output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone())
