"""The measuring of a stage: each example once, with the adapters that serve its task, then groups and columns from that. Knows
the plan's columns and the suites; nothing of training or export."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from hf_clmul.evaluation.suite_table import SUITE_FUNCTIONS, Tables, blank, merged, results
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.hashes import digest
from hf_clmul.models import adapters
from hf_clmul.paths import atomic_write
from hf_clmul.plan.columns import Evaluated
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run import chunks
from hf_clmul.run.request import Run
from hf_clmul.run.results_schema import read_rows

Row = dict[str, Any]


def measure_stage(run: Run, step: Step | None, stage: dict[str, Any]) -> None:
    """Measures what is not measured yet of a stage; writes the rows, then the record that marks the stage as finished.

    What an earlier process measured in the same way is read back: a request that is added to a recipe asks for further
    examples only. So is what the stage before measured with the very weights that serve it now: a request that touches one
    task's adapter has no say in what others answer.
    """
    wanted, before = run.evaluated, run.folder.result(step)
    chosen = digest(wanted.plain())
    run.state.wait_for_everyone()  # or a slow rank would read what the main one is about to write, and wait for nobody
    again = before is not None and before["measured"] == run.measured
    if again and before["evaluated"] == chosen:
        return
    rows = {**_unchanged(run, step), **(_kept(run, step) if again else {})}
    place = run.folder.stage(step)
    for names, texts in _served(run, step, [text for text in wanted.rows if wanted.key(text) not in rows]).items():
        examples = [wanted.rows[text] for text in texts]
        weights = [stage.get("weights_sha256"), _weights(names, run.versions), names]
        size = chunks.BATCHES * run.how.batch_size if isinstance(run.how, Measuring) else None
        found = chunks.measured(
            examples,
            size,
            place,
            [run.measured, weights],
            partial(_measure, run, names, f"evaluating {stage['title']}"),
        )
        rows |= {wanted.key(text): row for text, row in zip(texts, found, strict=True)}
    if run.main:
        lines = [json.dumps({"group": wanted.group(text), "task": wanted.task_of.get(text), **rows[wanted.key(text)]}) + "\n"
                 for text in wanted.rows]  # fmt: skip
        atomic_write(place / "examples.jsonl", "".join(lines))
        first = rows if step is None else _kept(run, None)
        by_column = {f"tasks/{column.name}": wanted.texts(column) for column in wanted.columns}
        groups = _summary(run, wanted.groups, rows, first, run.recipe.evaluation.samples)
        record = {
            **stage, "groups": groups, "suites": _add_suites(run, groups, rows),
            "tasks": _columns(wanted, _summary(run, by_column, rows, first, 0)),
            "adapters": run.versions, "measured": run.measured, "evaluated": chosen,
        }  # fmt: skip
        atomic_write(place / "result.json", json.dumps(record, indent=1) + "\n")
        chunks.forget(place)
    run.state.wait_for_everyone()


def _measure(run: Run, names: Sequence[str], title: str, examples: Sequence[Row]) -> list[Row]:
    """With these adapters. Where adapters train, the model without them is the base that reads what was generated."""
    with adapters.serving(run.model, names) as model:
        found = run.loaded.measure(model, examples, run.how, title)
    if run.recipe.adapter is not None and run.recipe.family == "causal_lm":
        with adapters.serving(run.model, ()) as base:
            run.loaded.score_generated(base, examples, found, run.how, f"{title}, base")
    return found


def _add_suites(run: Run, groups: dict[str, Any], rows: Mapping[str, Row]) -> dict[str, Any]:
    """Puts the values of further suites into the groups; returns those that are of no single group."""
    tables = {name: [rows[key] for key in map(run.evaluated.key, texts) if key in rows]
              for name, texts in run.evaluated.groups.items()}  # fmt: skip
    found = results(further_suites(run.recipe), tables, run.reference_rows)
    for group, entry in found["groups"].items():
        groups[group] = merged(groups[group], entry)
    return found["suites"]


def further_suites(recipe: Recipe) -> list[str]:
    """Those of tables beyond `basic`, which every stage has."""
    return [name for name in recipe.evaluation.suites if name in SUITE_FUNCTIONS and name != "basic"]


def compared(recipe: Recipe, stage: Mapping[str, Any], tables: Tables, reference: Tables | None) -> dict[str, Any]:
    """The record of a stage with what its suites say now that there is a reference. A number that is there stays where none
    can be computed any more, as of texts that were blanked since."""
    found = results(further_suites(recipe), tables, reference)["suites"]
    before = stage.get("suites", {})
    return {
        **stage, "suites": {**before, **{name: merged(before.get(name, blank()), entry) for name, entry in found.items()}}
    }  # fmt: skip


def _served(run: Run, step: Step | None, texts: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """The examples by the adapters that answer."""
    found: dict[tuple[str, ...], list[str]] = {}
    for text in texts:
        names = tuple(adapters.TASK + name for name in _serves(run, step, text))
        found.setdefault(names, []).append(text)
    return found


def _serves(run: Run, step: Step | None, text: str) -> tuple[str, ...]:
    """The adapters that answer an example: of an isolated task its own, else the stack; none before the first task."""
    stack, own = ((), {}) if step is None else (step.stack, step.own)
    return own.get(run.evaluated.task_of.get(text, ""), stack)


def _unchanged(run: Run, step: Step | None) -> dict[str, Row]:
    """What the stage before measured with the same adapters, the same to the bit."""
    if step is None:
        return {}
    last = run.steps[step.index - 1] if step.index else None
    before = run.folder.result(last)
    if before is None or before["measured"] != run.measured:
        return {}
    versions, rows = before["adapters"], _kept(run, last)
    same = {
        run.evaluated.key(text)
        for text in run.evaluated.rows
        if _weights(_serves(run, last, text), versions) == _weights(_serves(run, step, text), run.versions)
    }
    return {key: row for key, row in rows.items() if key in same}


def _weights(names: Sequence[str], versions: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """What answers with these adapters; without any it is the whole model, which may be trained itself."""
    return [(name, versions.get(name)) for name in names or ("",)]


def _summary(
    run: Run, sets: Mapping[str, list[str]], rows: Mapping[str, Row], first: Mapping[str, Row], samples: int
) -> dict[str, Any]:
    now, before = (
        {name: [some[key] for key in map(run.evaluated.key, texts) if key in some] for name, texts in sets.items()}
        for some in (rows, first)
    )
    return run.loaded.summary(now, before, samples)


def _columns(wanted: Evaluated, found: Mapping[str, Any]) -> dict[str, Any]:
    """{column: {"examples", "metrics"}}, of all columns at every stage."""
    return {
        column.name: {
            "examples": found[f"tasks/{column.name}"]["examples"],
            "rows": wanted.digest(column),
            "metrics": found[f"tasks/{column.name}"]["metrics"],
        }
        for column in wanted.columns
    }


def _kept(run: Run, step: Step | None) -> dict[str, Row]:
    """What an earlier process measured, by key."""
    place = run.folder.stage(step)
    lines = read_rows(place) if (place / "examples.jsonl").is_file() else []
    return {f"{line.pop('task') or line['group']}/{line['id']}": _without_group(line) for line in lines}


def _without_group(line: Row) -> Row:
    return {key: value for key, value in line.items() if key != "group"}
