"""LoRA adapters by name: attach, copy, save, load. What is trained and what is saved is named here and never guessed from
whatever happens to be active. Knows PEFT; nothing of terms, requests or trainers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.hashes import tensors_sha256
from hf_clmul.paths import atomic_write
from hf_clmul.recipe.problems import suggestion

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Adapter

TASK = "task_"
"""Before the name of a task's adapter in memory: PEFT takes none that is called `train`, `type` or `values`."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEEPS_BASE = (True, False, "gaussian", "eva")
"""Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, ...) move part of them into the
adapter, so that switching it off is no longer the model before."""


def attach(model: PreTrainedModel | PeftModel, config: LoraConfig, name: str, seed: int) -> PeftModel:
    """Adds a new trainable adapter, active alone, with weights drawn from `seed` and the global generator untouched.

    Raises RunError for a configuration that alters the base or finds no module to act on.
    """
    refused = {
        "init_lora_weights": config.init_lora_weights not in KEEPS_BASE,
        "bias": config.bias != "none",
        "kasa_config": config.to_dict().get("kasa_config") is not None,
    }
    for option in (option for option, alters in refused.items() if alters):
        raise RunError(
            f"{option}={config.to_dict()[option]!r} alters the base weights, so an adapter switched off "
            "is no longer the model before the request. Use the default."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            if not isinstance(model, PeftModel):
                return get_peft_model(model, config, adapter_name=name)
            model.add_adapter(name, config)
        except ValueError as error:
            raise RunError(f"the adapter does not fit the model: {error}") from error
        model.set_adapter(name)
        return model


def attach_task(
    model: PreTrainedModel, chosen: "Adapter", task: str, seed: int, revision: str | None = None
) -> PeftModel:
    """Adds the adapter of a task, by the name that it has in every run. `revision` is the base's. Raises as `attach` and
    `lora_config`."""
    config = lora_config(model, chosen.r, chosen.alpha, chosen.dropout, chosen.target_modules, chosen.layers)
    config.revision = revision  # those who load the adapter need the same
    return attach(model, config, TASK + task, seed)


def stand_in(model: nn.Module, chosen: "Adapter", task: str) -> PeftModel:
    """A model without weights with this task's adapter and no other, to try settings on. Raises as `attach_task`."""
    if isinstance(model, PeftModel):
        if list(model.peft_config) == [TASK + task]:
            return model
        model = drop(model, list(model.peft_config))
    return attach_task(model, chosen, task, 0)


def lora_config(
    model: PreTrainedModel,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    layers: str | list[int],
) -> LoraConfig:
    """A LoraConfig from a recipe's words. `layers` is "all", "last-N" or a list of indices.

    Raises RecipeError for a layer or a module that the model does not have.
    """
    if isinstance(target_modules, list):
        _check_there(model, target_modules)
    text = isinstance(model.get_base_model() if isinstance(model, PeftModel) else model, PreTrainedModel)
    depth = model.config.num_hidden_layers if layers != "all" else 0
    if layers == "all":
        chosen = None
    elif isinstance(layers, str):
        chosen = list(range(max(0, depth - int(layers.removeprefix("last-"))), depth))
    else:
        chosen = sorted(layers)
        if chosen[-1] >= depth:  # PEFT would leave it out without a word
            raise RecipeError(
                f"adapter.layers: there is no layer {chosen[-1]}; the model has {depth}, from 0 to {depth - 1}."
            )
    if target_modules == "all-linear" and chosen is not None:  # PEFT takes a choice of layers with a list only
        target_modules = _linear(model)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        layers_to_transform=chosen,
        task_type="CAUSAL_LM" if text else None,
    )


def _check_there(model: nn.Module, wanted: Sequence[str]) -> None:
    """Of several names PEFT leaves out, without a word, those that no module has."""
    names = [name for name, _ in model.named_modules()]
    for one in wanted:
        if not any(name == one or name.endswith(f".{one}") for name in names):
            meant = suggestion(one, sorted({name.rpartition(".")[2] for name in names}))
            raise RecipeError(
                f"adapter.target_modules: no module of the model is called {one!r}{f'; {meant}' if meant else '.'} Take it out, or "
                "name another."
            )


