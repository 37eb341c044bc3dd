"""From the record of a run to the sentences, key figures and checks of its report. Every number in them is
the record's or follows from it; they say nothing that is not in the record."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.report.claims import EXACT, claims, explained
from hf_clmul.report.headlines import Measured, headline, listed
from hf_clmul.report.tables import (
    DASH,
    FORGET,
    RETAIN,
    format_gap,
    format_reference,
    format_value,
    gap_to_reference,
    group_title,
    metric_in_text,
    metric_value,
    reference_entry,
)

Stage = Mapping[str, Any]
_MANY_REQUESTS = 4
_BUILTIN = "builtin:"
NEAR_FROM = {"recipe": "the recipe", "text embeddings": "similarity of the pipeline's text embeddings"}
"""Who chose the near neighbours, as the record names it."""


@dataclass(frozen=True)
class KeyFigure:
    """A number to see first, and what to know about it."""

    label: str
    value: str
    note: str
    group: str | None = None


@dataclass(frozen=True)
class Check:
    """One bound and whether it was kept; `met` is None where the record does not allow a verdict."""

    title: str
    rule: str
    met: bool | None
    found: str


def request_name(stage: Stage) -> str:
    """The name that the recipe gives: "two-persons" for the stage "01-unlearn-two-persons"."""
    return re.sub(r"^\d+-(learn|unlearn)-", "", stage["stage"])


def model_name(path: str) -> str:
    """The last part of a Hub id or path; of what is built in, its name."""
    return path.removeprefix(_BUILTIN) if path.startswith(_BUILTIN) else path.rstrip("/").rsplit("/", 1)[-1]


def summary(results: Mapping[str, Any]) -> list[str]:
    """What was asked, what came of it, and how far to trust it, as sentences."""
    said = headline(results)
    sentences = [_about_model(results["model"], said.network)]
    requests = _requests(results)
    if not requests:
        return [*sentences, "No request has been finished yet."]
    if len(requests) > _MANY_REQUESTS:
        learned = sum(stage["kind"] == "learn" for _, stage in requests)
        sentences.append(f"It carried out {learned} learn and {len(requests) - learned} unlearn requests.")
        last = {(stage["kind"], stage["how"] in EXACT): i for i, (_, stage) in enumerate(requests)}
        requests = [requests[i] for i in sorted(last.values())]
        sentences.append("The last of each kind:")
    about = {"learn": _about_learning, "unlearn": _about_unlearning}
    metrics = {"learn": (said.learned, said.learned), "unlearn": (said.forgotten, said.kept)}
    sentences += [
        _with_changes(about[stage["kind"]](stage), before, stage, *metrics[stage["kind"]]) for before, stage in requests
    ]
    unlearned = _last(requests, "unlearn")
    if unlearned is not None:
        sentences.append(_about_reference(results))
        sentences += [explained(claim, results["model"].get("family") == "diffusion") for claim in claims(results)]
    return sentences


def key_figures(results: Mapping[str, Any]) -> list[KeyFigure]:
    """Up to four numbers: what was forgotten (or learned), what was kept, at what price, how long."""
    figures, said = [], headline(results)
    if _last(_requests(results), "unlearn") is not None:
        for figure in said.figures:
            label, value, note = figure.of(_measured(results, figure.group, figure.metrics))
            figures.append(KeyFigure(label, value, note, figure.group))
    elif _requests(results):
        first, last = results["stages"][0], results["stages"][-1]
        metric = said.learned[0]
        value = " → ".join(format_value(metric_value(stage, RETAIN, metric)) for stage in (first, last))
        note = "before the first and after the last request"
        figures.append(KeyFigure(f"Learned: {metric_in_text(metric)}", value, note))
    hardware = results["hardware"]
    peak = format_bytes(results["peak_memory_bytes"])
    note = f"{hardware['device']}, {hardware['cores']} cores, peak {peak}"
    return [*figures, KeyFigure("Time", format_seconds(results["seconds"]), note)]


def checks(results: Mapping[str, Any]) -> list[Check]:
    """Verdicts on the last unlearn requests, from before them to the end of the run; none without one."""
    if _last(_requests(results), "unlearn") is None:
        return []
    found = []
    for bound in headline(results).bounds:
        met, told = bound.judge(_measured(results, bound.group, bound.metrics), bound.limit)
        found.append(Check(bound.title, bound.rule, met, told))
    return found


def near_neighbours(results: Mapping[str, Any]) -> str | None:
    """Which near neighbours IRA near is of, and who chose them; None of runs that have none."""
    judged = results.get("judged") or {}
    if not judged.get("near"):
        return None
    similar = judged.get("similarity") or {}
    names = [f"{name} ({similar[name]:.3f})" if name in similar else name for name in judged["near"]]
    source = judged.get("near_from")
    brackets = ", which is in brackets" if similar else ""
    return f"Near neighbours: {listed(names)}; chosen by {NEAR_FROM.get(source, source or DASH)}{brackets}."


def format_seconds(seconds: float | None) -> str:
    """Seconds as h, min and s; a dash for None."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def format_bytes(count: float | None) -> str:
    """Bytes as MiB or GiB; a dash for None."""
    if count is None:
        return DASH
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _requests(results: Mapping[str, Any]) -> list[tuple[Stage, Stage]]:
    """Each finished request as (stage before it, stage after it)."""
    stages = results["stages"]
    return list(zip(stages, stages[1:], strict=False))


