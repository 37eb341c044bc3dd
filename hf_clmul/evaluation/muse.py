"""The suite `muse`: the six sides of MUSE (Shi et al., arXiv 2407.06460) as pure functions of rows (see `metrics`) and
of lists of records. Knows no models; how the rows must have been generated is in TOKENS.

    verbatim_memorization   mean ROUGE-L F1 of greedy continuations of forgotten passages; group `forget_verbatim`
    knowledge_memorization  mean ROUGE-L F1 of greedy answers to questions on them; group `forget_knowledge`
    utility_preservation    the same on what was to be kept; group `retain_knowledge`
    privleak                see `membership.privleak`
    scalability             how these change with the number of forgotten examples
    sustainability          how these change from one unlearn request to the next
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hf_clmul.data.encoding import example_format
from hf_clmul.evaluation.estimates import DRAWS, Estimate, gap_estimate, mean_estimate
from hf_clmul.evaluation.membership import privleak_of
from hf_clmul.evaluation.metrics import rouge_l_f1
from hf_clmul.evaluation.suite_result import Missing, SuiteResult, Tables, common, rows_of

TOKENS = {"forget_verbatim": 128, "forget_knowledge": 32, "retain_knowledge": 32}
"""The longest greedy generation in new tokens, by group. F1 counts what is said too much: other lengths, other
numbers."""

ROUGE = {
    "verbatim_memorization": "forget_verbatim",
    "knowledge_memorization": "forget_knowledge",
    "utility_preservation": "retain_knowledge",
}
NONE_OF = {
    "forget_verbatim": "no forgotten row is a passage (column `text`) that is longer than its prompt",
    "forget_knowledge": "no forgotten row has a question; name questions on the passages as "
    "`evaluation.groups: {forget_knowledge: DATA}`",
    "retain_knowledge": "nothing that stays has a question; name some as `evaluation.groups: {retain_knowledge: DATA}`",
}
PROMPT_TOKENS = 64
"""Of a passage: its beginning, at most half of it. Ours: MUSE's own passages come with their prompts."""


def groups_of(groups: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: Any) -> dict[str, list[Mapping[str, Any]]]:
    """The examples of each group of TOKENS, from those of a recipe: passages (plain `text`) to go on with, and questions. Groups of
    a recipe that have these very names are taken as they are."""
    forget, retain = (groups.get(name, ()) for name in ("forget", "retain"))
    passages = [row for row in forget if example_format(row) == ("text",)]
    found = {
        "forget_verbatim": [cut for row in passages if (cut := _cut(row, tokenizer)) is not None],
        "forget_knowledge": [row for row in forget if example_format(row) != ("text",)],
        "retain_knowledge": [row for row in retain if example_format(row) != ("text",)],
    }
    return {name: list(groups.get(name, rows)) for name, rows in found.items()}


def _cut(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any] | None:
    """The passage with its id: a scan knows by it what is left of a text that is not whole any more."""
    length = len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
    cut = verbatim_example(row["text"], tokenizer, min(PROMPT_TOKENS, length // 2)) if length > 1 else None
    return None if cut is None else {"id": row.get("id"), **cut}


def verbatim_example(text: str, tokenizer: Any, prompt_tokens: int) -> dict[str, str] | None:
    """A passage as prompt (its first `prompt_tokens` tokens) and completion (the next 128), to be continued by the
    model.

    None for a passage that ends with the prompt.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prompt, completion = ids[:prompt_tokens], ids[prompt_tokens : prompt_tokens + TOKENS["forget_verbatim"]]
    if not completion:
        return None
    return {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(completion)}


def muse(tables: Tables, reference: Tables | None = None, seed: int = 0, draws: int = DRAWS) -> SuiteResult:
    """The first four, and `METRIC_gap`, the distance to the reference's, over the examples that both have."""
    found = SuiteResult()
    for name, group in ROUGE.items():
        found.add(name, lambda group=group: _mean(tables, group, seed, draws))
        found.add(f"{name}_gap", lambda group=group: _gap(tables, reference, group, seed, draws))
    found.add("privleak", lambda: privleak_of(tables, reference, seed, draws))
    return found


Change = dict[str, Any]
"""{"points": [[x, value], ...], "change": last value minus first}"""


def scalability(records: Sequence[Mapping[str, Any]]) -> dict[str, Change]:
    """{metric: {"points": [[forgotten examples, value], ...] from few to many, "change"}} of runs of one method.

    A record is {"forget_examples": number, "metrics": {name: number or None}}. Runs of the same size, such as several
    seeds, are averaged. Points without a value are left out; `change` is None without both the smallest and the
    largest.
    """
    return _changes([(record["forget_examples"], record["metrics"]) for record in records])


def sustainability(records: Sequence[Mapping[str, Any]]) -> dict[str, Change]:
    """{metric: {"points": [[number of unlearn requests, value], ...], "change"}} of one stream.

    `records` [{"metrics": {name: number or None}}], the one before the first unlearn request first.
    """
    return _changes([(index, record["metrics"]) for index, record in enumerate(records)])


def _changes(measured: Sequence[tuple[int, Mapping[str, float | None]]]) -> dict[str, Change]:
    found: dict[str, dict[int, list[float]]] = {}
    for x, metrics in measured:
        for name, value in metrics.items():
            at = found.setdefault(name, defaultdict(list))
            if value is not None:
                at[x].append(value)
    ends = [end(x for x, _ in measured) for end in (min, max)] if measured else []
    return {
        name: _change({x: sum(values) / len(values) for x, values in sorted(at.items())}, ends)
        for name, at in found.items()
    }


def _change(at: dict[int, float], ends: Sequence[int]) -> Change:
    complete = ends[0] < ends[1] and all(end in at for end in ends)
    return {
        "points": [[x, value] for x, value in at.items()],
        "change": at[ends[1]] - at[ends[0]] if complete else None,
    }


def _mean(tables: Tables, group: str, seed: int, draws: int) -> Estimate:
    if not tables.get(group):
        raise Missing(NONE_OF[group])
    return _there(mean_estimate([rouge_l_f1(row) for row in rows_of(tables, group)], seed, draws), group)


def _gap(tables: Tables, reference: Tables | None, group: str, seed: int, draws: int) -> Estimate:
    if not tables.get(group):
        raise Missing(NONE_OF[group])
    models = common(tables, reference, [group])
    values = ([rouge_l_f1(row) for row in model[group]] for model in models)
    return _there(gap_estimate(*values, seed=seed, draws=draws), group)


def _there(found: Estimate | None, group: str) -> Estimate:
    if found is None:
        raise Missing(f"no answer of the group {group} has words of a-z and 0-9, which ROUGE-L compares")
    return found