def _linear(model: nn.Module) -> list[str]:
    """The names of linear modules but for the head. What older adapters wrapped counts by its own name, what they added does
    not."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    inside = tuple(f"{name}." for name in wrapped)
    plain = {name: m for name, m in model.named_modules() if name not in wrapped and not name.startswith(inside)}
    found = plain | {name: module.get_base_layer() for name, module in wrapped.items()}
    head = model.get_output_embeddings()
    return sorted(
        {n.rpartition(".")[2] for n, m in found.items() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    )


@torch.no_grad()
def is_identity(model: PeftModel, name: str) -> bool:
    """Whether the adapter changes nothing, as when it was just made: a LoRA whose B matrices (A of embeddings) are zero."""
    zeroed = [value for key, value in _state(model, name).items() if "lora_B" in key or "lora_embedding_A" in key]
    return bool(zeroed) and not any(value.any() for value in zeroed)


def trains_alone(model: PeftModel, name: str) -> bool:
    """Whether all that is trainable belongs to the adapter."""
    return all(f".{name}." in f"{key}." for key, parameter in model.named_parameters() if parameter.requires_grad)


def active(model: PeftModel) -> list[str]:
    """The active adapters, in the order of the stack. They act together: their products are summed."""
    below = _active(model)[1]
    return [below] if isinstance(below, str) else below


def trained(model: PeftModel) -> str:
    """The one active adapter that trains; of a single active one it does not matter whether it does now.

    Raises RunError where that is unclear.
    """
    names = active(model)
    found = [name for name in names if _trains(model, name)] if len(names) > 1 else names
    if len(found) != 1:
        raise RunError(
            f"of the active adapters ({', '.join(names)}) {len(found)} train, so that it is unclear which one to train and "
            "save: freeze all but one."
        )
    return found[0]


def activate(model: PeftModel, names: Sequence[str], trains: str | None = None) -> None:
    """Makes exactly these adapters active, and of the whole model only `trains` trainable (nothing, if None)."""
    model.base_model.set_adapter(list(names))
    model.active_adapter = trains or names[-1]
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trains is not None and f".{trains}." in f"{key}.")


@contextmanager
def serving(model: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """The model with exactly these adapters active, or as its bare base with none; afterwards it is as it was."""
    if not isinstance(model, PeftModel):
        yield model
        return
    with untouched(model):
        if names:
            model.base_model.set_adapter(list(names))
            yield model
        else:
            with model.disable_adapter():
                yield model


def _trains(model: PeftModel, name: str) -> bool:
    return any(f".{name}." in f"{key}." for key, p in model.named_parameters() if p.requires_grad)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Gives every `requires_grad` flag, train/eval mode and the active adapters back exactly as they were.

    PEFT's own switches un-freeze every active adapter on the way out.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    active = _active(model) if isinstance(model, PeftModel) else None
    try:
        yield
    finally:
        if active is not None and _active(model) != active:
            # Only the model below takes several; the outer one knows a single name, that of the config in use.
            model.base_model.set_adapter(active[1])
            model.active_adapter = active[0]
        for p, flag in flags:
            p.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _active(model: PeftModel) -> tuple[str, str | list[str]]:
    """What is active: the outer model's one name, and below it a name or several."""
    below = model.base_model.active_adapter
    return model.active_adapter, list(below) if isinstance(below, list) else below


def copy_frozen(model: PeftModel, source: str, name: str) -> None:
    """Adds a frozen, inactive copy `name` of adapter `source`. Nothing else of the model changes."""
    config = deepcopy(model.peft_config[source])
    config.init_lora_weights = True  # others (PiSSA, OLoRA, ...) would move base weights into the copy once more
    with untouched(model), torch.random.fork_rng():  # PEFT draws initial weights
        model.add_adapter(name, config)
        set_peft_model_state_dict(model, _state(model, source), adapter_name=name)
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.requires_grad_(False)


def remove(model: PeftModel, name: str) -> None:
    """Deletes an inactive adapter."""
    with untouched(model):
        model.delete_adapter(name)


def drop(model: PeftModel, names: Sequence[str]) -> nn.Module:
    """Deletes adapters, active or not. Returns the model, or its base, bit for bit as it was, if no adapter is left."""
    kept = [name for name in model.peft_config if name not in names]
    if not kept:
        return model.unload()
    still = [name for name in active(model) if name in kept] or kept[-1:]
    activate(model, still)
    for name in names:
        remove(model, name)
    return model


def together(model: PeftModel, names: Sequence[str], name: str) -> None:
    """Adds a frozen, inactive adapter `name` that alone does what these do together: their factors side by side (`cat`),
    exact to rounding."""
    with untouched(model):
        model.add_weighted_adapter(list(names), [1.0] * len(names), name, combination_type="cat")
    for key, parameter in model.named_parameters():
        if f".{name}." in f"{key}.":
            parameter.requires_grad_(False)


def save(model: PeftModel, name: str, folder: Path, base: str | None = None) -> None:
    """Writes one adapter as `default`: weights and a config with sorted keys and lists.

    PEFT writes its sets in another order in every process, which would make equal runs differ in bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().to("cpu").contiguous() for key, value in _state(model, name).items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name].to_dict()
    config["inference_mode"] = True
    if base is not None:
        config["base_model_name_or_path"] = base
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    atomic_write(folder / CONFIG, json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n")


def sha256(model: PeftModel, name: str) -> str:
    """Hash over the names, shapes, types and bytes of an adapter's weights."""
    return tensors_sha256(_state(model, name))


def base_sha256(model: PeftModel) -> str:
    """`weights_sha256` of the model below the adapters, as it would be without them."""
    inner = model.get_base_model().state_dict()
    return tensors_sha256({k.replace(".base_layer.", "."): v for k, v in inner.items() if ".lora_" not in k})


def load(model: PeftModel, name: str, folder: Path) -> None:
    """Reads weights saved by `save` into the existing adapter `name`; flags and the active adapter stay as they are.

    Raises RunError if the file does not hold exactly this adapter's tensors.
    """
    state = load_file(folder / WEIGHTS)
    found, expected = (
        {(key, tuple(v.shape)) for key, v in tensors.items()} for tensors in (state, _state(model, name))
    )
    if odd := sorted({key for key, _ in found ^ expected}):
        raise RunError(
            f"{folder / WEIGHTS} does not fit adapter {name!r}: {len(odd)} tensors differ, "
            f"such as {', '.join(odd[:3])}. It was made with another adapter configuration."
        )
    with untouched(model):
        set_peft_model_state_dict(model, state, adapter_name=name)


def _state(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    # By itself PEFT would ask the Hub whether embeddings were resized, and then add those of the base.
    return get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
