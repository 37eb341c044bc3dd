"""What is evaluated after each request: groups (forget, retain, held out, others by name) and, for the matrix of stages and
tasks, a column for each task and each part that is forgotten. Knows the plan; nothing of models or metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import Example, content, load_examples
from hf_clmul.data.sources import shown as cut
from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.paraphrases import GROUP as PARAPHRASED
from hf_clmul.evaluation.images.paraphrases import paraphrased
from hf_clmul.evaluation.images.prompts import prompts
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.hashes import digest
from hf_clmul.plan.steps import Roles, Step
from hf_clmul.recipe.problems import one_of
from hf_clmul.recipe.schema import Learn, Recipe, Unlearn
from hf_clmul.recipe.streams import BASE
from hf_clmul.report.claims import EXACT


@dataclass(frozen=True)
class Column:
    """A column of the matrix R: a task's rows that no request forgets (all, of a task forgotten whole), or what one request
    forgets of a task. `learned` and `forgotten` are stages: 0 is the base model, i + 1 the model after request i."""

    name: str
    kind: str
    task: str
    rows: list[Example]
    learned: tuple[int, ...]
    forgotten: tuple[int, ...] = ()

    def record(self) -> dict[str, Any]:
        stages = {"learned": list(self.learned), "forgotten": list(self.forgotten)}
        return {"name": self.name, "kind": self.kind, "task": self.task, **stages}


@dataclass(frozen=True)
class Evaluated:
    """All that is measured: columns and groups as lists of contents, and each example once, with the task that taught it."""

    rows: dict[str, Example]
    task_of: dict[str, str]
    groups: dict[str, list[str]]
    columns: list[Column]

    def plain(self) -> list[Any]:
        """What a digest of it is made from."""
        return [self.rows, self.groups, {column.name: self.texts(column) for column in self.columns}]

    def group(self, text: str) -> str:
        """The first group that the example is in, or "tasks" where it is in none."""
        return next((name for name, texts in self._sets.items() if text in texts), "tasks")

    def key(self, text: str) -> str:
        """What an example is known by in the files of a stage; they hold no text to compare with once it is blanked."""
        return f"{self.task_of.get(text) or self.group(text)}/{self.rows[text]['id']}"

    def texts(self, column: Column) -> list[str]:
        return [content(row) for row in column.rows]

    def digest(self, column: Column) -> str:
        """Which rows the column shows. Scores of other rows, as of a stage measured before the recipe grew, are no rows of the
        same matrix."""
        return digest([self.key(text) for text in self.texts(column)])

    @cached_property
    def _sets(self) -> dict[str, set[str]]:
        return {name: set(texts) for name, texts in self.groups.items()}


def shown(recipe: Recipe, steps: Sequence[Step]) -> Sequence[Step]:
    """The steps, and their trainings, with what is evaluated of their rows: of pictures the prompts, each once.
    Raises RecipeError for a prompt that is to be forgotten and kept."""
    if recipe.family != "diffusion":
        return steps
    for step in steps:
        if any("caption" not in row for rows in step.roles.values() for row in rows):
            raise RecipeError(
                f"request {step.name}: its pictures have no captions, and prompts are what is measured before and after. Give the "
                "data a column `caption`. A model that takes no prompts can be trained from Python (docs/diffusion.md)."
            )
    found = [
        replace(
            step, roles=_prompts(step.roles), jobs=tuple(replace(job, roles=_prompts(job.roles)) for job in step.jobs)
        )
        for step in steps
    ]
    for step in found:
        kept = {row["caption"] for role in ("retain", "memory") for row in step.roles.get(role, ())}
        both = [row["caption"] for row in step.roles.get("forget", ()) if row["caption"] in kept]
        if both:
            raise RecipeError(
                f"request {step.name}: the prompt {both[0]!r} ({len(both)} in all) is to be forgotten and to be kept. Leave it out "
                "of one of the two, with `where` or `exclude`, or give other captions."
            )
    return found


def _prompts(roles: Roles) -> Roles:
    return {role: prompts(rows) for role, rows in roles.items()}


def evaluated(recipe: Recipe, steps: Sequence[Step], whole: Mapping[str, list[Example]]) -> Evaluated:
    """What is measured of `groups` (`whole`): of what is forgotten `max_forgotten` examples, all by default; of everything
    else `max_examples`; always the same ones, for every seed.

    An exact deletion needs no measuring to be believed: its rows are in the forget group only where nothing else is, and
    count as everything else does.
    """
    size, most = recipe.evaluation.max_examples, recipe.evaluation.max_forgotten
    proved = {content(row) for step in steps if step.how in EXACT for row in step.roles["forget"]}
    forgotten = whole.get("forget", [])
    measured = [row for row in forgotten if content(row) not in proved]
    forget = _sample(measured, most, "forget") if measured else _sample(forgotten, size, "retain")
    kept, chosen = {content(row) for row in whole.get("retain", [])}, {content(row) for row in forget}
    cut = []
    for column in columns(steps):
        rows = [row for row in column.rows if content(row) in chosen] if column.forgotten and measured else []
        cut.append(replace(column, rows=rows or _sample(column.rows, size, "retain")))
    held_out = _sample(whole.get("held_out", []), size, "held_out")
    retain = [row for column in cut for row in column.rows if content(row) in kept]
    taught = {content(row) for column in columns(steps) for row in column.rows}
    retain += _sample([row for row in whole.get("retain", []) if content(row) not in taught], size, "retain")
    asked = {PARAPHRASED: whole.get(PARAPHRASED, [])}
    more = {name: _sample(whole.get(name, []), size, name) for name in recipe.evaluation.groups}
    groups = {
        name: {content(row): row for row in rows}
        for name, rows in {"forget": forget, "retain": retain, "held_out": held_out, **asked, **more}.items()
    }
    rows = {content(row): row for column in cut for row in column.rows}
    rows |= {text: row for group in groups.values() for text, row in group.items()}
    task_of = {content(row): column.task for column in cut for row in column.rows}
    return Evaluated(rows, task_of, {name: list(group) for name, group in groups.items() if group}, cut)


def _sample(rows: Sequence[Example], size: int | None, purpose: str) -> list[Example]:
    return list(rows) if size is None else fixed_sample(rows, size, derived_seed(purpose))


def columns(steps: Sequence[Step]) -> list[Column]:
    """The columns of a stream, in the order in which their rows were first learned, a task before its forgotten parts."""
    learned: dict[str, dict[str, Example]] = {}
    when: dict[str, list[tuple[int, set[str]]]] = {}
    parts: list[Column] = []
    for step in steps:
        if isinstance(step.request, Learn):
            rows = {content(row): row for row in step.roles["learn"]}
            learned[step.request.task] = learned.get(step.request.task, {}) | rows
            when.setdefault(step.request.task, []).append((step.index + 1, set(rows)))
            continue
        task, rows = step.request.from_task, step.roles["forget"]
        texts = {content(row) for row in rows}
        taught = tuple(stage for stage, seen in when.get(task, []) if seen & texts) or (0,)
        parts.append(Column(step.request.name, "forgotten", task, rows, taught, (step.index + 1,)))
    taken = set(learned) | {BASE}
    found: list[Column] = []
    for task, rows in learned.items():
        stages = tuple(stage for stage, _ in when[task])
        mine = [part for part in parts if part.task == task]
        whole = [part for part in mine if len({content(row) for row in part.rows}) == len(rows)]
        if whole:  # all rows, again and again
            ends = tuple(stage for part in whole for stage in part.forgotten)
            found.append(Column(task, "task", task, whole[0].rows, stages, ends))
            mine = [part for part in mine if part not in whole]
        else:
            gone = {content(row) for part in mine for row in part.rows}
            left = [row for text, row in rows.items() if text not in gone]
            found += [Column(task, "task", task, left, stages)] if left else []
        found += [_named(part, taken) for part in mine]
    return found + [_named(part, taken) for part in parts if part.task == BASE]


def _named(part: Column, taken: set[str]) -> Column:
    """A part that has a task's name is told apart."""
    return replace(part, name=f"unlearn-{part.name}") if part.name in taken else part


