"""Runs that take a second or two, and processes that are killed at a chosen point of one."""

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tiny import tiny_llama, tiny_tokenizer
from tqdm import tqdm
from transformers import Trainer

from hf_clmul.ledger import chain as ledger
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.log import RunLog
from hf_clmul.run.runner import run_recipe

gc.freeze()  # each training collects garbage, and would walk through all that was imported

FULL = """\
recipe_version: 1
name: small
model: {scratch: {vocab_size: 300, layers: 1, hidden: 32, heads: 2}}
data:
  people: {path: builtin:invented_people, persons: 2}
  strangers: {path: builtin:invented_people, split: held_out}
requests:
  - learn: {task: people, data: people}
  - unlearn: {name: one, from: people, where: {person: [P02]}}
learning: {training: {learning_rate: 3e-3, num_train_epochs: 2, per_device_train_batch_size: 4}}
unlearning: {training: {learning_rate: 1e-3, max_steps: 4, per_device_train_batch_size: 3}}
training: {logging_steps: 1, lr_scheduler_type: constant}
evaluation: {held_out: strangers, max_examples: 2, max_new_tokens: 4, samples: 1}
"""
LORA = FULL.replace("{scratch: {vocab_size: 300, layers: 1, hidden: 32, heads: 2}}", "{path: ./base}\n"
                    "adapter: {r: 2, alpha: 4, dropout: 0.2}").replace("name: small", "name: small-lora")  # fmt: skip

_START, _END = LORA.index("requests:"), LORA.index("learning:")
# Three tasks of eight rows and a divided one; all that a stream can do with them, and what happens to each.
STREAM_REQUESTS = """\
  - learn: {task: a, data: people, where: {person: P01}}
  - learn: {task: secret, data: people, where: {person: P02}, isolated: true}
  - learn: {task: b, data: people, where: {person: P03}}
  - learn: {task: parts, data: people, where: {person: P04}, isolated: true, shards: 2, slices: 2}
  - unlearn: {name: gone, from: secret}
  - unlearn: {name: one, from: parts, ids: [P04-2]}
  - unlearn: {name: two, from: a, ids: [P01-1, P01-3]}
"""
STREAM = (
    LORA[:_START].replace("persons: 2", "persons: 4") + f"requests:\n{STREAM_REQUESTS}memory: {{size: 6}}\n"
    + LORA[_END:].replace("learning: {training", "learning: {memory: {nll: {}}, training", 1)
    .replace("num_train_epochs: 2", "num_train_epochs: 1").replace("max_steps: 4", "max_steps: 3")
)  # fmt: skip


def save_base(folder: Path) -> Path:
    """A base model and its tokenizer, as a user has them on disk."""
    tokenizer = tiny_tokenizer(["Who is it?", "It is an invented person."])
    tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, kind: str, *changes: tuple[str, str]) -> Path:
    """`recipe.yaml` in `folder`, of the kind "full", "lora" or "stream", and the base that it names."""
    text = {"full": FULL, "lora": LORA, "stream": STREAM}[kind]
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} must stand once in the recipe"
        text = text.replace(old, new)
    if kind != "full" and not (folder / "base").exists():
        save_base(folder / "base")
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def without_report(root: Path) -> Path:
    """In place of the report, whose figures take seconds."""
    path = root / "report" / "report.html"
    path.parent.mkdir(exist_ok=True)
    path.write_text("report")
    return path


def execute(recipe: Path, out: Path, *overrides: str) -> Path:
    """Carries out the recipe in this process, without drawing figures and without waiting for the disk."""
    with patch("hf_clmul.run.closing.write_report", without_report), patch("os.fsync"):
        return run_recipe(load_recipe(recipe, overrides), out)


def outcome(root: Path) -> dict[str, Any]:
    """What must be the same bit for bit, however often a run was killed."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for part in ("model", "adapters", "memory")
             for path in sorted((root / part).rglob("*")) if path.is_file() and path.name != "README.md"}  # fmt: skip
    results = json.loads((root / "results.json").read_text())
    metrics = {f"{stage['stage']}/{group}/{name}": value for stage in results["stages"]
               for group, found in stage["groups"].items() for name, value in found["metrics"].items()}  # fmt: skip
    metrics |= {f"{stage['stage']}/task {task}/{name}": value for stage in results["stages"]
                for task, found in stage["tasks"].items() for name, value in found["metrics"].items()}  # fmt: skip
    samples = {stage["stage"]: [found["samples"] for found in stage["groups"].values()] for stage in results["stages"]}
    return {"files": files, "metrics": metrics, "samples": samples, "steps": [s["steps"] for s in results["stages"]]}


def events(root: Path) -> list[dict[str, Any]]:
    return ledger.verify(root / "ledger.jsonl")


# ---- processes that die --------------------------------------------------------------------------------------


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(request: str, step: int) -> None:
    """Dies at the end of an optimizer step, before it is logged or saved."""

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if request in args.output_dir and state.global_step == step:
            die()

    RunLog.on_step_end = on_step_end


def in_checkpoint(request: str, step: int) -> None:
    """Dies when weights and optimizer are on disk, and the random state is not."""
    whole = Trainer._save_rng_state

    def save(self: Any, folder: str) -> None:
        if request in folder and folder.endswith(f"-{step}"):
            die()
        whole(self, folder)

    Trainer._save_rng_state = save


def before(module: str, name: str, matching: str = "") -> None:
    """Dies when the function is called with an argument that contains `matching`."""
    owner = __import__(module, fromlist=[name])
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if any(matching in str(value) for value in [*args, *kwargs.values()]):
            die()
        return original(*args, **kwargs)

    setattr(owner, name, called)


def in_ledger(event: str) -> None:
    """Dies in the middle of writing a line."""
    whole = ledger.append

    def append(path: Path, name: str, /, **details: Any) -> None:
        if name != event:
            return whole(path, name, **details)
        with open(path, "a") as file:
            file.write('{"n": 99, "time": "20')
        return die()

    ledger.append = append


def in_process(point: Callable[..., None] | None, args: tuple, recipe: Path, out: Path) -> int:
    """Carries out the recipe in a process of its own, which `point(*args)` prepares; returns its exit code.

    Processes are forked from one that has imported everything, so that each costs no more than its work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_run"])
    printed = recipe.with_suffix(".txt")
    child = context.Process(target=_child, args=(point, args, recipe, out, printed))
    with patch.dict(
        os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))
    ):  # else it does not find this module
        child.start()
    child.join(120)
    if child.exitcode not in (0, -signal.SIGKILL):
        child.kill()
        raise RuntimeError(f"the run did not end as expected:\n{printed.read_text()[-3000:]}")
    return child.exitcode


def _child(point: Callable[..., None] | None, args: tuple, recipe: Path, out: Path, printed: Path) -> None:
    sys.stdout = sys.stderr = open(printed, "w")  # noqa: SIM115 - as long as the process lives
    tqdm.set_lock(threading.RLock())  # a semaphore of a killed process would be reported as leaked
    if point is not None:
        point(*args)
    execute(recipe, out)


def files(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def bytes_and_times(root: Path) -> dict[str, tuple[bytes, int]]:
    return {name: ((root / name).read_bytes(), (root / name).stat().st_mtime_ns) for name in files(root)}


def stop(monkeypatch: pytest.MonkeyPatch, request: str, step: int, error: BaseException) -> None:
    """Raises `error` at the end of a step, once."""

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if request in args.output_dir and state.global_step == step:
            monkeypatch.undo()
            raise error

    monkeypatch.setattr(RunLog, "on_step_end", on_step_end)
