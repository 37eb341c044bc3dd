"""The suites of language models as pure functions of tables: rows of groups in, values with counts, intervals and reasons out.
One line in `SUITE_FUNCTIONS` a suite. It knows nothing of models or files, and imports nothing heavy."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.evaluation import membership, metrics
from hf_clmul.evaluation import muse as sides_of_muse
from hf_clmul.evaluation.estimates import mean_estimate
from hf_clmul.evaluation.metrics import METRICS, Row
from hf_clmul.evaluation.stream import METRICS as STREAM_METRICS
from hf_clmul.evaluation.stream import stream_metrics
from hf_clmul.evaluation.suite_result import SuiteResult

Tables = Mapping[str, Sequence[Row]]
Entry = dict[str, dict[str, Any]]
"""{"metrics": {name: number or None}, "counts": {name: n}, "intervals": {name: [low, high]}, "absent": {name: reason}}"""
Results = dict[str, dict[str, Entry]]
"""{"groups": {group: Entry}, "suites": {suite: Entry}}; the second has what is of no single group."""

FORGET, RETAIN, GENERAL = "forget", "retain", ("real_authors", "world_facts")
_COLUMNS = "column `paraphrased_answer`", "columns `paraphrased_answer` and `perturbed_answers`"
NO_PARAPHRASE = f"no example has a paraphrased answer ({_COLUMNS[0]})"
NO_PAIR = f"no example has both a paraphrased answer and wrong ones ({_COLUMNS[1]})"
NO_WRONG = "no example has wrong answers (column `perturbed_answers`)"
NO_TOKENS = "no answer has a token beside its end"
NOT_FINITE = "the model gives numbers that are not finite"
REASONS: dict[str, str] = {
    "paraphrase_probability": NO_PARAPHRASE,
    "question_probability": "no example has a paraphrased question (column `paraphrased_question`)",
    "normalised_probability": NO_WRONG,
    "extraction_strength": NO_TOKENS,
    "exact_memorization": NO_TOKENS,
    "rouge_l_recall": "no answer has words of a-z or 0-9, which ROUGE compares",
    "base_perplexity": "no base model has read what was generated: a run has one at hand where it trains an adapter and an "
    "answer is more than its end; `hf-clmul evaluate` loads it",
}
NO_STREAM = "there is nothing to average, or a score that it needs was not measured: {}"
_WITHOUT = "group `{}` was not measured: name its data under `evaluation.groups`"


@dataclass(frozen=True)
class Measure:
    """A metric as a mean over rows; `shown` turns the mean, and its interval, into what is reported."""

    of_row: Callable[[Row], float | None]
    shown: Callable[[float], float] = float


def results(suites: Sequence[str], tables: Tables, reference: Tables | None = None) -> Results:
    """All values of the named suites. `reference` are the tables of a model that never saw the forget group."""
    found: Results = {"groups": {}, "suites": {}}
    measured = {group: rows for group, rows in tables.items() if rows}
    for name in suites:
        of_suite = SUITE_FUNCTIONS[name](measured, reference)
        for group, entry in of_suite["groups"].items():
            found["groups"][group] = merged(found["groups"].get(group, blank()), entry)
        found["suites"] |= of_suite["suites"]
    return found


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two entries of a group as one; where both have a metric, a number wins over none, then the second."""
    whole = {key: {**first.get(key, {}), **second[key]} for key in blank()}
    for name, value in first.get("metrics", {}).items():
        if value is not None and second["metrics"].get(name, value) is None:
            for key in ("metrics", "counts", "intervals"):
                whole[key] |= {name: first[key][name]} if name in first[key] else {}
    whole["absent"] = {name: why for name, why in whole["absent"].items() if whole["metrics"][name] is None}
    return {**first, **whole}


def blank() -> Entry:
    return {"metrics": {}, "counts": {}, "intervals": {}, "absent": {}}


def entry_of(measures: Mapping[str, Measure | Callable[[Row], float | None]], rows: Sequence[Row]) -> Entry:
    """The mean of each metric over the rows that have the data for it; absent, with the reason, where none has."""
    entry = blank()
    for name, measure in measures.items():
        measure = measure if isinstance(measure, Measure) else Measure(measure)
        values = [measure.of_row(row) for row in rows]
        if any(value is not None and not math.isfinite(value) for value in values):
            put_absent(entry, name, NOT_FINITE)
            continue
        estimate = mean_estimate(values)
        if estimate is None:
            put_absent(entry, name, REASONS.get(name, NO_PAIR))
            continue
        entry["metrics"][name], entry["counts"][name] = measure.shown(estimate.value), estimate.n
        if estimate.low is not None and estimate.high is not None:
            entry["intervals"][name] = [measure.shown(estimate.low), measure.shown(estimate.high)]
    return entry


def put(entry: Entry, name: str, value: float, count: int) -> None:
    """Adds a value without an interval."""
    entry["metrics"][name], entry["counts"][name] = value, count


def put_absent(entry: Entry, name: str, why: str) -> None:
    """Adds a metric that has no value: never a zero."""
    entry["metrics"][name], entry["absent"][name] = None, why


# ---- basic -----------------------------------------------------------------------------------------------------------


def basic(tables: Tables, reference: Tables | None = None) -> Results:
    return {"groups": {group: entry_of(_basic_of(group), rows) for group, rows in tables.items()}, "suites": {}}


