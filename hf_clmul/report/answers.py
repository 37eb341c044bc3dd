"""The two questions of every run that unlearned something, answered first: how far is it from a model that never saw the data, and does
it come back? From the records of a run and of its audit to words and numbers; it knows nothing of pages."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.evaluation.audit.verdict import (
    FALLING,
    already,
    asked,
    came_back,
    points_after,
    rose_unmatched,
    side,
    start_of,
    summary,
    telling,
    tried,
)
from hf_clmul.report.audit import attack_title, shown
from hf_clmul.report.claims import EXACT, claims, explained
from hf_clmul.report.headlines import headline
from hf_clmul.report.tables import (
    FORGET,
    format_gap,
    format_reference,
    format_value,
    gap_to_reference,
    has_unlearned,
    metric_in_text,
    metric_label,
    metric_value,
    reference_entry,
)

Record = Mapping[str, Any]
DISTANCE, RETURN = "How far from a model that never saw the data?", "Does it come back?"
BACK, ROSE = "came back", "rose"
NOT_APART, NO_FIGURES, NOT_TRIED = "no sure gap", "no figures", "not tried"


@dataclass(frozen=True)
class Line:
    """A metric, or an attack: `mark` is the verdict in a word or two, `bad` whether it is one against the run."""

    mark: str
    bad: bool
    title: str
    found: str
    note: str


@dataclass(frozen=True)
class Answer:
    """`said` in a few words that begin small, `told` in a sentence or two, and what both rest on."""

    question: str
    said: str
    told: str
    lines: tuple[Line, ...] = ()


def answers(results: Record, audit: Record | None) -> list[Answer]:
    """Both answers; none for a run that unlearned nothing."""
    return [_distance(results, audit), _return(audit)] if has_unlearned(results) else []


def _distance(results: Record, audit: Record | None) -> Answer:
    beside = {} if audit is None else {m: e for m, e in audit["before"].items() if m not in FALLING and e["gap"]}
    made = claims(results)
    exact = " ".join(explained(claim) for claim in made) if made and all(claim in EXACT for claim in made) else ""
    if beside:
        held = audit.get("held", True)
        sides = {metric: side(entry) for metric, entry in beside.items()}
        apart = sum(where in ("above", "below") for where in sides.values())
        said = f"{apart} of {_counted(len(beside), 'metric')} {'differs' if 1 in (apart, len(beside)) else 'differ'}"
        told = (
            f"Of the forgotten {asked(audit['before'])}, beside the retrained model ({audit['reference']['name']}), before any attack. "
            f"The intervals are over {asked(audit['before'])}: another training run is not in them. Above: the run shows more of them "
            "than a model that never saw them; below: less than such a model shows."
        )
        told = " ".join(filter(None, (exact, *([] if held else audit.get("scope", ())), told)))
        lines = tuple(_beside(metric, beside[metric], sides[metric], held) for metric in beside)
        return Answer(DISTANCE, f"exact; {said}" if exact else said, told, lines)
    entries = {
        m: e for m in headline(results).distance if (e := reference_entry(results, FORGET, m)) and e["mean"] is not None
    }
    gaps = {metric: gap for metric in entries if (gap := gap_to_reference(results, FORGET, metric)) is not None}
    if gaps:
        lines = tuple(_recorded(results, metric, entries[metric], gap) for metric, gap in gaps.items())
        told = (
            "On the forget group, beside the retrained model. Whether such gaps are chance is not known from one run."
        )
        said = f"gap of {max(map(abs, gaps.values())):.3f}{' at most' * (len(gaps) > 1)}"
        return Answer(DISTANCE, f"exact; {said}" if exact else said, " ".join(filter(None, (exact, told))), lines)
    if exact:
        return Answer(DISTANCE, "exact", exact)
    told = "No figures of a model retrained without the forgotten data are recorded. `hf-clmul reference` trains one."
    return Answer(DISTANCE, "not known", told)


def _beside(metric: str, entry: Record, where: str | None, held: bool) -> Line:
    """More than the retrained model shows is against the run only if it was trained on the examples: `held`."""
    run, other, (gap, between) = shown(entry["run"])[0], shown(entry["reference"])[0], shown(entry["gap"])
    mark = NOT_APART if where == "cannot be told apart" else where or "no interval"
    note = f"gap {gap}{f' (95 %: {between})' if between else ''}"
    return Line(mark, held and where == "above", metric_label(metric), f"{run}, retrained {other}", note)


def _recorded(results: Record, metric: str, entry: Record, gap: float) -> Line:
    now = format_value(metric_value(results["stages"][-1], FORGET, metric))
    mark = "above" if gap > 0 else "below" if gap < 0 else "equal"
    found = f"{now}, retrained {format_reference(entry)}"
    return Line(mark, False, metric_label(metric), found, f"gap {format_gap(gap)}")


def _return(audit: Record | None) -> Answer:
    if audit is None:
        told = "No attack was made on this model. `hf-clmul audit RUN` tries to bring back what was forgotten."
        return Answer(RETURN, NOT_TRIED, told)
    told_of = tried(audit["attacks"])
    lines = tuple(sorted((_line(attack, audit) for attack in audit["attacks"]), key=_order))
    held = audit.get("held", True)  # not known of an audit from before it was recorded
    told = summary(
        audit["before"], audit["attacks"], audit["reference_missing"], lambda name: attack_title(name).lower(), held
    )
    if told is None:
        return Answer(RETURN, *_untold(audit["attacks"], bool(told_of)), lines)
    back, count = sum(bool(came_back(attack, audit["before"])) for attack in told_of), _counted(len(told_of), "attack")
    # Where attacks brought nothing back this is half of the answer; beside a retrained model the first answer has it.
    there = (
        None
        if back and audit["reference"] is not None
        else already(audit["before"], audit["reference"] is not None, held)
    )
    told = " ".join(filter(None, (*audit.get("scope", ()), there, told)))
    if not held:
        said = "nothing was there to come back"
    elif not back:
        said = f"no sure return after {count}"
    elif audit["reference"] is not None:
        said = f"yes, after {back} of {count}"
    else:
        said = f"perhaps: {back} of {count} raised something"
    return Answer(RETURN, said, told, lines)


def _untold(attacks: Sequence[Record], after: bool) -> tuple[str, str]:
    """Where there is nothing to sum up; `after` says whether there are figures from after an attack."""
    made = sum(attack["absent"] is None for attack in attacks)
    if not made:
        return NOT_TRIED, "No attack could be made on this model."
    when = "of the forgotten examples before any attack" if after else f"after {_counted(made, 'attack')}"
    return "not known", f"Nothing could be measured {when}."


def _order(line: Line) -> int:
    """What came back or rose first, and first of it what counts; what was not tried last."""
    last = {NO_FIGURES: 3, NOT_TRIED: 4}
    return (0 if line.bad else 1) if line.mark in (BACK, ROSE) else last.get(line.mark, 2)


def _line(attack: Record, audit: Record) -> Line:
    """The first metric that came back; where none did the first one, where it stands highest."""
    title, before, held = attack_title(attack["attack"]), audit["before"], audit.get("held", True)
    if attack["absent"] is not None:
        return Line(NOT_TRIED, False, title, "", attack["absent"])
    start = {metric: entry for metric, entry in start_of(attack, before).items() if metric not in FALLING}
    back = {metric: point for metric, point in came_back(attack, before).items() if metric in start}
    alone = rose_unmatched(attack, before)
    for found, mark, bad in (
        (back, BACK if audit["reference"] is not None and held else ROSE, held),
        (alone, ROSE, False),
        (dict(_highest(attack, start)), "no sure rise", False),
    ):
        for metric, point in found.items():
            return _change(mark, bad, title, metric, start[metric], point)
    return _only_after(attack, title)


def _highest(attack: Record, start: Record) -> Iterator[tuple[str, Record]]:
    for metric in start:
        points = [point for point in points_after(attack) if metric in point["metrics"]]
        if points:
            yield metric, max(points, key=lambda point: point["metrics"][metric]["run"]["value"])


def _change(mark: str, bad: bool, title: str, metric: str, start: Record, point: Record) -> Line:
    now = point["metrics"][metric]
    found = f"{metric_in_text(metric)} {shown(start['run'])[0]} → {shown(now['run'])[0]}"
    if now["reference"] is not None:
        found += f", retrained {shown(now['reference'])[0]}"
    note = point["label"]
    if start["gap"] is not None and now["gap"] is not None:
        note += f"; gap {shown(start['gap'])[0]} → {shown(now['gap'])[0]}"
    return Line(mark, bad, title, found, note)


def _only_after(attack: Record, title: str) -> Line:
    """Of an attack whose metrics there are only under it, so that there is nothing before it: none is counted
    as a return, as the model may have shown as much all along."""
    after = points_after(attack)
    metric = next((metric for point in after for metric in point["metrics"] if metric not in FALLING), None)
    if metric is None:
        why = f": {attack['stopped']}" if attack.get("stopped") else ""
        return Line(NO_FIGURES, False, title, "", f"nothing could be measured after it{why}")
    point = telling(metric, after)
    entry = point["metrics"][metric]
    where = side(entry) if entry["reference"] is not None else None
    found = f"{metric_in_text(metric)} {shown(entry['run'])[0]}"
    if entry["reference"] is not None:
        found += f", retrained {shown(entry['reference'])[0]}"
    mark = {None: "not judged", "cannot be told apart": NOT_APART, "above": "above, not counted"}.get(where, where)
    return Line(mark, False, title, found, point["label"])


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
