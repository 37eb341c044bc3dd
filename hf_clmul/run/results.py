"""The results record, results.json: what was done, measured, with what versions, seeds, hashes, hardware and time.
Knows plain data; it measures nothing itself."""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_clmul import __version__
from hf_clmul.errors import RecipeError
from hf_clmul.paths import shared_path
from hf_clmul.recipe.schema import Recipe

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors")
MORE_PACKAGES = {"causal_lm": (), "diffusion": ("diffusers",)}
"""By family."""


def record(
    recipe: Recipe,
    sha256: str,
    stages: list[dict[str, Any]],
    status: str,
    model: Any,
    about: Mapping[str, Any],
    events: list[dict[str, Any]],
    began: float,
    reference: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a run as far as it got, from its finished stages and the events of its ledger.

    `model` is what trains, and `about` what the record says of it beside its size. `began` is when this process started, in
    seconds since 1970; `seconds` counts earlier processes too, up to the last thing that each wrote into the ledger. `reference`
    are the figures of the retrained model (`retrained.reference_for`).
    """
    named = dict(model.named_parameters())
    return {
        "schema": 1,
        "name": recipe.name,
        "status": status,
        "recipe_sha256": sha256,
        "source": recipe.source,
        "source_revision": recipe.source_revision,
        "seed": recipe.seed,
        "created": _time(events[0]).isoformat(timespec="seconds"),
        "finished": None,
        "command": shlex.join(
            ["hf-clmul" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name, *sys.argv[1:]]
        ),
        "model": {
            "family": recipe.family,
            "path": recipe.model.path or "made from scratch",
            **about,
            "sha256": stages[0]["weights_sha256"],
            "parameters": sum(p.numel() for p in named.values()),
            "trainable_parameters": sum(p.numel() for name, p in named.items() if p.requires_grad or ".lora_" in name),
            "dtype": recipe.model.dtype,
        },
        "versions": versions(recipe.family),
        "hardware": hardware(
            next(iter(named.values())).device.type, [e["processes"] for e in events if e["event"] == "run"][-1]
        ),
        "seconds": round(_seconds_before(events) + time.time() - began, 3),
        "peak_memory_bytes": peak_memory(),
        "stages": stages,
        "reference": reference,
        "export": None,
    }


def shared(results: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The record for other people: it names no folder of this machine."""
    model = recipe.written.get(("model", "path"), results["model"]["path"])
    # A path may stand inside an argument, as in `data.notes.path=/...`; one in an address (hf://...) is none.
    words = [re.sub(r"(?<![\w.:/~-])~?/(?:[^/,{}\[\]]+/)*", "", word) for word in shlex.split(results["command"])]
    judged = {
        name: recipe.written.get(("evaluation", "images", name), value)
        for name, value in results.get("judged", {}).items()
    }
    return {
        **results,
        **({"judged": judged} if judged else {}),
        "source": results["source"] and shared_path(results["source"]),
        "command": shlex.join(words),
        "model": {**results["model"], "path": shared_path(model)},
    }


def versions(family: str) -> dict[str, str]:
    """Of this package, of Python and of what its numbers depend on."""
    packages = (*PACKAGES, *MORE_PACKAGES[family])
    return {"hf_clmul": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def hardware(device: str, processes: int) -> dict[str, Any]:
    """Device, processor, cores, threads and memory of this machine, and on how many processes the run is spread."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "processes": processes,
    }


def peak_memory() -> int | None:
    """The most memory that this process has held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reference_of(recipe: Recipe) -> dict[str, Any] | None:
    """The recorded figures of the retrained model, {"groups", "source"}, or None. Raises RecipeError if unreadable."""
    path = recipe.evaluation.reference
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        for metrics in found["groups"].values():
            for entry in metrics.values():
                float(entry["mean"]), float(entry["std"])
        return {"groups": found["groups"], "source": found["source"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"evaluation.reference: {path} cannot be read as a record of a retrained model ({error!r}). "
            "It needs `source` and `groups`: {group: {metric: {mean, std}}}; set it to null if there is none, or name a run folder."
        ) from error


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _seconds_before(events: list[dict[str, Any]]) -> float:
    """Time that earlier processes spent on the run: from each start to the last event before the next."""
    starts = [i for i, event in enumerate(events) if event["event"] == "run"]
    ends = [next_start - 1 for next_start in starts[1:]]
    return sum(
        (_time(events[end]) - _time(events[start])).total_seconds() for start, end in zip(starts, ends, strict=False)
    )


def _time(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"])