def groups(
    recipe: Recipe, steps: Sequence[Step], loaded: Mapping[str, list[Example]] | None = None
) -> dict[str, list[Example]]:
    """Whole groups to evaluate: everything that will be forgotten, everything else learned, and the held-out data. `loaded` is
    what `untrained_rows` gave, where somebody read it before.

    Raises RecipeError if data is trained on that `evaluation` declares never to be.
    """
    forget: dict[str, Example] = {}
    learned: dict[str, Example] = {}
    for step in steps:
        learns = {content(e): e for e in step.roles.get("learn", [])}
        forgets = {content(e): e for e in step.roles.get("forget", [])}
        learned |= learns
        if isinstance(step.request, Unlearn) and (
            step.request.retain is not None or step.retains
        ):  # nobody learned it here, and it has to stay
            learned |= {content(e): e for e in step.roles.get("retain", [])}
        forget = {text: e for text, e in {**forget, **forgets}.items() if text not in learns}
    retain = [example for text, example in learned.items() if text not in forget]
    named = dict(untrained_rows(recipe) if loaded is None else loaded)
    if recipe.family == "diffusion":
        named = {group: prompts(rows) for group, rows in named.items()}
    for group, rows in named.items():
        where = f"groups.{group}" if group in recipe.evaluation.groups else group
        overlap = {content(example) for example in rows} & set(learned)
        if overlap:
            raise RecipeError(
                f"evaluation.{where}: {len(overlap)} of its examples are learned too, such as "
                f"{cut(next(iter(overlap)))}. This data must never be trained on."
            )
    forget |= {content(example): example for example in named.pop("forget", [])}
    whole = {"forget": list(forget.values()), "retain": retain, **named}
    whole[PARAPHRASED] = _paraphrases(recipe, steps, whole)
    return {name: rows for name, rows in whole.items() if rows}


