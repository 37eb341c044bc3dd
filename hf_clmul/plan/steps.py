"""What a recipe will do, worked out from its data before anything is trained: the examples of each role in each request, the
adapters that train and those that are frozen below, what is remembered, and how exact each deletion is. Knows recipes and
data; nothing of models."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_clmul.data.memory import remembered
from hf_clmul.data.pictures import known
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.shards import affected, assign
from hf_clmul.data.sources import Example, content, load_examples, select, shown
from hf_clmul.errors import RecipeError
from hf_clmul.hashes import digest
from hf_clmul.objectives import BESIDE, TERMS
from hf_clmul.plan import retained
from hf_clmul.recipe.schema import Learn, Recipe, Unlearn, Unlearning
from hf_clmul.recipe.streams import BASE, OF_BASE, STREAM
from hf_clmul.report.claims import APPROXIMATE, EXACT_BY_DELETION, EXACT_BY_RETRAINING, FILTER

Roles = dict[str, list[Example]]


@dataclass(frozen=True)
class Job:
    """One training of a request: what it trains on which examples.

    `label` is what its seeds derive from: it has no place in the order of requests, so that a history without a deleted task
    has the same. `part` is its folder below the request's. `active` are the adapters of the stack while it trains, in order,
    of which `adapter` trains; None and () without adapters. `settings_of` is the request whose terms and training it uses.
    `fresh`: from a new adapter, even where there is one of the name.
    """

    label: str
    roles: Roles
    settings_of: int
    adapter: str | None = None
    active: tuple[str, ...] = ()
    part: str = ""
    fresh: bool = False


@dataclass(frozen=True)
class Step:
    """One request, ready to be carried out. `name` is its folder's; `roles` maps a role to its examples.

    After it, `stack` are the adapters that tasks share, `own` those of each isolated task that is left, `memory` what is
    remembered of each task, and `gone` what is unlearned, by content, with the request that did it. `removed` are adapters
    that it deletes. `retains` says what the role retain is made of where the request leaves that open.
    """

    index: int
    name: str
    request: Learn | Unlearn
    roles: Roles
    jobs: tuple[Job, ...] = ()
    how: str = "training"
    stack: tuple[str, ...] = ()
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    memory: Mapping[str, list[Example]] = field(default_factory=dict)
    gone: Mapping[str, str] = field(default_factory=dict)
    retains: str = ""

    @property
    def kind(self) -> str:
        return "learn" if isinstance(self.request, Learn) else "unlearn"

    @property
    def what(self) -> str:
        """The task that is learned, or the name of what is unlearned."""
        return self.request.task if isinstance(self.request, Learn) else self.request.name

    @property
    def each(self) -> dict[str, tuple[str, ...]]:
        """Of every task that is left after it its adapters, those of the stack first."""
        return {name: (name,) for name in self.stack} | dict(self.own)

    @property
    def title(self) -> str:
        return f"after {self.kind}ing {self.what}"

    @cached_property
    def digests(self) -> dict[str, Any]:
        """Of the examples of each role, and of those of each of several jobs."""
        parts = {job.part: _digests(job.roles) for job in self.jobs if job.part}
        return {**_digests(self.roles), **({"parts": parts} if parts else {})}


@dataclass
class _Task:
    """A task between two requests: its rows that are not forgotten and, of an isolated one, how they are divided."""

    rows: list[Example]
    learned_by: int
    isolated: bool = False
    divided: bool = False
    parts: dict[tuple[int, int], list[Example]] = field(default_factory=dict)

    def adapter(self, name: str, part: tuple[int, int]) -> str:
        """The name of the adapter of a part. Task names have no capitals, so that it is no other task's."""
        return f"{name}S{part[0]}R{part[1]}" if self.divided else name


def plan_steps(recipe: Recipe) -> list[Step]:
    """The steps of a recipe. Raises RecipeError for what cannot be carried out, and if data is missing, empty, tombstoned, or
    shared between forget and retain."""
    stream = _Stream(recipe)
    for i, request in enumerate(recipe.requests):
        stream.learn(i, request) if isinstance(request, Learn) else stream.unlearn(i, request)
    return stream.steps


