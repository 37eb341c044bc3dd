"""The attack by rounding: weights are stored in fewer bits, which may undo small changes that unlearning made. The rounding is a
pure function of a weight; where there is a GPU with bitsandbytes, its own is tried beside it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Len

from hf_clmul.evaluation.audit.protocol import BEFORE, Absent, AuditData, Point, Subject

if TYPE_CHECKING:
    from torch import Tensor, nn

Scheme = Literal["int8", "int4", "nf4"]
BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of 4-bit NormalFloat (QLoRA, arXiv 2305.14314, appendix E): quantiles of a normal distribution, scaled to
[-1, 1], with an exact zero."""
INTEGERS = {"int8": 127, "int4": 7}
BNB_LABELS = {"int8": "int8 (bitsandbytes)", "nf4": "nf4 (bitsandbytes)"}


def quantize(
    subject: Subject, data: AuditData, seed: int, *,
    schemes: Annotated[list[Scheme], Len(1)] = ("int8", "int4", "nf4"), block: Annotated[int, Ge(2)] = BLOCK,
) -> Iterator[Point]:  # fmt: skip
    """Rounds the weights of all linear layers but the output layer, and measures; each scheme from the original weights.

    Per block of `block` weights of one output, a = max |w|, and w becomes a * L(w / a): the nearest of -127/127, ..., 127/127
    (int8), of -7/7, ..., 7/7 (int4) or of NF4's 16 levels. 4-bit rounding raised what models still knew from 21 % to 83 % on
    average (Zhang et al., arXiv 2410.16454); blocks of 64 and NF4 are QLoRA's (arXiv 2305.14314). The output layer keeps
    its weights, as in bitsandbytes; with a GPU and bitsandbytes, its LLM.int8 and NF4 are measured too, by their own names.
    """
    if not hasattr(subject.model, "named_modules"):
        raise Absent("the model has no modules whose weights could be rounded")
    layers = linear_layers(subject.model)
    if not layers:
        raise Absent("the model has no linear layers")
    yield from roundings(subject, layers, schemes, block)
    yield from _with_bitsandbytes(subject, [scheme for scheme in schemes if scheme in BNB_LABELS])


def roundings(
    subject: Subject, layers: "Mapping[str, nn.Module]", schemes: Sequence[Scheme], block: int
) -> Iterator[Point]:
    """The subject before, and with these layers' weights rounded, each scheme from the original ones, which it has again at
    the end."""
    import torch

    yield subject.measure(BEFORE)
    kept = {name: module.weight.detach().to("cpu", copy=True) for name, module in layers.items()}
    for scheme in schemes:
        with torch.no_grad():
            for name, module in layers.items():
                weight = _by_output(module, kept[name].to(module.weight.device))
                module.weight.copy_(_by_output(module, rounded(weight, scheme, block)))
        yield subject.measure(scheme)
    with torch.no_grad():
        for name, module in layers.items():
            module.weight.copy_(kept[name])


def rounded(weight: "Tensor", scheme: Scheme, block: int = BLOCK) -> "Tensor":
    """A weight [out, in], or [out, in, h, w] of a convolution, after it was stored in fewer bits and read back, in its own type.
    Blocks lie along all that goes into one output; the last one may be shorter. A block of zeros stays as it is."""
    import torch

    flat = weight.float().flatten(1)
    rows, width = flat.shape
    padded = torch.nn.functional.pad(flat, (0, -width % block)).reshape(rows, -1, block)
    largest = padded.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, padded / largest, 0.0)
    if scheme in INTEGERS:
        steps = INTEGERS[scheme]
        nearest = torch.round(unit * steps) / steps
    else:
        levels = torch.tensor(NF4, device=weight.device)
        between = (levels[1:] + levels[:-1]) / 2
        nearest = levels[torch.bucketize(unit, between)]
    return (nearest * largest).reshape(rows, -1)[:, :width].reshape(weight.shape).to(weight.dtype)


def _by_output(module: "nn.Module", weight: "Tensor") -> "Tensor":
    """The layer's weight with its outputs first, or back again: GPT-2 has it as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return weight.T if isinstance(module, Conv1D) else weight


def linear_layers(model: "nn.Module") -> "dict[str, nn.Module]":
    """The linear layers by name, without the output layer and without the factors of adapters."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output and "lora_" not in name
    }


def _with_bitsandbytes(subject: Subject, schemes: list[str]) -> Iterator[Point]:
    """The model as bitsandbytes loads it, if it is here with a GPU."""
    import torch

    if not torch.cuda.is_available() or find_spec("bitsandbytes") is None or _wrapped(subject.model):
        return
    from transformers import BitsAndBytesConfig

    device = next(subject.model.parameters()).device
    how = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    }
    with TemporaryDirectory() as folder:
        subject.model.save_pretrained(folder)
        for scheme in schemes:
            model = type(subject.model).from_pretrained(
                folder, quantization_config=how[scheme], device_map={"": device}, dtype=torch.bfloat16
            )
            yield replace(subject, model=model.eval()).measure(BNB_LABELS[scheme])


def _wrapped(model: Any) -> bool:
    """Whether it is no plain model of transformers, such as one with an adapter apart, which would be saved alone."""
    from peft import PeftModel

    return isinstance(model, PeftModel)
