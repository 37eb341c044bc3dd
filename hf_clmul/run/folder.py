"""The run folder: where everything lies, what is finished, and whether the settings are still those it was made with.
Knows files and hashes; nothing of models or training."""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.hashes import digest, file_hashes
from hf_clmul.paths import atomic_write, explained_writes, recover_folder
from hf_clmul.recipe.load import dump_recipe, load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.results_schema import COMPLETE, read_record, read_stage

if TYPE_CHECKING:  # it imports what is heavy
    from hf_clmul.plan.steps import Job, Step

TRAINED = "training.json"
LOCK, HOLDER = "run.lock", "run.holder"
"""The lock of a run folder, which the system takes back from a killed process, and the name of who holds it."""


class RunFolder:
    """Paths of a run and the state of its requests. One process writes; the others only read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe, self.results, self.ledger = root / "recipe.yaml", root / "results.json", root / "ledger.jsonl"
        self.model, self.adapters, self.memory = root / "model", root / "adapters", root / "memory"
        self.receipts = root / "receipts"
        self.base, self.requests = root / "base", root / "requests"
        self.report = root / "report" / "report.html"

    def request(self, step: "Step") -> Path:
        return self.requests / step.name

    def stage(self, step: "Step | None") -> Path:
        """Folder with the evaluation of a stage; before the first request for None."""
        return self.base if step is None else self.request(step)

    def place(self, step: "Step", job: "Job") -> Path:
        """Folder of one training of a request: the request's own where there is no other."""
        return self.request(step) / job.part if job.part else self.request(step)

    def state(self, step: "Step", job: "Job") -> Path:
        """The weights that train, as the training left them."""
        return self.place(step, job) / "state"

    def result(self, step: "Step | None") -> dict[str, Any] | None:
        """The stage's record, or None while it is unfinished."""
        return read_stage(self.stage(step) / "result.json")

    def trained(self, step: "Step", job: "Job") -> dict[str, Any] | None:
        """What is known of a training, or None while it goes on, or once its state was removed."""
        return _read(self.state(step, job) / TRAINED)

    def finished(self, recipe_sha256: str) -> dict[str, Any] | None:
        """The results record if this very recipe was carried out to its end, else None."""
        results = read_record(self.root) if self.results.is_file() else None
        done = results and results["status"] == COMPLETE and results["stages"] and self.model.is_dir()
        return results if done and results["recipe_sha256"] == recipe_sha256 else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other runs out of the folder until the block ends: two at once would spoil each other's files.

        Raises RunError if another run is at work there, or for a folder that is not a run.
        """
        self._check_ours()
        lock, holder = FileLock(self.root / LOCK, timeout=0), self.root / HOLDER
        try:
            with explained_writes(self.root / LOCK):
                self.root.mkdir(parents=True, exist_ok=True)
                lock.acquire()
        except Timeout:
            who = holder.read_text("utf-8") if holder.is_file() else "another process"
            raise RunError(
                f"{self.root} is in use by another run: {who}. Wait until it ends or stop it, then give the same "
                "command again; or choose another folder with --output."
            ) from None
        try:
            with explained_writes(holder):
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()

    def check(self, recipe: Recipe, steps: "Sequence[Step]", measured: str) -> None:
        """Whether this recipe may be carried out here. `measured` is a digest of what is evaluated and how.

        Raises RunError for a folder that is not a run, or whose finished requests came from other settings. Nothing is
        changed, but what a kill left half-written is cleared away.
        """
        self._check_ours()
        recover_folder(self.root)
        for place in self._unknown(steps):
            if (place / "result.json").is_file():
                raise RunError(
                    f"{self.root} holds a finished request {place.name!r} that this recipe does not have: "
                    "choose another folder with --output."
                )
        for step in steps:
            if self.result(step) is not None:
                self._check_finished(recipe, steps, step, measured)

    def begin(self, recipe: Recipe, steps: "Sequence[Step]", base: dict[str, str]) -> None:
        """Makes the folder, or one that `check` has let pass ready to go on: an unfinished request whose settings changed is
        removed, so that it starts anew. `base` are hashes of the base model, {"weights_sha256", "tokenizer_sha256"}.

        Raises RunError if requests were finished with another base model.
        """
        before = self.result(None)
        changed = [] if before is None else [key for key in base if base[key] != before[key]]
        if changed and any(self.result(step) is not None for step in steps):
            raise RunError(
                f"{self.root}: {changed[0]} of the base model is no longer that of the model which the finished "
                "requests began with. Bring the old model back (`model.revision` names a version on the Hub; the "
                "tokenizer of a model made from scratch follows the data), or choose another folder with --output."
            )
        stale = (
            [self.base, *map(self.request, steps)]
            if changed
            else [
                self.request(step)
                for step in steps
                if self.result(step) is None
                and _read(self.request(step) / "settings.json") not in (None, settings(recipe, steps, step))
            ]
        )
        for place in [*stale, *self._unknown(steps)]:
            if place.exists():
                shutil.rmtree(place)
        self.write_recipe(recipe)

    def start(self, recipe: Recipe, steps: "Sequence[Step]", step: "Step") -> None:
        """Records the settings that a request is being carried out with."""
        atomic_write(
            self.request(step) / "settings.json",
            json.dumps(settings(recipe, steps, step), indent=1, sort_keys=True) + "\n",
        )

    def checkpoint(self, step: "Step", job: "Job", processes: int) -> Path | None:
        """The newest whole checkpoint that as many processes made: with others, steps mean other examples."""
        place = self.place(step, job)
        marks = {path.parent: path.read_text("utf-8") for path in place.glob(f"checkpoint-*/{COMPLETE}")}
        whole = [path for path, made_by in marks.items() if made_by == str(processes)]
        return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def clear_checkpoints(self, step: "Step", job: "Job", keep: Path | None = None) -> None:
        for path in self.place(step, job).glob("checkpoint-*"):
            if path != keep:
                shutil.rmtree(path)

    def clear_state(self, step: "Step", job: "Job") -> dict[str, str]:
        """Deletes the weights that a training left, and its checkpoints. Returns the deleted files with their hashes."""
        deleted: dict[str, str] = {}
        for place in (self.state(step, job), *self.place(step, job).glob("checkpoint-*")):
            deleted |= self.delete(place)
        return deleted

    def delete(self, place: Path) -> dict[str, str]:
        """Deletes a folder, if it is there. Returns the deleted files with their hashes."""
        at = place.relative_to(self.root).as_posix()
        deleted = {f"{at}/{name}": hash_ for name, hash_ in file_hashes(place).items()}
        shutil.rmtree(place, ignore_errors=True)
        return deleted

    def outdate_report(self) -> None:
        """Deletes the page, which shows what no longer holds: it is written anew where there is none."""
        with explained_writes(self.report):
            self.report.unlink(missing_ok=True)

    def write_recipe(self, recipe: Recipe) -> None:
        """The resolved recipe, where it is not there as it is."""
        text = dump_recipe(recipe)
        if not self.recipe.is_file() or self.recipe.read_bytes() != text.encode():
            atomic_write(self.recipe, text)

    def _check_ours(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise RunError(f"{self.root} is a file and not a folder: choose another place with --output.")
        if not self.ledger.is_file() and not self._is_ours():
            raise RunError(
                f"{self.root} is not empty and not a run folder: there is no {self.ledger.name} in it. Choose another folder "
                "(`hf-clmul run`: with --output)."
            )

    def _is_ours(self) -> bool:
        """Empty, or with a recipe that was written by `begin`: resolved, unlike one that a user wrote and keeps there."""
        first = (".recipe.yaml.", LOCK, HOLDER)  # all that a run has written which was killed at once
        if not any(path for path in self.root.glob("*") if not path.name.startswith(first)):
            return True
        try:
            return self.recipe.read_text("utf-8") == dump_recipe(load_recipe(self.recipe))
        except (OSError, RecipeError):
            return False

    def _unknown(self, steps: "Sequence[Step]") -> list[Path]:
        """Requests in the folder that the recipe does not have."""
        known = {step.name for step in steps}
        ours = {path.parent for path in self.requests.glob("*/settings.json")}
        return [place for place in sorted(ours) if place.name not in known]

    def _check_finished(self, recipe: Recipe, steps: "Sequence[Step]", step: "Step", measured: str) -> None:
        before, now = _read(self.request(step) / "settings.json") or {}, settings(recipe, steps, step)
        if before != now:
            old, new = _flat(before), _flat(now)
            changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
            lines = [f"  {key}: was {old.get(key, 'absent')}, is {new.get(key, 'absent')}" for key in changed[:8]]
            raise RunError(
                f"{self.root} was made with other settings, and its request {step.name} is finished:\n"
                + "\n".join(lines)
                + "\nChoose another folder with --output, or go back to these settings."
            )
        if self.result(step)["measured"] != measured and any(self.trained(step, job) is None for job in step.jobs):
            raise RunError(
                f"{self.root}: it is to be evaluated in another way than before, but the weights after {step.name} are "
                "not kept: only the newest of an adapter, or of a model trained whole, are. Choose another folder with --output."
            )


def mark_complete(checkpoint: Path, processes: int) -> None:
    """Marks a checkpoint as whole, once its files have reached the disk. One that a kill cut short has no mark."""
    with explained_writes(checkpoint):
        for path in checkpoint.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
    atomic_write(checkpoint / COMPLETE, str(processes))


def settings(recipe: Recipe, steps: "Sequence[Step]", step: "Step") -> dict[str, Any]:
    """Everything that a request's weights depend on, the requests before it included, as plain data. What is measured is
    not: it is kept with each stage (`measured`), and measured again when it changes."""
    whole = recipe.model_dump(mode="json", by_alias=True)
    own: dict[str, Any] = {}
    for each in steps[: step.index + 1]:
        before = {"before": digest(own)} if own else {}
        own = json.loads(json.dumps({**_own_settings(recipe, whole, each), **before}))
    return own


def _own_settings(recipe: Recipe, whole: dict[str, Any], step: "Step") -> dict[str, Any]:
    kind = whole["learning" if step.kind == "learn" else "unlearning"]
    request = whole["requests"][step.index][step.kind]
    of_family = {"diffusion": whole["diffusion"]} if recipe.family == "diffusion" else {}
    return {
        **of_family,
        **{key: whole[key] for key in ("seed", "family", "model", "adapter", "memory", "teacher")},
        "terms": {key: value for key, value in kind.items() if key != "training"},
        "request": {key: value for key, value in request.items() if key in ("isolated", "shards", "slices", "memory")},
        "training": recipe.request_training(step.index),
        "how": step.how,
        "examples": step.digests,
    }


def recipe_sha256(recipe: Recipe) -> str:
    return sha256(dump_recipe(recipe).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    """What a request wrote down of itself. Raises RunError for a damaged file, without which nobody knows what the request did."""
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read as JSON ({error}). Put the file back as it was, or run the recipe into another folder with "
            "--output."
        ) from None


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    parts = [_flat(inner, f"{key}.{name}" if key else name) for name, inner in value.items()]
    return {name: inner for part in parts for name, inner in part.items()}