def _basic_of(group: str) -> dict[str, Any]:
    ratio = metrics.forget_truth_ratio if group == FORGET else metrics.kept_truth_ratio
    return {**METRICS, "truth_ratio": ratio, "base_perplexity": BASE_PERPLEXITY}


BASE_PERPLEXITY = Measure(metrics.generated_nll, math.exp)


# ---- tofu ------------------------------------------------------------------------------------------------------------


def tofu(tables: Tables, reference: Tables | None = None) -> Results:
    """TOFU (arXiv 2401.06121) and what OpenUnlearning (arXiv 2506.12618) adds to it: probability, ROUGE-L recall, the three
    aggregates of the truth ratio, extraction strength and exact memorization of each group; of all, model utility and
    forget quality.

    Questions of general knowledge (`GENERAL`) have no paraphrased answer: there the answer itself stands against the wrong
    ones, and the probability of model utility is the normalised one.
    """
    groups = {group: entry_of(_tofu_of(group), _as_tofu_reads(group, rows)) for group, rows in tables.items()}
    whole = blank()
    _add_utility(whole, groups, tables)
    _add_quality(whole, tables, reference)
    return {"groups": groups, "suites": {"tofu": whole}}


def _tofu_of(group: str) -> dict[str, Any]:
    ratio = metrics.forget_truth_ratio if group == FORGET else metrics.kept_truth_ratio
    return {
        "answer_probability": metrics.answer_probability,
        "normalised_probability": metrics.normalised_probability,
        "paraphrase_probability": metrics.paraphrase_probability,
        "rouge_l_recall": metrics.rouge_l_recall,
        "truth_ratio": ratio,
        "truth_ratio_near_one": metrics.forget_truth_ratio,
        "truth_ratio_truth_first": metrics.kept_truth_ratio,
        "truth_share": metrics.truth_share,
        "extraction_strength": metrics.extraction_strength,
        "exact_memorization": metrics.exact_memorization,
        "question_probability": metrics.question_probability,
    }


def _as_tofu_reads(group: str, rows: Sequence[Row]) -> Sequence[Row]:
    if group not in GENERAL:
        return rows
    return [row if row["paraphrase_logps"] is not None else {**row, "paraphrase_logps": row["logps"]} for row in rows]


def _add_utility(whole: Entry, groups: Mapping[str, Entry], tables: Tables) -> None:
    nine: list[float] = []
    for group in (RETAIN, *GENERAL):
        if group not in groups:
            why = "nothing was learned that stays, so that there is no group `retain`"
            return put_absent(whole, "model_utility", why if group == RETAIN else _WITHOUT.format(group))
        probability = "normalised_probability" if group in GENERAL else "answer_probability"
        for name in (probability, "rouge_l_recall", "truth_ratio"):
            value = groups[group]["metrics"][name]
            if value is None:
                return put_absent(whole, "model_utility", f"{name} of `{group}`: {groups[group]['absent'][name]}")
            nine.append(value)
    put(whole, "model_utility", metrics.model_utility(nine), sum(len(tables[group]) for group in (RETAIN, *GENERAL)))


def _add_quality(whole: Entry, tables: Tables, reference: Tables | None) -> None:
    name = "forget_quality"
    if FORGET not in tables:
        return put_absent(whole, name, "nothing is forgotten")
    if reference is None or not reference.get(FORGET):
        return put_absent(
            whole, name, "it compares with a model that never saw the forget group, and no such reference is at hand"
        )
    own, other = ([r for r in map(metrics.truth_ratio, t[FORGET]) if r is not None] for t in (tables, reference))
    if not own or not other:
        return put_absent(whole, name, NO_PAIR if not own else f"of the reference, {NO_PAIR}")
    if any(math.isnan(ratio) for ratio in (*own, *other)):
        return put_absent(whole, name, NOT_FINITE)
    put(whole, name, metrics.forget_quality(own, other), len(own))


# ---- of no single group ----------------------------------------------------------------------------------------------


def mia(tables: Tables, reference: Tables | None = None) -> Results:
    """See `membership.mia`."""
    return {"groups": {}, "suites": {"mia": whole_entry(membership.mia(tables, reference))}}


def muse(tables: Tables, reference: Tables | None = None) -> Results:
    """See `muse.muse`. Of rows that were generated with the lengths that it asks for."""
    return {"groups": {}, "suites": {"muse": whole_entry(sides_of_muse.muse(tables, reference))}}


def whole_entry(found: SuiteResult) -> Entry:
    """What a suite found, as a record has it."""
    entry = blank()
    for name, estimate in found.metrics.items():
        put(entry, name, estimate.value, estimate.n)
        if estimate.low is not None and estimate.high is not None:
            entry["intervals"][name] = [estimate.low, estimate.high]
    for name, why in found.absent.items():
        put_absent(entry, name, why)
    return entry


def continual(record: Mapping[str, Any]) -> Entry:
    """The metrics of the matrix R (see `stream`), from the record's `stream`. They are of tasks and stages, which no interval
    over examples is about."""
    entry = blank()
    for name, value in stream_metrics(record).items():
        if value is None:
            put_absent(entry, name, NO_STREAM.format(STREAM_METRICS[name].formula))
        else:
            put(entry, name, value, len(record["columns"]))
    return entry


SUITE_FUNCTIONS: dict[str, Callable[[Tables, Tables | None], Results]] = {
    "basic": basic, "tofu": tofu, "mia": mia, "muse": muse
}  # fmt: skip
"""Of tables; `continual` is of the record of a run, and lm_eval measures for itself."""
