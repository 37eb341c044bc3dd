"""What a recipe will do, worked out from its data before anything is trained: the examples of each role in each request.
Knows recipes and data; nothing of models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

from hf_clmul.data.encoding import example_format
from hf_clmul.data.sources import Example, load_examples, select
from hf_clmul.errors import RecipeError
from hf_clmul.recipe_schema import Learn, Recipe, Unlearn


@dataclass(frozen=True)
class Step:
    """One request, ready to be carried out. `name` is its folder's; `roles` maps a role to its examples."""

    index: int
    name: str
    request: Learn | Unlearn
    roles: dict[str, list[Example]]

    @property
    def kind(self) -> str:
        return "learn" if isinstance(self.request, Learn) else "unlearn"

    @property
    def how(self) -> str:
        return "training" if self.kind == "learn" else "approximate"

    @property
    def title(self) -> str:
        what = self.request.task if isinstance(self.request, Learn) else self.request.name
        return f"after {self.kind}ing {what}"


def plan_steps(recipe: Recipe) -> list[Step]:
    """The steps of a recipe. Raises RecipeError for what cannot be carried out, and if data is missing, empty, or shared between
    forget and retain."""
    _check_adapter(recipe)
    learned: dict[str, list[Example]] = {}
    forgotten: set[str] = set()
    steps = []
    for i, request in enumerate(recipe.requests):
        if isinstance(request, Learn):
            name, roles = f"{i:02d}-learn-{request.task}", {"learn": _to_learn(recipe, request, i)}
            learned[request.task] = roles["learn"]
            forgotten -= {_content(example) for example in roles["learn"]}
        else:
            name = f"{i:02d}-unlearn-{request.name}"
            roles = _to_unlearn(recipe, request, i, learned, forgotten)
            forgotten |= {_content(example) for example in roles["forget"]}
            if not recipe.unlearning.retain:  # no term: it forgets without retaining
                roles["retain"] = []
        steps.append(Step(i, name, request, {role: rows for role, rows in roles.items() if rows}))
    return steps


def groups(recipe: Recipe, steps: Sequence[Step]) -> dict[str, list[Example]]:
    """Whole groups to evaluate: everything that will be forgotten, everything else learned, and the held-out data.

    Raises RecipeError if data is trained on that `evaluation` declares never to be.
    """
    forget: dict[str, Example] = {}
    learned: dict[str, Example] = {}
    for step in steps:
        learns, forgets = ({_content(e): e for e in step.roles.get(role, [])} for role in ("learn", "forget"))
        learned |= learns
        forget = {content: e for content, e in {**forget, **forgets}.items() if content not in learns}
    retain = [example for content, example in learned.items() if content not in forget]
    named = {
        group: load_examples(recipe.data[name], name) if name is not None else []
        for group, name in (("held_out", recipe.evaluation.held_out), ("forget", recipe.evaluation.forget))
    }
    for group, rows in named.items():
        overlap = {_content(example) for example in rows} & set(learned)
        if overlap:
            raise RecipeError(
                f"evaluation.{group}: {len(overlap)} of its examples are learned too, such as "
                f"{_shown(next(iter(overlap)))}. This data must never be trained on."
            )
    forget |= {_content(example): example for example in named["forget"]}
    whole = {"forget": list(forget.values()), "retain": retain, "held_out": named["held_out"]}
    return {name: rows for name, rows in whole.items() if rows}


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


