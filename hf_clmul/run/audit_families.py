"""What an audit needs of a kind of model: the data that its attacks work with, and how a model is opened. The only part of the audit
that tells families apart."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import Example, content, load_examples
from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.protocol import AuditData, Subject
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.plan.columns import evaluated, groups
from hf_clmul.plan.exported import exported, in_model, why_not
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Data, Recipe
from hf_clmul.report.claims import FILTER, MEANINGS
from hf_clmul.run.measuring import measuring, plain

UNRELATED = ("builtin:word_problems", "builtin:table_bookings", "builtin:support_intents")
SAMPLES = 3


@dataclass(frozen=True)
class Prepared:
    """`open(folder, is_run)` gives a fresh model, of the run or of its reference; `about` is plain data on what else its
    figures depend on; `notes` are {attack: how its summary goes on}. `scope` are sentences on what the attacked model holds of
    what was to be forgotten, and `held` is whether it holds any of it."""

    data: AuditData
    open: Callable[[Path, bool], Subject]
    about: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)
    scope: Sequence[str] = ()
    held: bool = True


def prepared(recipe: Recipe, steps: Sequence[Step], device: Any) -> Prepared:
    """Raises RunError where nothing was to be forgotten, or the family has no audit."""
    if recipe.family not in FAMILIES:
        raise RunError(
            f"there is no audit of models of the family {recipe.family}; there is one of {', '.join(FAMILIES)}."
        )
    return FAMILIES[recipe.family](recipe, steps, device)


def _text(recipe: Recipe, steps: Sequence[Step], device: Any) -> Prepared:
    from hf_clmul.evaluation.audit.subject import open_text

    whole, how = groups(recipe, steps), replace(measuring(recipe), gradient_norms=False)
    found = evaluated(recipe, steps, whole)
    forget = [found.rows[text] for text in found.groups.get("forget", ())]
    if not forget:
        raise RunError(
            "the run forgets nothing, so that there is nothing to bring back: no unlearn request, no evaluation.forget."
        )
    there = in_model(recipe, steps, forget)
    scope = _scope(steps, forget, there, hidden := _filters(recipe, steps))
    forget = there or forget
    # An AUC is only as sure as its smaller side.
    held_out = fixed_sample(
        whole.get("held_out", []), max(recipe.evaluation.max_examples, len(forget)), derived_seed("held_out")
    )
    data = AuditData(forget, whole.get("retain", []), held_out, _unrelated(recipe))
    filters = any(hidden.values())

    def open_(folder: Path, is_run: bool) -> Subject:
        return open_text(
            folder, data, how, dtype=recipe.model.dtype, device=device, switchable=is_run and filters, samples=SAMPLES,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip

    return Prepared(
        data, open_, {**plain(how), "dtype": recipe.model.dtype, "filter": filters}, scope=scope, held=bool(there)
    )


def _filters(recipe: Recipe, steps: Sequence[Step]) -> dict[str, bool]:
    """{filter: whether its adapter is in the model}"""
    parts = exported(recipe, steps) if recipe.adapter is not None else ()
    return {step.what: any(job.adapter in parts for job in step.jobs) for step in steps if step.how == FILTER}


def _scope(
    steps: Sequence[Step], forget: Sequence[Example], there: Sequence[Example], filters: Mapping[str, bool]
) -> list[str]:
    said = []
    for name, is_there in filters.items():
        if is_there:
            said.append(f"{name} is a filter: {MEANINGS[FILTER]}.")
        else:
            said.append(
                f"{name} is a filter, and its adapter is not in the attacked model: nothing hides its examples there."
            )
    if len(there) == len(forget):
        return said
    known = {content(row) for row in there}
    reasons = "; ".join(why_not(steps, [row for row in forget if content(row) not in known]))
    if there:
        gone = f"{len(forget) - len(there)} of {len(forget)} forgotten examples are not attacked"
        said.append(f"{gone}, as what the run trained into the model never met them: {reasons}.")
    else:
        said.append(
            f"What the run trained into the attacked model never met the forgotten examples: {reasons}. What follows does not show "
            "that they were forgotten, or stay so: it is how a model behaves that was not trained on them."
        )
    return said


def _pictures(recipe: Recipe, steps: Sequence[Step], device: Any) -> Prepared:
    from hf_clmul.run.audit_pictures import pictures_of

    return Prepared(*pictures_of(recipe, steps, device))


def _unrelated(recipe: Recipe) -> list[Example]:
    """A small built-in set that is not in the recipe."""
    named = {source.path for source in recipe.data.values()}
    path = next((path for path in UNRELATED if path not in named), None)
    return [] if path is None else load_examples(Data(path=path), "unrelated")


FAMILIES: dict[str, Callable[[Recipe, Sequence[Step], Any], Prepared]] = {
    "causal_lm": _text,
    "diffusion": _pictures,
}