def _last(requests: list[tuple[Stage, Stage]], kind: str) -> tuple[Stage, Stage] | None:
    return next((pair for pair in reversed(requests) if pair[1]["kind"] == kind), None)


def _before_unlearning(results: Mapping[str, Any]) -> Stage:
    """The stage before the last unlearn request, or before the first of several with nothing learned between them: what one
    loses the next must not hide."""
    stages = results["stages"]
    at = max(i for i, stage in enumerate(stages) if stage["kind"] == "unlearn")
    while stages[at]["kind"] == "unlearn":
        at -= 1
    return stages[at]


def _measured(results: Mapping[str, Any], group: str, metrics: Sequence[str]) -> list[Measured]:
    three = (results["stages"][0], _before_unlearning(results), results["stages"][-1])
    return [
        Measured(
            metric,
            *(metric_value(stage, group, metric) for stage in three),
            reference_entry(results, group, metric),
            gap_to_reference(results, group, metric),
        )
        for metric in metrics
    ]


def _about_model(model: Mapping[str, Any], network: str) -> str:
    trained, parameters = model["trainable_parameters"], model["parameters"]
    part = "all of them"
    if trained != parameters:
        part = f"{_millions(trained)} of them ({trained / parameters:.1%})"
    return f"{network} ({model_name(model['path'])}) has {_millions(parameters)} parameters; {part} were trained."


def _about_learning(stage: Stage) -> str:
    count = stage["examples"].get("learn", DASH)
    return f"It learned “{request_name(stage)}” from {count} examples in {stage['steps']} steps"


def _about_unlearning(stage: Stage) -> str:
    told = f"It was asked to unlearn “{request_name(stage)}” ({stage['how']})"
    if stage["steps"]:
        counts = " and ".join(f"{count} {role}" for role, count in stage["examples"].items())
        told += f" and trained on {counts} examples in {stage['steps']} steps"
    return told


def _with_changes(told: str, before: Stage, stage: Stage, forget: Sequence[str], retain: Sequence[str]) -> str:
    own = request_name(stage)
    if stage["kind"] == "learn" and len(stage.get("tasks", ())) > 1 and own in stage["tasks"]:
        # Of several tasks, the groups are of what is forgotten in the end and of all that stays.
        was, now = (of.get("tasks", {}).get(own, {"metrics": {}})["metrics"] for of in (before, stage))
        found = _changes((metric, was.get(metric), now.get(metric)) for metric in retain)
        return f"{told}: on its own examples {found}." if found else f"{told}."
    changes = [
        f"on the {group_title(group).lower()} group {found}"
        for group, metrics in ((FORGET, forget), (RETAIN, retain))
        if (found := _changes((m, *(metric_value(of, group, m) for of in (before, stage))) for m in metrics))
    ]
    return f"{told}: {'; '.join(changes)}." if changes else f"{told}."


def _changes(values: Iterable[tuple[str, float | None, float | None]]) -> str:
    """Of (metric, before, after) such as "answer probability fell from 0.974 to 0.119 and ROUGE-L recall from 0.986 to 0.332"."""
    found, said = [], ""
    for metric, was, now in values:
        if was is None or now is None:
            continue
        name = metric_in_text(metric)
        if format_value(was) == format_value(now):
            verb, values = "stayed at", format_value(now)
        else:
            verb, values = "rose" if now > was else "fell", f"from {format_value(was)} to {format_value(now)}"
        found.append(f"{name} {values}" if verb == said != "stayed at" else f"{name} {verb} {values}")
        said = verb
    return listed(found) if found else ""


def _about_reference(results: Mapping[str, Any]) -> str:
    metrics = headline(results).forgotten
    entries = [reference_entry(results, FORGET, metric) for metric in metrics]
    if not any(entries):
        return (
            "No retrained reference is recorded for this run, so it does not show how close the result is "
            "to a model that never saw the data."
        )
    names = [f"{'an' if name[0] in 'aeioI' else 'a'} {name}" for name in map(metric_in_text, metrics)]
    had = listed([f"{name} of {format_reference(entry)}" for name, entry in zip(names, entries, strict=True)])
    gaps = listed([format_gap(gap_to_reference(results, FORGET, metric)) for metric in metrics])
    verb = "gaps at the end of the run are" if len(metrics) > 1 else "gap at the end of the run is"
    return f"A model retrained without that data has {had} on the forget group: the {verb} {gaps}."


def _millions(count: int) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
