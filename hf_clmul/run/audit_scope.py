"""Which of the forgotten examples an audit attacks, and what its verdict says of the others, and of filters. Knows the plan, for all
families alike; nothing of models or attacks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_clmul.data.sources import Example, content
from hf_clmul.plan.exported import exported, in_model, unasked, why_not
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Recipe
from hf_clmul.report.claims import FILTER, MEANINGS


@dataclass(frozen=True)
class Scope:
    """`rows` are attacked; `said` are sentences on what the attacked model holds of what was to be forgotten; `held` is whether it
    holds any of it."""

    rows: list[Example]
    said: list[str]
    held: bool


def scope_of(recipe: Recipe, steps: Sequence[Step], forget: Sequence[Example], called: str) -> Scope:
    """Of the forgotten rows, which are `called` examples or prompts, those that are in `model/`; where none is, all of them."""
    there = in_model(recipe, steps, forget)
    said = _of_filters(filters_of(recipe, steps), called)
    if len(there) < len(forget):
        said.append(_of_others(steps, forget, there, called))
    alone = unasked(steps, there)
    if alone:
        said.append(
            f"{len(alone)} of {len(there)} attacked {called} are named by evaluation.forget alone: no request had them. What the "
            "base model knew of them was unlearned through others, if at all."
        )
    return Scope(list(there or forget), said, bool(there))


def filters_of(recipe: Recipe, steps: Sequence[Step]) -> dict[str, bool]:
    """{filter: whether its adapter is in the model}"""
    parts = exported(recipe, steps) if recipe.adapter is not None else ()
    return {step.what: any(job.adapter in parts for job in step.jobs) for step in steps if step.how == FILTER}


def _of_filters(filters: Mapping[str, bool], called: str) -> list[str]:
    return [
        f"{name} is a filter: {MEANINGS[FILTER]}."
        if is_there
        else f"{name} is a filter, and its adapter is not in the attacked model: nothing hides its {called} there."
        for name, is_there in filters.items()
    ]


def _of_others(steps: Sequence[Step], forget: Sequence[Example], there: Sequence[Example], called: str) -> str:
    known = {content(row) for row in there}
    reasons = "; ".join(why_not(steps, [row for row in forget if content(row) not in known]))
    if there:
        gone = f"{len(forget) - len(there)} of {len(forget)} forgotten {called} are not attacked"
        return f"{gone}, as what the run trained into the model never met them: {reasons}."
    return (
        f"What the run trained into the attacked model never met the forgotten {called}: {reasons}. What follows does not show "
        "that they were forgotten, or stay so: it is how a model behaves that was not trained on them."
    )
