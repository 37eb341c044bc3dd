"""What the user deploys: `model/` and `adapters/`, written whole, then loaded back through the public loaders and compared
with the live model. Knows files and loaders; nothing of requests or training."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.loading import Loaded
from hf_clmul.paths import atomic_folder
from hf_clmul.run.folder import TRAINED, RunFolder

# A merge rounds W + BA once, and a combination sums in another order: logits differ by a few roundings. All else is bit-equal.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
COMBINED = "combined"
REPORT = "Please report this, with the output of `hf-clmul env`."


def save_state(model: Any, folder: Path, trained: dict[str, Any], write: Callable[[Path], None]) -> None:
    """The weights that train, as a training left them: where the next one starts. `trained` is kept beside them, and what
    `write` adds."""
    with atomic_folder(folder) as aside:
        if isinstance(model, PeftModel):
            adapters.save(model, adapters.trained(model), aside)
        else:
            model.save_pretrained(aside)
        write(aside)
        (aside / TRAINED).write_text(json.dumps(trained) + "\n", "utf-8")


def load_state(model: Any, folder: Path) -> None:
    """Reads what `save_state` or a checkpoint wrote into the live model."""
    if isinstance(model, PeftModel):
        adapters.load(model, adapters.trained(model), folder)
    else:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict())


@dataclass(frozen=True)
class Wanted:
    """What is exported: `parts`, the adapters in `model/`, in order; `each`, of every task that is left its own (several for
    a divided task); `merge`: into the base. Without adapters all is empty."""

    parts: tuple[str, ...] = ()
    each: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    merge: bool = False

    @property
    def kind(self) -> str:
        """What `model/` will be: a "full" model, an "adapter", several "combined" into one, or "merged" into the base."""
        return (
            "full" if not self.parts else "merged" if self.merge else "adapter" if len(self.parts) == 1 else "combined"
        )


def export(
    loaded: Loaded, model: Any, folder: RunFolder, wanted: Wanted, card: str, probe: Sequence[list[int]]
) -> dict[str, Any]:
    """Writes `model/` and `adapters/TASK`, with `card` as the README of the model, and verifies them on `probe` (token ids).

    Returns {"kind", "max_difference" (of logits), "tolerance"} of `model/`. Raises RunError if what was loaded back differs;
    the folder stays as it was then. Adapters of tasks that are no longer there are deleted.
    """
    kind, tolerance = (
        wanted.kind,
        0.0 if wanted.kind in ("adapter", "full") else TOLERANCE[next(model.parameters()).dtype],
    )
    live = _logits(model, wanted.parts, probe)
    with _as_one(model, wanted.parts) as one, atomic_folder(folder.model) as aside:
        if wanted.merge:
            adapters.save(model, one, aside, loaded.base)
            whole = _load_back(loaded, aside, model, "adapter").merge_and_unload()
            for name in (adapters.WEIGHTS, adapters.CONFIG):
                (aside / name).unlink()
            whole.save_pretrained(aside)
        elif kind == "full":
            model.save_pretrained(aside)
        else:
            adapters.save(model, one, aside, loaded.base)
        loaded.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card, "utf-8")
        back = _load_back(loaded, aside, model, "full" if kind in ("full", "merged") else "adapter")
        difference = _check(back, live, probe, tolerance, folder.model)
        del back
    for task, parts in wanted.each.items():
        _export_task(loaded, model, folder, task, parts, probe, same=not wanted.merge and parts == wanted.parts)
    for place in folder.adapters.glob("*") if folder.adapters.is_dir() else ():
        if place.name not in wanted.each:
            shutil.rmtree(place)
    return {"kind": kind, "max_difference": difference, "tolerance": tolerance}


def _export_task(
    loaded: Loaded, model: Any, folder: RunFolder, task: str, parts: tuple[str, ...], probe: Sequence[list[int]],
    same: bool,
) -> None:  # fmt: skip
    """`adapters/TASK`. `same`: it is what was just verified in `model/`."""
    with atomic_folder(folder.adapters / task) as aside:
        if same:
            for name in (adapters.WEIGHTS, adapters.CONFIG):
                shutil.copy(folder.model / name, aside / name)
            return
        with _as_one(model, parts) as one:
            adapters.save(model, one, aside, loaded.base)
        tolerance = 0.0 if len(parts) == 1 else TOLERANCE[next(model.parameters()).dtype]
        _check(
            _load_back(loaded, aside, model, "adapter"), _logits(model, parts, probe), probe, tolerance, folder.adapters
        )


@contextmanager
def _as_one(model: Any, parts: Sequence[str]) -> Iterator[str]:
    """The name of one adapter that does what these do together; a combination is there for the block only."""
    if len(parts) < 2:
        yield parts[0] if parts else ""
        return
    adapters.together(model, parts, COMBINED)
    try:
        yield COMBINED
    finally:
        adapters.remove(model, COMBINED)


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
    found = _logits(back, (), probe) if not isinstance(back, PeftModel) else _logits(back, ("default",), probe)
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
def _logits(model: Any, parts: Sequence[str], probe: Sequence[list[int]]) -> torch.Tensor:
    """Logits with these adapters active of each probe text, one after the other, [sum of lengths, V]."""
    mode, device = model.training, next(model.parameters()).device
    with adapters.serving(model, parts) as serving:
        serving.eval()
        rows = [serving(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in probe]
    model.train(mode)
    return torch.cat(rows)
