"""From the record of a run to the sentences, key figures and checks of its report. Every number in them is
the record's or follows from it; they say nothing that is not in the record."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.report.claims import claims, explained
from hf_clmul.report.tables import (
    DASH,
    FORGET,
    RETAIN,
    format_gap,
    format_reference,
    format_value,
    gap_to_reference,
    group_title,
    metric_label,
    metric_value,
    reference_entry,
)

Stage = Mapping[str, Any]
PROBABILITY, ROUGE, FLUENCY = "answer_probability", "rouge_l_recall", "fluency"

# The bounds of the checks; each is shown beside its verdict.
CLOSE, OVER_FORGOTTEN, KEPT, FLUENT = 0.05, 0.5, 0.95, 0.9

_MANY_REQUESTS = 4
_NO_REFERENCE = "no reference recorded"


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
    """The last part of a Hub id or path."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def summary(results: Mapping[str, Any]) -> list[str]:
    """What was asked, what came of it, and how far to trust it, as sentences."""
    sentences = [_about_model(results["model"])]
    requests = _requests(results)
    if not requests:
        return [*sentences, "No request has been finished yet."]
    if len(requests) > _MANY_REQUESTS:
        learned = sum(stage["kind"] == "learn" for _, stage in requests)
        sentences.append(f"It carried out {learned} learn and {len(requests) - learned} unlearn requests.")
        requests = [pair for pair in requests if pair in (_last(requests, "learn"), _last(requests, "unlearn"))]
        sentences.append("The last of each kind:")
    about = {"learn": _about_learning, "unlearn": _about_unlearning}
    sentences += [about[stage["kind"]](before, stage) for before, stage in requests]
    unlearned = _last(requests, "unlearn")
    if unlearned is not None:
        sentences.append(_about_reference(results))
        sentences += [explained(claim) for claim in claims(results)]
    return sentences


def key_figures(results: Mapping[str, Any]) -> list[KeyFigure]:
    """Up to four numbers: what was forgotten (or learned), what was kept, how fluent, how long."""
    figures = []
    unlearned = _last(_requests(results), "unlearn")
    if unlearned is not None:
        before, after = unlearned[0], results["stages"][-1]
        entry = reference_entry(results, FORGET, PROBABILITY)
        note = f"retrained: {format_reference(entry)}" if entry else _NO_REFERENCE
        value = _arrow(before, after, FORGET, PROBABILITY)
        figures.append(KeyFigure("Forget: answer probability", value, note, FORGET))
        kept = _share(before, after, RETAIN, PROBABILITY)
        shown = DASH if kept is None else f"{kept:.1%}"
        note = f"of what it was: {_arrow(before, after, RETAIN, PROBABILITY)}"
        figures.append(KeyFigure("Retain: answer probability", shown, note, RETAIN))
        was, now = (format_value(metric_value(stage, FORGET, FLUENCY)) for stage in (before, after))
        figures.append(KeyFigure("Forget: fluency", now, f"before the request: {was}", FORGET))
    elif _requests(results):
        first, last = results["stages"][0], results["stages"][-1]
        value = _arrow(first, last, RETAIN, PROBABILITY)
        note = "before the first and after the last request"
        figures.append(KeyFigure("Learned: answer probability", value, note))
    hardware = results["hardware"]
    peak = format_bytes(results["peak_memory_bytes"])
    note = f"{hardware['device']}, {hardware['cores']} cores, peak {peak}"
    return [*figures, KeyFigure("Time", format_seconds(results["seconds"]), note)]


