"""What the user deploys: `model/` and `adapters/`, written whole, then loaded back through the public loaders and compared
with the live model. Knows files and loaders; nothing of requests or training."""

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copy
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.loading import Loaded
from hf_clmul.paths import atomic_folder
from hf_clmul.run_folder import TRAINED, RunFolder

# Merging rounds W + BA once to the dtype of W, so logits differ by a few of its steps; everything else is bit-equal.
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
REPORT = "Please report this, with the output of `hf-clmul env`."


def save_state(model: Any, folder: Path, trained: dict[str, Any]) -> None:
    """The weights that train, as a request left them: where the next one starts. `trained` is kept beside them."""
    with atomic_folder(folder) as aside:
        if isinstance(model, PeftModel):
            adapters.save(model, model.active_adapter, aside)
        else:
            model.save_pretrained(aside)
        (aside / TRAINED).write_text(json.dumps(trained) + "\n", "utf-8")


def load_state(model: Any, folder: Path) -> None:
    """Reads what `save_state` or a checkpoint wrote into the live model."""
    if isinstance(model, PeftModel):
        adapters.load(model, model.active_adapter, folder)
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict())


def task_of(model: PeftModel) -> str:
    """The task that the active adapter holds."""
    return model.active_adapter.removeprefix(adapters.TASK)


def export_kind(model: Any, merge: bool) -> str:
    """What `model/` will be: a "full" model, an "adapter", or one "merged" into its base."""
    return "full" if not isinstance(model, PeftModel) else "merged" if merge else "adapter"


def export(
    loaded: Loaded, model: Any, folder: RunFolder, kind: str, card: str, probe: Sequence[list[int]]
) -> dict[str, Any]:
    """Writes `model/` (and `adapters/TASK`), with `card` as its README, and verifies it on `probe` (token ids).

    Returns {"kind", "max_difference" (of logits), "tolerance"}. Raises RunError if what was loaded back differs; the folder
    stays as it was then.
    """
    live = _logits(model, probe)
    if kind == "merged":
        with atomic_folder(folder.adapters / task_of(model)) as aside:
            adapters.save(model, model.active_adapter, aside, loaded.base)
            back = _load_back(loaded, aside, model, "adapter")
            _check(back, live, probe, 0.0, folder.adapters)
        whole = back.merge_and_unload()
    with atomic_folder(folder.model) as aside:
        if kind == "adapter":
            adapters.save(model, model.active_adapter, aside, loaded.base)
        else:
            (whole if kind == "merged" else model).save_pretrained(aside)
        loaded.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, "utf-8")
        tolerance = MERGE_TOLERANCE[live.dtype] if kind == "merged" else 0.0
        difference = _check(_load_back(loaded, aside, model, kind), live, probe, tolerance, folder.model)
    if kind == "adapter":
        with atomic_folder(folder.adapters / task_of(model)) as aside:
            for name in (adapters.WEIGHTS, adapters.CONFIG):
                copy(folder.model / name, aside / name)
    return {"kind": kind, "max_difference": difference, "tolerance": tolerance}


def _load_back(loaded: Loaded, folder: Path, model: Any, kind: str) -> Any:
    """As a user would, where `model` is: nothing of this package takes part."""
    first = next(model.parameters())
    if kind == "adapter":
        base = AutoModelForCausalLM.from_pretrained(loaded.base, dtype=first.dtype, **loaded.options)
        return PeftModel.from_pretrained(base, folder).eval().to(first.device)
    options = {name: value for name, value in loaded.options.items() if name != "revision"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=first.dtype, **options).eval().to(first.device)


def _check(back: Any, live: torch.Tensor, probe: Sequence[list[int]], tolerance: float, place: Path) -> float:
    """The largest difference of logits. Raises RunError if it is above the tolerance, or not a number."""
    found = _logits(back, probe)
    if found.shape != live.shape:
        raise RunError(
            f"the exported model has logits of the shape {tuple(found.shape)} and the trained one {tuple(live.shape)}. "
            f"{place} was not replaced. {REPORT}"
        )
    difference = float((found.float() - live.float()).abs().max())
    if not difference <= tolerance:
        raise RunError(
            f"the exported model differs from the trained one by {difference:.3g} in its logits (allowed: "
            f"{tolerance:g}). {place} was not replaced. {REPORT}"
        )
    return difference


@torch.no_grad()
def _logits(model: Any, probe: Sequence[list[int]]) -> torch.Tensor:
    """Logits of each probe text, one after the other, [sum of lengths, V]."""
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    rows = [model(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in probe]
    model.train(mode)
    return torch.cat(rows)
