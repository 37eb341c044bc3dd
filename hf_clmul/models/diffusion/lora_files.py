"""One adapter of a denoiser as the file that diffusers' own `load_lora_weights` reads, at the right strength. It knows PEFT's
names and the file's; nothing of training.

Two things go wrong in silence elsewhere: PEFT's own format loads nothing, so that the pipeline stays the original, and a file
without metadata loads with alpha = rank.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers.utils import logging
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.models.diffusion.architectures import architecture_of, named
from hf_clmul.paths import atomic_write

FILE = "pytorch_lora_weights.safetensors"
ALWAYS = ("r", "lora_alpha", "target_modules")
NEVER = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
         "init_lora_weights")  # fmt: skip
"""Of the configuration, what says nothing of the weights, or names a place on this machine."""
_INSIDE = "base_model.model."


def save_lora(pipeline_class: type, folder: str | Path, model: PeftModel, adapter_name: str) -> Path:
    """Writes one adapter as `pytorch_lora_weights.safetensors` with its alphas and ranks, whole or not at all. Equal adapters
    give equal bytes.

    Raises RecipeError for a pipeline class that loads no LoRA files, RunError for an adapter that such a file cannot hold or
    a folder that cannot be written.
    """
    architecture = named(pipeline_class.__name__)
    if not hasattr(pipeline_class, "save_lora_weights"):
        raise RecipeError(
            f"adapter: a {architecture.name} loads no LoRA files. Train without an adapter, or export it merged: "
            "`export: {merge: true}`."
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if odd := sorted(key for key in state if ".lora_" not in key or not key.startswith(_INSIDE)):
        raise RunError(
            f"adapter {adapter_name!r} holds more than LoRA matrices ({len(odd)} tensors, such as {odd[0]}), which "
            f"{FILE} cannot hold. Use neither bias nor modules_to_save."
        )
    layers = {key.removeprefix(_INSIDE): value.detach().cpu().contiguous() for key, value in state.items()}
    target = Path(folder) / FILE
    with TemporaryDirectory() as aside:
        pipeline_class.save_lora_weights(
            aside,
            **{
                f"{architecture.component}_lora_layers": layers,
                f"{architecture.component}_lora_adapter_metadata": metadata(model.peft_config[adapter_name]),
            },
        )
        atomic_write(target, _in_order((Path(aside) / FILE).read_bytes()))
    return target


def metadata(config: LoraConfig) -> dict[str, Any]:
    """What a reader needs of the configuration to act as it does: what differs from the defaults. The rest would only keep
    other versions of PEFT, which do not know every field, from reading it."""
    usual, found = LoraConfig().to_dict(), config.to_dict()
    kept = {k: v for k, v in found.items() if k in ALWAYS or (k not in NEVER and v != usual[k])}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in kept.items()}


def load_lora(pipeline: Any, folder: str | Path) -> None:
    """Loads a LoRA file into a fresh pipeline as its users will. Raises RunError if it holds nothing that the pipeline takes."""
    model: nn.Module = getattr(pipeline, architecture_of(pipeline).component)
    before = set(_adapters(model))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every component that a file has nothing for
    try:
        pipeline.load_lora_weights(str(folder), weight_name=FILE)
    finally:
        logging.set_verbosity(verbosity)
    if set(_adapters(model)) == before:
        raise RunError(
            f"{Path(folder) / FILE}: the pipeline took nothing from it and is still the original model. It is not in the "
            "format of diffusers; write it with save_lora."
        )


def check_precision(model: nn.Module) -> None:
    """Refuses to train half-precision weights: their gradients underflow, and the loss scaler cannot unscale them.

    Raises RecipeError that names the first of them.
    """
    found = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if found:
        raise RecipeError(
            f"{len(found)} weights that are to be trained are float16, such as {found[0]}. Train them in float32 "
            "(`model: {dtype: float32}`, or cast the adapter to float32) with `training: {bf16: true}` for speed."
        )


def _adapters(model: nn.Module) -> list[str]:
    return list(getattr(model, "peft_config", {}))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: it is written in another order in every process."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + content[8 + size :]