class _Stream:
    """The stream between two requests."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, []
        self.tasks: dict[str, _Task] = {}
        self.gone: dict[str, str] = {}
        self.stack: list[str] = []
        self.times: Counter[str] = Counter()
        self.met: set[str] = set()  # what any training has seen that isolated tasks have no part in
        self.shares_one = recipe.adapter is not None and recipe.adapter.strategy != "stacked"

    # ---- requests ------------------------------------------------------------------------------------------------

    def learn(self, i: int, request: Learn) -> None:
        rows = load_examples(self.recipe.data[request.data], request.data)
        rows = select(rows, request.where, f"requests.{i}.learn.where")
        if not rows:  # each value is there, and no row has all of them
            raise RecipeError(f"requests.{i}.learn: the learn set is empty: nothing of {request.data!r} is selected.")
        self._check_tombstones(rows, f"requests.{i}.learn", request.lifts)
        self._check_prompts(rows, f"requests.{i}.learn", request.lifts)
        self._check_isolation(i, request, rows)
        self.gone = {text: name for text, name in self.gone.items() if name not in request.lifts}
        label = self._label(f"learn-{request.task}")
        roles = {"learn": rows, "memory": self._replayed(request)}
        self._check_prompts(roles["memory"], f"requests.{i}.learn, memory")
        if request.isolated:
            divided = request.shards * request.slices > 1
            task = _Task(list(rows), i, True, divided, self._parts(request, rows))
            jobs = _jobs_of_parts(request.task, task, list(task.parts))
        else:
            before = self.tasks[request.task].rows if request.task in self.tasks else []
            known = {content(row) for row in rows}
            task = _Task([row for row in before if content(row) not in known] + list(rows), i)
            jobs = [self._shared_job(label, roles, i, self._shared_adapter(request.task))]
        self.tasks[request.task] = task
        self._add(i, f"{i:02d}-learn-{request.task}", request, roles, jobs, "training")

    def unlearn(self, i: int, request: Unlearn) -> None:
        task = self.tasks.get(request.from_task)
        forget = self._to_forget(i, request, task)
        if not forget:
            raise RecipeError(
                f"requests.{i}.unlearn: the forget set is empty: nothing of {request.from_task!r} is selected."
            )
        name, label = f"{i:02d}-unlearn-{request.name}", self._label(f"unlearn-{request.name}")
        if task is not None and task.isolated:
            met = any(content(row) in self.met for row in forget)  # by other weights, before these rows came here
            jobs, removed = self._without(request, task, forget)
            self._forgotten(request, forget)
            self._check_left(request, i, forget)
            how = APPROXIMATE if met else EXACT_BY_RETRAINING if jobs else EXACT_BY_DELETION
            self._add(i, name, request, {"forget": forget}, jobs, how, removed)
            return
        self._forgotten(request, forget)
        unlearning = self.recipe.unlearning
        retain = self._to_retain(i, request, forget) if _looks_at_retain(unlearning) else []
        memory, retains = _flat(self._memory()) if unlearning.memory else [], ""
        if _looks_at_retain(unlearning) and not retain and retained.is_data_free(self.recipe, request):
            retain = retained.known_prompts(self.recipe, request)
            if not retain and not memory and (unlearning.retain or unlearning.protect is not None):
                raise retained.nothing_known(i)
            retains = retained.told(retain) if retain else ""
        roles = {"forget": forget, "retain": retain, "memory": memory}
        self._check_left(request, i, forget)
        own = f"{OF_BASE}{request.name}" if request.from_task == BASE else request.from_task
        how = FILTER if request.filter else APPROXIMATE
        jobs = [self._shared_job(label, roles, i, self._shared_adapter(own))]
        self._add(i, name, request, roles, jobs, how, retains=retains)

    # ---- what they need ------------------------------------------------------------------------------------------

    def _add(
        self, i: int, name: str, request: Any, roles: Roles, jobs: Sequence[Job], how: str, removed: Sequence[str] = (),
        retains: str = "",
    ) -> None:  # fmt: skip
        filled = {role: rows for role, rows in roles.items() if rows}
        own = {
            name: tuple(task.adapter(name, part) for part in task.parts)
            for name, task in self.tasks.items()
            if task.isolated and task.parts
        }
        self.steps.append(
            Step(
                i, name, request, filled, tuple(jobs), how, tuple(self.stack), own, tuple(removed), self._memory(),
                dict(self.gone), retains,
            )
        )  # fmt: skip

    def _label(self, what: str) -> str:
        self.times[what] += 1
        return what if self.times[what] == 1 else f"{what}#{self.times[what]}"

    def _shared_adapter(self, own: str) -> str | None:
        return None if self.recipe.adapter is None else STREAM if self.shares_one else own

    def _shared_job(self, label: str, roles: Roles, i: int, adapter: str | None) -> Job:
        self.met |= {content(row) for rows in roles.values() for row in rows}
        if adapter is not None and adapter not in self.stack:
            self.stack.append(adapter)
        return Job(label, {role: rows for role, rows in roles.items() if rows}, i, adapter, tuple(self.stack))

    def _parts(self, request: Learn, rows: list[Example]) -> dict[tuple[int, int], list[Example]]:
        seed = derived_seed(self.recipe.seed, request.task, "shards")
        return {part: found for part, found in assign(rows, request.shards, request.slices, seed).items() if found}

    def _without(self, request: Unlearn, task: _Task, forget: list[Example]) -> tuple[list[Job], list[str]]:
        """The jobs that retrain an isolated task's parts without what is forgotten, and the adapters that go."""
        gone = {str(row["id"]) for row in forget}
        touched = affected(task.parts, gone)
        before = dict(task.parts)
        left = {part: [row for row in rows if str(row["id"]) not in gone] for part, rows in before.items()}
        task.parts = {part: rows for part, rows in left.items() if rows}
        task.rows = [row for row in task.rows if str(row["id"]) not in gone]
        again = [part for part in touched if part in task.parts]
        removed = [task.adapter(request.from_task, part) for part in before if part not in task.parts]
        return _jobs_of_parts(request.from_task, task, again), removed

    def _to_forget(self, i: int, request: Unlearn, task: _Task | None) -> list[Example]:
        key = f"requests.{i}.unlearn"
        if request.from_task == BASE:
            return load_examples(self.recipe.data[request.data], request.data)
        if not task.rows:
            raise RecipeError(f"{key}.from: nothing is left of {request.from_task!r}: it is unlearned already.")
        if request.ids is not None:
            by_id = {str(row["id"]): row for row in task.rows}
            never = [name for name in request.ids if name not in by_id]
            if never:
                raise RecipeError(
                    f"{key}.ids: {len(never)} of the {len(request.ids)} ids were never learned in {request.from_task!r}, or are "
                    f"unlearned already, such as {never[0]!r}; ids there: {', '.join(list(by_id)[:4])}, ..."
                )
            return [by_id[name] for name in dict.fromkeys(request.ids)]
        if request.data is None:
            return select(task.rows, request.where, f"{key}.where")
        named = {content(e): e for e in load_examples(self.recipe.data[request.data], request.data)}
        found = [e for e in task.rows if content(e) in named]
        _check_learned(named, found, request, i)
        # Its other columns, such as paraphrases, are wanted for the evaluation.
        return [{**named[content(e)], **e} for e in found]

    def _to_retain(self, i: int, request: Unlearn, forget: list[Example]) -> list[Example]:
        """What was learned and not forgotten, less isolated tasks, which no other request may meet; or the data named."""
        if request.retain is not None:
            rest = load_examples(self.recipe.data[request.retain], request.retain)
        else:
            rest = [row for task in self.tasks.values() if not task.isolated for row in task.rows]
        shared = {content(e) for e in forget} & {content(e) for e in rest}
        if shared:
            raise RecipeError(
                f"requests.{i}.unlearn: forget and retain share {len(shared)} examples, such as "
                f"{shown(next(iter(shared)))}. The same text cannot be forgotten and kept: remove duplicates "
                f"from the data, or widen `{'data' if request.data is not None else 'where'}`."
            )
        self._check_tombstones(rest, f"requests.{i}.unlearn.retain")
        self._check_prompts(rest, f"requests.{i}.unlearn.retain", own=request.name)
        return rest

    def _check_isolation(self, i: int, request: Learn, rows: list[Example]) -> None:
        """Raises RecipeError where an isolated task and another one would hold the same text."""
        others = {name: task for name, task in self.tasks.items() if name != request.task}
        for name, task in others.items():
            if not (task.isolated or request.isolated):
                continue
            held = {content(row) for row in task.rows}
            if found := [row for row in rows if content(row) in held]:
                isolated = request.task if request.isolated else name
                raise RecipeError(
                    f"requests.{i}.learn: {len(found)} of its {len(rows)} rows are learned in {name!r} too, such as "
                    f"{shown(content(found[0]))}, and {isolated!r} is isolated: it shares no row with another task. Leave them "
                    "out of one of the two, with `where` or `exclude`."
                )

    def _check_left(self, request: Unlearn, i: int, forget: list[Example]) -> None:
        """Raises RecipeError for rows that stay in a task, this one or another, with a text that is forgotten: they would be
        replayed, retained, or left in an adapter that nobody touches."""
        gone = {content(row) for row in forget}
        for name, task in self.tasks.items():
            if left := [row for row in task.rows if content(row) in gone]:
                remedy = "leave them out of one of the two (`exclude` in its data section)"
                if name == request.from_task:
                    remedy = "name them in this request too, or remove duplicates from the data"
                raise RecipeError(
                    f"requests.{i}.unlearn: {len(left)} rows that stay in {name!r} have the text of rows to forget, such as "
                    f"{left[0]['id']!r}. The same text cannot be forgotten and kept: {remedy}."
                )

    def _forgotten(self, request: Unlearn, forget: list[Example]) -> None:
        ids = {str(row["id"]) for row in forget}
        task = self.tasks.get(request.from_task)
        if task is not None:
            task.rows = [row for row in task.rows if str(row["id"]) not in ids]
        self.gone |= {content(row): request.name for row in forget}

    def _check_tombstones(self, rows: list[Example], key: str, lifts: Sequence[str] | None = None) -> None:
        """Raises RecipeError for rows that were unlearned. `lifts` are requests whose rows may come back; None where no request
        may bring any back."""
        buried = [row for row in rows if self.gone.get(content(row), "") not in ("", *(lifts or ()))]
        if buried:
            name = self.gone[content(buried[0])]
            lifted = "" if lifts is None else f", or, if they may come back, say so: `lifts: [{name}]`"
            raise RecipeError(
                f"{key}: {len(buried)} of its {len(rows)} rows were unlearned by {name!r}, such as "
                f"{shown(content(buried[0]))}. Leave them out with `where` or `exclude`{lifted}."
            )

    def _check_prompts(
        self, rows: Sequence[Example], key: str, lifts: Sequence[str] | None = None, own: str | None = None
    ) -> None:
        """Raises RecipeError for pictures under a prompt whose pictures were unlearned: with pictures the prompt is what
        is forgotten. `lifts` as above; `own` is the request itself, of which `columns.shown` tells."""
        if self.recipe.family != "diffusion":
            return
        spared = {own, *(lifts or ())}
        gone = {json.loads(text).get("caption"): name for text, name in self.gone.items() if name not in spared}
        if back := [row for row in rows if row.get("caption") is not None and row["caption"] in gone]:
            prompt = back[0]["caption"]
            name = gone[prompt]
            lifted = "" if lifts is None else f", or, if the prompt may come back, say so: `lifts: [{name}]`"
            raise RecipeError(
                f"{key}: {len(back)} of its {len(rows)} rows have prompts that were unlearned, such as {prompt!r}, which "
                f"{name!r} unlearned. Other pictures would bring it back. Leave them out with `where` or "
                f"`exclude`{lifted}."
            )

    def _memory(self) -> dict[str, list[Example]]:
        if self.recipe.memory is None:
            return {}
        shared = {name: task.rows for name, task in self.tasks.items() if not task.isolated and task.rows}
        found = remembered(shared, self.recipe.memory.size, derived_seed(self.recipe.seed, "memory"))
        return {name: rows for name, rows in found.items() if rows}

    def _replayed(self, request: Learn) -> list[Example]:
        terms = self.recipe.learning.memory if request.memory is None else request.memory
        return _flat(self._memory()) if terms and not request.isolated else []


