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

from hf_clmul.errors import RunError
from hf_clmul.families.loaded import Loaded
from hf_clmul.models import adapters
from hf_clmul.paths import atomic_folder
from hf_clmul.run.folder import TRAINED, RunFolder

# A merge rounds W + BA once, and a combination sums in another order: logits differ by a few roundings. All else is bit-equal,
# but where equal weights lie elsewhere in memory, as those of a mapped file do, a processor may add in another order too.
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
        model.load_state_dict(type(model).from_pretrained(folder).state_dict())


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


def export(loaded: Loaded, model: Any, folder: RunFolder, wanted: Wanted, card: str, probe: Any) -> dict[str, Any]:
    """Writes `model/` and `adapters/TASK`, with `card` as the README of the model, and verifies them on `probe`, of `loaded.probe`.

    Returns {"kind", "max_difference" (of outputs), "tolerance"} of `model/`. Raises RunError if what was loaded back differs;
    the folder stays as it was then. Adapters of tasks that are no longer there are deleted.
    """
    kind, tolerance = (
        wanted.kind,
        0.0 if wanted.kind in ("adapter", "full") else TOLERANCE[next(model.parameters()).dtype],
    )
    live = _outputs(loaded, model, wanted.parts, probe)
    with _as_one(model, wanted.parts) as one, atomic_folder(folder.model) as aside:
        if wanted.merge:
            loaded.write_merged(model, one, aside)
        elif kind == "full":
            loaded.write_whole(model, aside)
        else:
            loaded.write_adapter(model, one, aside)
        loaded.write_rest(aside)
        (aside / "README.md").write_text(card, "utf-8")
        whole = kind in ("full", "merged")
        difference, tolerance = _check(loaded, model, aside, whole, live, probe, tolerance, folder.model)
    for task, parts in wanted.each.items():
        _export_task(loaded, model, folder, task, parts, probe, same=not wanted.merge and parts == wanted.parts)
    for place in folder.adapters.glob("*") if folder.adapters.is_dir() else ():
        if place.name not in wanted.each:
            shutil.rmtree(place)
    return {"kind": kind, "max_difference": difference, "tolerance": tolerance}


def _export_task(
    loaded: Loaded, model: Any, folder: RunFolder, task: str, parts: tuple[str, ...], probe: Any,
    same: bool,
) -> None:  # fmt: skip
    """`adapters/TASK`. `same`: it is what was just verified in `model/`."""
    with atomic_folder(folder.adapters / task) as aside:
        if same:
            for name in loaded.adapter_files:
                shutil.copy(folder.model / name, aside / name)
            return
        with _as_one(model, parts) as one:
            loaded.write_adapter(model, one, aside)
        tolerance = 0.0 if len(parts) == 1 else TOLERANCE[next(model.parameters()).dtype]
        _check(loaded, model, aside, False, _outputs(loaded, model, parts, probe), probe, tolerance, folder.adapters)


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


def _check(
    loaded: Loaded,
    model: Any,
    written: Path,
    whole: bool,
    live: torch.Tensor,
    probe: Any,
    tolerance: float,
    place: Path,
) -> tuple[float, float]:
    """The largest difference of outputs, and what of it was allowed: more than the tolerance where all weights are bit-equal.
    Raises RunError if it is above that, or not a number."""
    back = loaded.load_back(written, model, whole)
    found = _outputs(loaded, back, ("default",) if isinstance(back, PeftModel) else (), probe)
    if found.shape != live.shape:
        raise RunError(
            f"the exported model has outputs of the shape {tuple(found.shape)} and the trained one {tuple(live.shape)}. "
            f"{place} was not replaced. {REPORT}"
        )
    difference = float((found.float() - live.float()).abs().max())
    if difference > tolerance and whole and _same_weights(model, back):
        tolerance = TOLERANCE[next(model.parameters()).dtype]
    if not difference <= tolerance:
        raise RunError(
            f"the exported model differs from the trained one by {difference:.3g} in its outputs (allowed: "
            f"{tolerance:g}). {place} was not replaced. {REPORT}"
        )
    return difference, tolerance


def _same_weights(model: Any, other: Any) -> bool:
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in own.items())


def _outputs(loaded: Loaded, model: Any, parts: Sequence[str], probe: Any) -> torch.Tensor:
    """What the model says to the probe with these adapters active."""
    mode = model.training
    with adapters.serving(model, parts) as serving:
        serving.eval()
        found = loaded.outputs(serving, probe)
    model.train(mode)
    return found