def _paraphrases(recipe: Recipe, steps: Sequence[Step], whole: Mapping[str, list[Example]]) -> list[Example]:
    """Other prompts for what is to be forgotten. Raises RecipeError for ones of anything else, and for prompts that are no other
    ones."""
    images, key = recipe.evaluation.images, "evaluation.images.paraphrases"
    if not images.paraphrases:
        return []
    if images.classifier is None or images.axis is None:
        raise RecipeError(f"{key}: name the `classifier` that judges them and the `axis` that these are values of.")
    known = list(dict.fromkeys(row[images.axis] for row in whole["forget"] if row.get(images.axis) is not None))
    for name in images.paraphrases:
        if name not in known:
            raise RecipeError(
                f"{key}: {name!r} is no {images.axis} that is to be forgotten; {one_of(known) if known else 'none is'}."
            )
    rows = paraphrased(images.axis, images.paraphrases)
    used = {row.get("caption") for step in steps for of_role in step.roles.values() for row in of_role}
    used |= {row.get("caption") for of_group in whole.values() for row in of_group}
    if same := [row["caption"] for row in rows if row["caption"] in used]:
        raise RecipeError(f"{key}: {same[0]!r} is a prompt of the data, and not another one. Take it out.")
    return rows


def untrained(recipe: Recipe) -> dict[str, str]:
    """{group: name of its data}, of the groups that no request may learn."""
    chosen = recipe.evaluation
    named = {"held_out": chosen.held_out, "forget": chosen.forget, **chosen.groups}
    return {group: name for group, name in named.items() if name is not None}


def untrained_rows(recipe: Recipe) -> dict[str, list[Example]]:
    """The data of `untrained`, as they are read."""
    return {group: load_examples(recipe.data[name], name) for group, name in untrained(recipe).items()}


def texts(whole: Mapping[str, Sequence[Example]]) -> list[str]:
    """The texts of all groups, each once, sorted: what the tokenizer of a model made from scratch is trained on. A recipe
    that learns less but evaluates the same (a retrained reference) has the same texts."""
    return sorted(
        {
            text
            for rows in whole.values()
            for row in rows
            for key, value in row.items()
            if key != "id"
            for text in _strings(value)
        }
    )


def _strings(value: Any) -> list[str]:
    """A text, or the texts of messages."""
    if isinstance(value, list):
        return [
            text for message in value if isinstance(message, dict) for text in message.values() if isinstance(text, str)
        ]
    return [value] if isinstance(value, str) else []