def checks(results: Mapping[str, Any]) -> list[Check]:
    """Verdicts on the last unlearn request, from before it to the end of the run; none without one."""
    unlearned = _last(_requests(results), "unlearn")
    if unlearned is None:
        return []
    before, after = unlearned[0], results["stages"][-1]
    gaps = [gap_to_reference(results, FORGET, metric) for metric in (PROBABILITY, ROUGE)]
    entry = reference_entry(results, FORGET, PROBABILITY)
    mean = entry["mean"] if entry else None
    probability = metric_value(after, FORGET, PROBABILITY)
    kept = [_share(before, after, RETAIN, metric) for metric in (PROBABILITY, ROUGE)]
    fluent = _share(before, after, FORGET, FLUENCY)
    return [
        Check(
            "Forgot as much as a retrained model",
            f"forget: answer probability and ROUGE-L recall within {CLOSE} of the reference",
            _all(gap if gap is None else abs(gap) <= CLOSE for gap in gaps),
            f"gaps {format_gap(gaps[0])} and {format_gap(gaps[1])}" if entry else _NO_REFERENCE,
        ),
        Check(
            "Did not forget too much",
            "forget: answer probability at least half of the reference's; less shows what was removed",
            None if None in (mean, probability) else probability >= OVER_FORGOTTEN * mean,
            f"{format_value(probability)}, reference {format_value(mean)}" if entry else _NO_REFERENCE,
        ),
        Check(
            "Kept the rest",
            f"retain: answer probability and ROUGE-L recall at least {KEPT} of what they were",
            _all(share if share is None else share >= KEPT for share in kept),
            f"{format_value(kept[0])} and {format_value(kept[1])} of before",
        ),
        Check(
            "Stayed fluent",
            f"forget: fluency at least {FLUENT} of what it was",
            fluent if fluent is None else fluent >= FLUENT,
            f"{format_value(fluent)} of before",
        ),
    ]


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


def _about_model(model: Mapping[str, Any]) -> str:
    trained, parameters = model["trainable_parameters"], model["parameters"]
    part = "all of them"
    if trained != parameters:
        part = f"{_millions(trained)} of them ({trained / parameters:.1%})"
    name = model_name(model["path"])
    return f"The model ({name}) has {_millions(parameters)} parameters; {part} were trained."


def _about_learning(before: Stage, stage: Stage) -> str:
    count = stage["examples"].get("learn", DASH)
    told = f"It learned “{request_name(stage)}” from {count} examples in {stage['steps']} steps"
    return _with_changes(told, before, stage, [PROBABILITY])


def _about_unlearning(before: Stage, stage: Stage) -> str:
    told = f"It was asked to unlearn “{request_name(stage)}” ({stage['how']})"
    if stage["steps"]:
        counts = " and ".join(f"{count} {role}" for role, count in stage["examples"].items())
        told += f" and trained on {counts} examples in {stage['steps']} steps"
    return _with_changes(told, before, stage, [PROBABILITY, ROUGE])


def _with_changes(told: str, before: Stage, stage: Stage, metrics: Sequence[str]) -> str:
    changes = [
        f"on the {group_title(group).lower()} group {found}"
        for group in (FORGET, RETAIN)
        if (found := _changes(before, stage, group, metrics))
    ]
    return f"{told}: {'; '.join(changes)}." if changes else f"{told}."


def _changes(before: Stage, after: Stage, group: str, metrics: Sequence[str]) -> str:
    """Such as "answer probability fell from 0.974 to 0.119 and ROUGE-L recall from 0.986 to 0.332"."""
    found, said = [], ""
    for metric in metrics:
        was, now = (metric_value(stage, group, metric) for stage in (before, after))
        if was is None or now is None:
            continue
        name = metric_label(metric) if metric == ROUGE else metric_label(metric).lower()
        if format_value(was) == format_value(now):
            verb, values = "stayed at", format_value(now)
        else:
            verb, values = "rose" if now > was else "fell", f"from {format_value(was)} to {format_value(now)}"
        found.append(f"{name} {values}" if verb == said != "stayed at" else f"{name} {verb} {values}")
        said = verb
    return " and ".join(found)


def _about_reference(results: Mapping[str, Any]) -> str:
    entry, rouge = (reference_entry(results, FORGET, metric) for metric in (PROBABILITY, ROUGE))
    if entry is None and rouge is None:
        return (
            "No retrained reference is recorded for this run, so it does not show how close the result is "
            "to a model that never saw the data."
        )
    gaps = [format_gap(gap_to_reference(results, FORGET, metric)) for metric in (PROBABILITY, ROUGE)]
    return (
        f"A model retrained without that data has an answer probability of {format_reference(entry)} "
        f"and a ROUGE-L recall of {format_reference(rouge)} on the forget group: "
        f"the gaps at the end of the run are {gaps[0]} and {gaps[1]}."
    )


def _arrow(before: Stage, after: Stage, group: str, metric: str) -> str:
    return " → ".join(format_value(metric_value(stage, group, metric)) for stage in (before, after))


def _share(before: Stage, after: Stage, group: str, metric: str) -> float | None:
    was, now = (metric_value(stage, group, metric) for stage in (before, after))
    return now / was if was and now is not None else None


def _all(verdicts: Any) -> bool | None:
    verdicts = list(verdicts)
    return None if None in verdicts else all(verdicts)


def _millions(count: int) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
