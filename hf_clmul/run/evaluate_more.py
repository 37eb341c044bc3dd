"""The suites of `hf-clmul evaluate` that are no function of its tables alone: `muse` generates with lengths of its own, of the
reference too; `continual` is what the record of a run says; `lm_eval` has another package measure. They change no model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hf_clmul.data.sources import content
from hf_clmul.errors import AGAIN, RunError
from hf_clmul.evaluation.muse import TOKENS, groups_of
from hf_clmul.evaluation.suite_table import Entry, Results, Tables, blank, continual, put_absent, results
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.plan.columns import Evaluated
from hf_clmul.recipe.schema import Recipe

Measure = Callable[[Any, Evaluated, Measuring], dict[str, list[dict[str, Any]]]]
"""(subject, examples by group, how) -> rows by group"""


def muse(
    measure: Measure, subject: Any, other: Any | None, wanted: Evaluated, how: Measuring, tables: Tables,
    reference: Tables | None,
) -> Results:  # fmt: skip
    """The suite `muse`. `tables` and `reference` are the usual rows, which PrivLeak reads; `other` is the reference's model."""
    groups = {name: [wanted.rows[text] for text in texts] for name, texts in wanted.groups.items()}
    asked = groups_of(groups, subject.loaded.tokenizer)

    def measured(model: Any, usual: Tables) -> Tables:
        found = {name: usual[name] for name in ("forget", "held_out") if name in usual}
        for length in sorted(set(TOKENS.values())):
            some = {name: rows for name, rows in asked.items() if rows and TOKENS[name] == length}
            if some:
                short = replace(how, max_new_tokens=length, gradient_norms=False)
                found |= measure(model, _as_evaluated(some), short)
        return found

    own = measured(subject, tables)
    if other is None or reference is None:
        return results(["muse"], own)
    subject.release()  # one model in memory at a time
    return results(["muse"], own, measured(other, reference))


def _as_evaluated(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> Evaluated:
    rows = {content(row): row for of_group in groups.values() for row in of_group}
    return Evaluated(rows, {}, {name: [content(row) for row in of_group] for name, of_group in groups.items()}, [])


def of_stream(record: Mapping[str, Any], where: str) -> Results:
    """The suite `continual`, from the record of a run. Raises RunError for one of an earlier version, which has no stream."""
    if not record.get("stream"):
        raise RunError(f"{where} has no `stream`: an earlier version wrote it. {AGAIN}")
    return {"groups": {}, "suites": {"continual": continual(record["stream"])}}


def check_lm_eval(recipe: Recipe) -> None:
    """Raises RunError where the harness is not installed, or is asked for nothing: before anything is measured."""
    from hf_clmul.evaluation.lm_eval import harness

    harness()
    if not recipe.evaluation.lm_eval.tasks:
        raise RunError(
            "the suite lm_eval has no tasks. Name some, such as evaluation.lm_eval.tasks=[mmlu,wmdp]; `lm-eval ls tasks` lists "
            "all of them."
        )


def of_harness(recipe: Recipe, model: Any, tokenizer: Any) -> tuple[Results, dict[str, Any] | None]:
    """The suite `lm_eval`, and the record of the harness's answer; nothing and None on ranks other than the first."""
    from hf_clmul.evaluation.lm_eval import lm_eval

    asked = recipe.evaluation.lm_eval.model_dump()
    found = lm_eval(model, tokenizer, asked.pop("tasks"), seed=recipe.seed, **asked)
    if found is None:
        return {"groups": {}, "suites": {}}, None
    return {"groups": {}, "suites": {"lm_eval": _entry_of_tasks(found["tasks"])}}, found


def _entry_of_tasks(tasks: Mapping[str, Any]) -> Entry:
    """TASK/METRIC, with the harness's counts and intervals."""
    entry = blank()
    for task, found in tasks.items():
        if not found["metrics"]:
            put_absent(entry, task, "the harness gives no number for it")
        for metric, estimate in found["metrics"].items():
            name = f"{task}/{metric}"
            entry["metrics"][name] = estimate["value"]
            if estimate["n"] is not None:
                entry["counts"][name] = estimate["n"]
            if estimate["low"] is not None:
                entry["intervals"][name] = [estimate["low"], estimate["high"]]
    return entry