def optimizer_steps(step: Step, training: dict[str, Any]) -> int:
    """Optimizer steps of a request on one process. Several repeat examples at the end of an epoch that they cannot share
    evenly (see ClmulTrainer)."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    return ceil(_epoch(step, training)[0] * training.get("num_train_epochs", 3))


def draws(step: Step, training: dict[str, Any]) -> int:
    """How many examples of each role a request sees on one process, repetitions counted."""
    per_epoch, micro_batches, anchors = _epoch(step, training)
    epochs, rest = divmod(optimizer_steps(step, training), per_epoch)
    batch = training.get("per_device_train_batch_size", 8)
    whole = micro_batches * batch if training.get("dataloader_drop_last", False) else anchors
    return epochs * whole + min(rest * training.get("gradient_accumulation_steps", 1) * batch, whole)


def _epoch(step: Step, training: dict[str, Any]) -> tuple[int, int, int]:
    """Optimizer steps, micro-batches and anchor examples (of `forget` or `learn`) of one pass."""
    anchors = len(step.roles["forget" if step.kind == "unlearn" else "learn"])
    exact = anchors / training.get("per_device_train_batch_size", 8)
    micro_batches = floor(exact) if training.get("dataloader_drop_last", False) else ceil(exact)
    return max(1, ceil(micro_batches / training.get("gradient_accumulation_steps", 1))), micro_batches, anchors


def _check_adapter(recipe: Recipe) -> None:
    """What this version cannot do with adapters, known before anything is trained."""
    if recipe.adapter is None:
        return
    learns = [i for i, request in enumerate(recipe.requests) if isinstance(request, Learn)]
    if len(learns) > 1:
        raise RecipeError(
            f"requests.{learns[1]}.learn: a second task would need a second adapter, which this version does not "
            "stack yet. Learn all data as one task, or set `adapter: null` to train all weights."
        )


def _to_learn(recipe: Recipe, request: Learn, i: int) -> list[Example]:
    rows = load_examples(recipe.data[request.data], request.data)
    return select(rows, request.where, f"requests.{i}.learn.where")


def _to_unlearn(
    recipe: Recipe, request: Unlearn, i: int, learned: dict[str, list[Example]], gone: set[str]
) -> dict[str, list[Example]]:
    task, more = learned[request.from_task], {}
    forget = select(task, request.where, f"requests.{i}.unlearn.where")
    if request.data is not None:
        more = {_content(e): e for e in load_examples(recipe.data[request.data], request.data)}
        forget = [e for e in task if _content(e) in more]
        _check_learned(more, forget, request, i)
    if not forget:
        raise RecipeError(
            f"requests.{i}.unlearn: the forget set is empty: nothing of {request.from_task!r} is selected."
        )
    chosen = {id(example) for example in forget}
    rest = [e for rows in learned.values() for e in rows if id(e) not in chosen and _content(e) not in gone]
    if more:  # its other columns, such as paraphrases, are wanted for the evaluation
        forget = [{**more[_content(e)], **e} for e in forget]
    shared = {_content(e) for e in forget} & {_content(e) for e in rest}
    if shared:
        raise RecipeError(
            f"requests.{i}.unlearn: forget and retain share {len(shared)} examples, such as "
            f"{_shown(next(iter(shared)))}. The same text cannot be forgotten and kept: remove duplicates "
            f"from the data, or widen `{'data' if more else 'where'}`."
        )
    return {"forget": forget, "retain": rest}


def _check_learned(named: Mapping[str, Example], found: Sequence[Example], request: Unlearn, i: int) -> None:
    """Only what was learned can be forgotten: rows that `data` names beyond that are a mistake in one of the two."""
    never = named.keys() - {_content(example) for example in found}
    if never:
        raise RecipeError(
            f"requests.{i}.unlearn.data: {len(never)} of the {len(named)} examples of {request.data!r} were never "
            f"learned in {request.from_task!r}, such as {_shown(min(never))}. An example is found by its text, in "
            "the same columns: mend the data, or name the task that learned it."
        )


def _content(example: Example) -> str:
    return json.dumps({key: example[key] for key in example_format(example)}, sort_keys=True)


def _shown(content: str) -> str:
    return content if len(content) < 160 else content[:157] + "..."


def _strings(value: Any) -> list[str]:
    """A text, or the texts of messages."""
    if isinstance(value, list):
        return [
            text for message in value if isinstance(message, dict) for text in message.values() if isinstance(text, str)
        ]
    return [value] if isinstance(value, str) else []