def _jobs_of_parts(name: str, task: _Task, wanted: Sequence[tuple[int, int]]) -> list[Job]:
    """The trainings of an isolated task's parts: each on the frozen slices before it, of the same shard."""
    jobs = []
    for part in wanted:
        active = tuple(task.adapter(name, p) for p in task.parts if p[0] == part[0] and p[1] <= part[1])
        folder = f"shard{part[0]}-slice{part[1]}" if task.divided else ""
        label = f"learn-{name}-{folder}".rstrip("-")
        jobs.append(Job(label, {"learn": task.parts[part]}, task.learned_by, active[-1], active, folder, fresh=True))
    return jobs


def _looks_at_retain(unlearning: Unlearning) -> bool:
    """Whether anything does: a retain term or, without a step on it, what else has to know what is to stay."""
    beside = any(TERMS[name].needs & BESIDE for name in unlearning.forget)
    return bool(unlearning.retain) or beside or unlearning.protect is not None


def _digests(roles: Roles) -> dict[str, str]:
    return {role: digest([known(row) for row in rows]) for role, rows in roles.items()}


def _flat(memory: Mapping[str, Sequence[Example]]) -> list[Example]:
    return [row for rows in memory.values() for row in rows]


def _check_learned(named: Mapping[str, Example], found: Sequence[Example], request: Unlearn, i: int) -> None:
    """Only what was learned can be forgotten: rows that `data` names beyond that are a mistake in one of the two."""
    never = named.keys() - {content(example) for example in found}
    if never:
        raise RecipeError(
            f"requests.{i}.unlearn.data: {len(never)} of the {len(named)} examples of {request.data!r} were never "
            f"learned in {request.from_task!r}, such as {shown(min(never))}. An example is found by its text, in "
            "the same columns: mend the data, or name the task that learned it."
        )
