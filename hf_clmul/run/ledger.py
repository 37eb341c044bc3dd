"""What a run writes into its ledger, and what it asks of it: who is tombstoned. One process calls it. Knows the plan and the
records of a ledger; nothing of training."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_clmul.data.sources import Example, content
from hf_clmul.hashes import digest, file_hashes
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.files import remembered_head
from hf_clmul.ledger.key import keyed
from hf_clmul.ledger.records import (
    check_refused,
    columns_of,
    data_record,
    derived_record,
    erased_record,
    finished_record,
    lifted_record,
    open_key,
    request_record,
    run_record,
    tombstones,
)
from hf_clmul.models import adapters
from hf_clmul.plan.exactness import closure
from hf_clmul.plan.steps import Job, Step
from hf_clmul.recipe.schema import Learn, Recipe
from hf_clmul.run.export import Wanted
from hf_clmul.run.folder import RunFolder


class RunLedger:
    """The ledger of one run. Raises RunError if it is broken, or its key is gone."""

    def __init__(self, recipe: Recipe, steps: list[Step], folder: RunFolder) -> None:
        self.recipe, self.steps, self.folder = recipe, steps, folder
        self.path = folder.ledger
        # Verified once: nobody else writes while the folder is locked, and a long stream would read it all at every step.
        self.events = ledger.verify(self.path)
        self.key = open_key(self.path, self.events)

    def begun(self, sha256: str, base: dict[str, str], processes: int, **more: Any) -> None:
        names = [step.name for step in self.steps]
        about = {
            **base,
            "path": self.recipe.model.path,
            "revision": self.recipe.model.revision,
            "dtype": self.recipe.model.dtype,
        }
        record = run_record(
            self.key,
            recipe_sha256=sha256,
            base=about,
            requests=names,
            processes=processes,
            seed=self.recipe.seed,
            **more,
        )
        self._append("run", **record)

    def check(self, step: Step) -> None:
        """Raises RecipeError where a request is about to train on rows that were erased here and not lifted by it."""
        lifts = step.request.lifts if isinstance(step.request, Learn) else []
        stones = {text: name for text, name in tombstones(self.events).items() if name not in lifts}
        own = {step.request.name} if not isinstance(step.request, Learn) else set()
        stones = {text: name for text, name in stones.items() if name not in own}  # it was killed after it had erased
        for job in step.jobs:
            for role, rows in job.roles.items():
                if role != "forget":
                    check_refused(_rows(rows), stones, self.key, f"request {step.name}, {role}")

    def starting(self, step: Step) -> None:
        """The data that a learn request is about to meet. Written once, however often it is killed."""
        request, events = step.request, self.events
        if not isinstance(request, Learn):
            return
        rows, source = step.roles["learn"], self.recipe.data[request.data]
        record = data_record(
            self.key,
            task=request.task,
            rows=_rows(rows),
            source=source.path,
            split=source.split,
            columns=columns_of(rows),
        )
        of_task = [event for event in events if event["event"] == "data" and event["task"] == request.task]
        if not of_task or of_task[-1]["merkle_root"] != record["merkle_root"]:
            self._append("data", **record)

    def training(self, step: Step, job: Job | None, sha256: str, resumed: bool, why: str) -> None:
        """A training begins or goes on; None for a deletion, which needs none."""
        trains = {} if job is None else {"part": job.part, "adapter": job.adapter, "active": list(job.active)}
        # A plain hash of a few short rows could be found by guessing, also once the key is destroyed.
        examples = {role: keyed(self.key, digest(each)) for role, each in step.digests.items()}
        found = request_record(
            name=step.name, kind=step.kind, resumed=resumed, recipe_sha256=sha256, examples=examples,
            plan={"claim": step.how, "why": why, **trains},
        )  # fmt: skip
        self._append("request", **found)

    def trained(self, step: Step, job: Job, done: dict[str, Any], seed: int) -> None:
        lifts = step.request.lifts if isinstance(step.request, Learn) else []
        for name in set(lifts) & set(tombstones(self.events).values()):  # not before they are really back
            self._append("lifted", **lifted_record(name, step.name))
        replayed = [keyed(self.key, content(row)) for row in job.roles.get("memory", [])]
        self._append(
            "finished", part=job.part,
            **finished_record(
                name=step.name, weights_sha256=done["weights_sha256"], steps=done["steps"], seconds=done["seconds"],
                seed=seed, adapter=job.adapter, teacher=self.recipe.teacher, replayed=replayed,
            ),
        )  # fmt: skip

    def saved(self, step: Step, job: Job) -> None:
        """The weights that a training left, and what they descend from."""
        place = self.folder.state(step, job)
        tasks = {self._task(step)} | (set(step.memory) if "memory" in job.roles else set())
        if "retain" in job.roles:
            tasks |= {
                s.request.task
                for s in self.steps[: step.index]
                if isinstance(s.request, Learn) and not s.request.isolated
            }
        parents = [f"data/{task}" for task in sorted(tasks)] + self._below(step, job)
        self._derived(place, "adapter" if job.adapter else "checkpoint", parents, step.name)

    def remembers(self, step: Step) -> None:
        self._derived(self.folder.memory, "memory", [f"data/{task}" for task in step.memory], step.name)

    def erased(self, step: Step, record: dict[str, Any], deleted: dict[str, str], base: tuple[str, str]) -> None:
        """An unlearn request is done: its claim, what descended from its examples, and what was deleted and is left."""
        if any(event["event"] == "erased" and event["name"] == step.name for event in self.events):
            return
        texts = [content(row) for row in step.roles["forget"]]
        found = closure(self.recipe, self.steps[: step.index], texts)
        living = {}
        for earlier in self.steps[: step.index + 1]:
            for job in earlier.jobs:
                place = self.folder.state(earlier, job)
                living |= {f"{self._name(place)}/{name}": sha for name, sha in file_hashes(place).items()}
        mine = [self._name(self.folder.state(step, job)) for job in step.jobs]
        rebuilt = {name: sha for name, sha in living.items() if name.rpartition("/")[0] in mine}
        surviving = {name: sha for name, sha in living.items() if name not in rebuilt}
        self._append(
            "erased",
            **erased_record(
                self.key, name=step.name, request=step.request.name, task=self._task(step), claim=step.how,
                rows=_rows(step.roles["forget"]), closure=found.artefacts, deleted=deleted, surviving=surviving,
                base_before=base[0], base_after=base[1], steps=record["steps"], seconds=record["seconds"], rebuilt=rebuilt,
            ),
        )  # fmt: skip

    def exported(self, wanted: Wanted) -> None:
        """What was exported, and the states that it descends from."""
        newest = self._newest(len(self.steps))
        for task, parts in wanted.each.items():
            self._derived(self.folder.adapters / task, "adapter", _states(newest, parts), None)
        self._derived(self.folder.model, "export", _states(newest, wanted.parts or ("",)), None)
        self._append("exported", kind=wanted.kind, files=file_hashes(self.folder.model))

    def recorded(self, places: Iterable[Path]) -> dict[str, str]:
        """{file: SHA-256} of artefacts, as they were when they were made."""
        made = {event["artefact"]: event["sha256"] for event in self.events if event["event"] == "derived"}
        names = [name for name in map(self._name, places) if name in made]
        return {f"{name}/{file}": sha256 for name in names for file, sha256 in made[name].items()}

    def exports_of(self, states: Iterable[Path]) -> list[Path]:
        """What an earlier complete run exported of these states, and is still there."""
        names = {self._name(state) for state in states}
        parents = {event["artefact"]: event["parents"] for event in self.events if event["event"] == "derived"}
        places = [self.folder.model, *sorted(self.folder.adapters.glob("*"))]
        return [place for place in places if place.is_dir() and names & set(parents.get(self._name(place), ()))]

    def _append(self, event: str, **record: Any) -> None:
        self.events.append(ledger.append(self.path, event, **record))

    def _derived(self, place: Any, kind: str, parents: list[str], request: str | None) -> None:
        name = self._name(place)
        self._append("derived", **derived_record(name, kind, file_hashes(place), parents, request))

    def _name(self, place: Any) -> str:
        return place.relative_to(self.folder.root).as_posix()

    def _task(self, step: Step) -> str:
        return step.request.task if isinstance(step.request, Learn) else step.request.from_task

    def _below(self, step: Step, job: Job) -> list[str]:
        """States that a training stood on or began with."""
        newest = self._newest(step.index)
        for other in step.jobs[: step.jobs.index(job)]:
            newest[other.adapter or ""] = self._name(self.folder.state(step, other))
        wanted = [each for each in job.active if each != job.adapter or not job.fresh] if job.active else [""]
        return [newest[each] for each in wanted if each in newest]

    def _newest(self, before: int) -> dict[str, str]:
        """Of each adapter, the state that it had before a request ("" for the whole model)."""
        found: dict[str, str] = {}
        for step in self.steps[:before]:
            for removed in step.removed:
                found.pop(removed, None)
            for job in step.jobs:
                found[job.adapter or ""] = self._name(self.folder.state(step, job))
        return found


def _states(newest: Mapping[str, str], parts: Sequence[str]) -> list[str]:
    """The states of adapters, given by their names in the model."""
    names = [part.removeprefix(adapters.TASK) for part in parts]
    return [newest[name] for name in names if name in newest]


def check_ledger(folder: RunFolder) -> None:
    """Raises RunError, before anything is changed, for a ledger that was edited or cut, or whose key is gone."""
    events = ledger.verify(folder.ledger, remembered_head(folder.root))
    if events:
        open_key(folder.ledger, events)


def _rows(rows: list[Example]) -> dict[str, str]:
    return {str(row["id"]): content(row) for row in rows}
