"""What `model/` is made of, and which examples that was trained on: an adapter that is left out, or deleted, holds what is not
there. Knows the plan; nothing of models or files."""

from collections.abc import Sequence

from hf_clmul.data.sources import Example, content
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Recipe, Unlearn
from hf_clmul.recipe.streams import BASE
from hf_clmul.report.claims import EXACT, FILTER

WHOLE = ""
"""In the place of an adapter's name, where all weights are trained."""


def erasing(steps: Sequence[Step]) -> list[str]:
    """The adapters by which something is unlearned from the base; one that could be switched off, or left out, would be a filter."""
    return [
        job.adapter
        for step in steps
        if isinstance(step.request, Unlearn) and step.request.from_task == BASE and step.how != FILTER
        for job in step.jobs
        if job.adapter is not None
    ]


def exported(recipe: Recipe, steps: Sequence[Step]) -> tuple[str, ...]:
    """The adapters in `model/`: the shared stack, or all that are left where tasks share none, or those of the tasks that
    `export.tasks` names; with what unlearns from the base. Raises KeyError for a task that is gone by then."""
    last, each = steps[-1], steps[-1].each
    names = dict.fromkeys([*(recipe.export.tasks or last.stack or each), *erasing(steps)])
    return tuple(part for name in names for part in each[name])


def trained_on(steps: Sequence[Step]) -> dict[str, set[str]]:
    """Of each adapter that is left, or of the `WHOLE` model: the examples, by content, that its weights have met in any role. An
    adapter that began anew has met nothing before."""
    found: dict[str, set[str]] = {}
    for step in steps:
        for name in step.removed:
            found.pop(name, None)
        for job in step.jobs:
            own = job.adapter or WHOLE
            rows = {content(row) for of_role in job.roles.values() for row in of_role}
            found[own] = rows if job.fresh else found.get(own, set()) | rows
    return found


def in_model(recipe: Recipe, steps: Sequence[Step], rows: Sequence[Example]) -> list[Example]:
    """Those of the rows that what is in `model/` was trained on, or that its base is asked to unlearn. Rows that no request has ask
    what a base still knows of which others were unlearned."""
    parts = (WHOLE,) if recipe.adapter is None else exported(recipe, steps)
    met = trained_on(steps)
    there = set().union(*(met.get(part, set()) for part in parts))
    for step in steps:
        if isinstance(step.request, Unlearn) and step.request.from_task == BASE:
            there |= {content(row) for row in step.roles["forget"]}
    if unlearns_from_base(steps):
        there |= set(map(content, unasked(steps, rows)))
    return [row for row in rows if content(row) in there]


def unlearns_from_base(steps: Sequence[Step]) -> bool:
    return any(isinstance(step.request, Unlearn) and step.request.from_task == BASE for step in steps)


def unasked(steps: Sequence[Step], rows: Sequence[Example]) -> list[Example]:
    """Those of the rows that no request has in any role: `evaluation.forget` alone names them."""
    asked = {content(row) for step in steps for of_role in step.roles.values() for row in of_role}
    return [row for row in rows if content(row) not in asked]


def why_not(steps: Sequence[Step], rows: Sequence[Example]) -> list[str]:
    """Why rows are not `in_model`, a reason for each way: a deletion was exact, the adapters that met them were not exported, or no
    request had them."""
    met, each = trained_on(steps), steps[-1].each
    forgets = [(step, set(map(content, step.roles["forget"]))) for step in steps if isinstance(step.request, Unlearn)]
    reasons: dict[str, None] = {}
    for text in map(content, rows):
        by = [step for step, gone in forgets if text in gone]
        tasks = [name for name, parts in each.items() if any(text in met.get(part, ()) for part in parts)]
        if tasks:
            named = ", ".join(f"adapters/{name}" for name in tasks)
            reason = f"they were learned in {named}, which the model does not have and which is not attacked"
        elif not by:
            reason = "no request learned or unlearned them"
            if forgets:
                reason += ", and none was to unlearn what the base model may know of them"
        elif by[-1].how in EXACT:
            reason = f"{by[-1].what} is {by[-1].how}"
        else:
            reason = f"no weights that met them are left after {by[-1].what}"
        reasons[reason] = None
    return list(reasons)
