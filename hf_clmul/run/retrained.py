"""References as run folders: making them, once, and reading them: figures over seeds for the results record, rows of single examples
for what pairs them. Knows run folders and the plan's groups; nothing of models."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_clmul.data.sources import Example
from hf_clmul.errors import RunError
from hf_clmul.evaluation.metrics import Row
from hf_clmul.evaluation.suites import shown
from hf_clmul.ledger.scan_text import ERASED
from hf_clmul.plan.columns import Evaluated
from hf_clmul.recipe.schema import Recipe
from hf_clmul.recipe.sources import AUTO
from hf_clmul.report.claims import EXACT
from hf_clmul.run.comparison import examples
from hf_clmul.run.folder import COMPLETE
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.reference import (
    default_seed,
    fingerprint,
    found_references,
    is_complete,
    reference_recipe,
    references_folder,
)
from hf_clmul.run.results import reference_of
from hf_clmul.run.results_schema import read_record

log = logging.getLogger(__name__)


def make_references(
    recipe: Recipe, output: Path | None = None, seed: int | None = None, seeds: int = 1
) -> Iterator[tuple[Path, bool]]:
    """Trains the reference with `seeds` seeds, from `seed` on, each once: (run folder, whether it was there already).

    The same call continues what was stopped. Raises RecipeError where there is no reference, and as `run_recipe`.
    """
    from hf_clmul.run.runner import run_recipe

    first = default_seed(recipe) if seed is None else seed
    for own in range(first, first + seeds):
        with quiet_libraries():
            place, derived = references_folder() / fingerprint(recipe, own), reference_recipe(recipe, own)
        if output is not None:
            place = output if seeds == 1 else output / f"seed-{own}"
        there = is_complete(place)
        if not there or output is not None:  # who names a folder wants to hear of other settings in it
            run_recipe(derived, place)
        yield place, there


def reference_rows(folder: Path) -> dict[str, list[Row]]:
    """The rows of single examples after the last request of a reference, by group. Raises RunError for a folder that is no complete
    run, or of another version."""
    _record(folder)
    return examples(folder)


def reference_figures(folders: Sequence[Path], chosen: Evaluated) -> dict[str, Any]:
    """{"groups": {group: {metric: {"mean", "std", "n"}}}, "source"} over references of several seeds; n counts them, and of one
    alone the standard deviation is null. A group that another set of examples was measured for is left out.

    Raises RunError as `reference_rows`, and for references that measured other forgotten examples than `chosen`.
    """
    records = [_record(folder) for folder in folders]
    same = [alike(folder, chosen) for folder in folders]
    found: dict[str, dict[str, Any]] = {}
    for group in (group for group in chosen.groups if all(group in each for each in same)):
        last = [record["stages"][-1]["groups"][group]["metrics"] for record in records]
        for metric in last[0]:
            values = [metrics[metric] for metrics in last if metrics.get(metric) is not None]
            if values:
                spread = stdev(values) if len(values) > 1 else None
                found.setdefault(group, {})[metric] = {"mean": mean(values), "std": spread, "n": len(values)}
    return {"groups": found, "source": _source(records)}


def reference_for(recipe: Recipe, chosen: Evaluated) -> dict[str, Any] | None:
    """What the results record shows of the reference; see `references`."""
    return references(recipe, chosen)[0]


def references(recipe: Recipe, chosen: Evaluated) -> tuple[dict[str, Any] | None, dict[str, list[Row]] | None]:
    """Figures of the reference for the results record, and its rows for suites that compare single examples: of the file or
    the run folder that `evaluation.reference` names, else of what was trained by `hf-clmul reference` (rows: its first seed).
    None if nothing was; a file has no rows.

    Raises RecipeError for a file that cannot be used, RunError for such a folder.
    """
    named = recipe.evaluation.reference
    if named is not None and named != AUTO and not Path(named).is_dir():
        return reference_of(recipe), None
    folders = found_references(recipe)
    if not folders:
        return None, None
    return reference_figures(folders, chosen), reference_rows(folders[0]) if recipe.family == "causal_lm" else None


def _record(folder: Path) -> dict[str, Any]:
    """The record of a complete run. Raises RunError for anything else."""
    again = "Train it with `hf-clmul reference`, which continues what was stopped, or set `evaluation.reference: null`."
    if not (folder / "results.json").is_file():
        raise RunError(f"{folder} is no reference: there is no results.json in it. {again}")
    record = read_record(folder, f"Train the reference again with this version, or use the one that made it. {again}")
    if record["status"] != COMPLETE or not record["stages"]:
        raise RunError(f"{folder}: the reference was not trained to its end (status {record['status']!r}). {again}")
    return record


def check_never_saw(folder: Path) -> None:
    """Raises RunError for a run that is known to have learned what it unlearned: such a one is no measure of forgetting. What a
    folder that is no run has seen is not known."""
    stages = read_record(folder)["stages"] if (folder / "results.json").is_file() else []
    if seen := [stage["stage"] for stage in stages if stage["kind"] == "unlearn" and stage["how"] not in EXACT]:
        raise RunError(
            f"the reference {folder} has seen what it unlearned ({', '.join(seen)}: not exact), so that it is no model that never saw "
            "the data. Give one that was trained without them, such as `hf-clmul reference RECIPE` makes."
        )


def alike(folder: Path, chosen: Evaluated) -> set[str]:
    """The groups of which the reference measured the very examples. Raises RunError if the forget group is none of them."""
    rows = reference_rows(folder)
    alike = set()
    for group, contents in chosen.groups.items():
        wanted = [chosen.rows[text] for text in contents]
        if odd := _difference(wanted, rows.get(group, [])):
            if group == "forget":
                raise RunError(
                    f"{folder} is a reference of other data: {odd}. Train one of this recipe with `hf-clmul reference RECIPE`."
                )
            log.warning("%s: its group %r is of other examples and not compared: %s", folder, group, odd)
        else:
            alike.add(group)
    return alike


def _difference(wanted: Sequence[Example], rows: Sequence[Row]) -> str | None:
    """What tells the examples of a run from the rows of a reference; None if they are the same ones."""
    by_id = {str(row["id"]): row for row in rows}
    mine = {str(example["id"]): example for example in wanted}
    if missing := [name for name in mine if name not in by_id]:
        return f"{len(missing)} of the run's {len(mine)} examples were not measured, such as {missing[0]!r}"
    if extra := [name for name in by_id if name not in mine]:
        return f"it measured {len(extra)} examples that are none of the run's, such as {extra[0]!r}"
    odd = next((name for name, example in mine.items() if _other_text(example, by_id[name])), None)
    return None if odd is None else f"its example {odd!r} has another text"


def _other_text(example: Mapping[str, Any], row: Row) -> bool:
    """Texts of a redacted reference are blank, conversations are cut before they are measured, and pictures have none."""
    if "messages" in example or row.get("answer") in (None, ERASED):
        return False
    return shown(example) != (row["question"], row["answer"])


def _source(records: Sequence[Mapping[str, Any]]) -> str:
    """Without a folder of this machine: records are shared."""
    seeds = ", ".join(str(record["seed"]) for record in records)
    made = max(str(record["finished"])[:10] for record in records)
    name, number = records[0]["name"], records[0]["versions"]["hf_clmul"]
    return f"{name}, seed{'s' * (len(records) > 1)} {seeds}, trained {made} by hf_clmul {number}"
