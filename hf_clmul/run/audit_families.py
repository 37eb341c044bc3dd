"""What an audit needs of a kind of model: the data that its attacks work with, and how a model is opened. The only part of the audit
that tells families apart."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import Example, load_examples
from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.protocol import AuditData, Subject
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.plan.columns import evaluated, groups
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Data, Recipe
from hf_clmul.run.audit_scope import filters_of, scope_of
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
    scope = scope_of(recipe, steps, forget, "examples")
    forget = scope.rows
    # An AUC is only as sure as its smaller side.
    held_out = fixed_sample(
        whole.get("held_out", []), max(recipe.evaluation.max_examples, len(forget)), derived_seed("held_out")
    )
    data = AuditData(forget, whole.get("retain", []), held_out, _unrelated(recipe))
    filters = any(filters_of(recipe, steps).values())

    def open_(folder: Path, is_run: bool) -> Subject:
        return open_text(
            folder, data, how, dtype=recipe.model.dtype, device=device, switchable=is_run and filters, samples=SAMPLES,
            trust_remote_code=recipe.model.trust_remote_code,
        )  # fmt: skip

    about = {**plain(how), "dtype": recipe.model.dtype, "filter": filters}
    return Prepared(data, open_, about, scope=scope.said, held=scope.held)


def _pictures(recipe: Recipe, steps: Sequence[Step], device: Any) -> Prepared:
    from hf_clmul.run.audit_pictures import pictures_of

    return pictures_of(recipe, steps, device)


def _unrelated(recipe: Recipe) -> list[Example]:
    """A small built-in set that is not in the recipe."""
    named = {source.path for source in recipe.data.values()}
    path = next((path for path in UNRELATED if path not in named), None)
    return [] if path is None else load_examples(Data(path=path), "unrelated")


FAMILIES: dict[str, Callable[[Recipe, Sequence[Step], Any], Prepared]] = {
    "causal_lm": _text,
    "diffusion": _pictures,
}
