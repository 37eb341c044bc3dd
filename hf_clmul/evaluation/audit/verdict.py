"""The verdict in words, from the record alone. A sentence states numbers, and says that something came back only where intervals
are apart; it never says that something is gone. It knows no attack by name."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
WORDS = {
    "answer_probability": "answer probability",
    "rouge_l_recall": "ROUGE-L recall",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "min_k_auc": "min-k AUC",
    "still_drawn": "share of pictures in which it is still drawn",
    "unlearning_accuracy": "UA",
}
FALLING = {"unlearning_accuracy": "still_drawn"}
"""Metrics that fall when something comes back, and the one that says the same and rises: where both are there, sentences tell that."""


def verdict(before: Mapping[str, Any], attacks: Sequence[Record], reference_missing: str | None) -> list[str]:
    """One sentence or two on what was there before, then on each attack."""
    if not before:
        return ["Nothing could be measured of the forgotten examples."]
    said = [_before(before, reference_missing)]
    said += [sentence for attack in attacks for sentence in _of_attack(attack, before)]
    tried = [attack for attack in attacks if attack["absent"] is None]
    if tried:
        back = [attack["attack"] for attack in tried if came_back(attack, before)]
        said.append(_summary(back, len(tried), reference_missing is None))
    return said


def came_back(attack: Record, before: Mapping[str, Any]) -> dict[str, Record]:
    """{metric: the point where it rose most}, of metrics that rose so far that the interval lies above that from before; those of
    FALLING fell as far.

    Where the reference met the same attack, its distance has to have grown likewise: what the attack itself teaches came back
    nowhere.
    """
    found: dict[str, Record] = {}
    for metric, start in _start(attack, before).items():
        turned = [
            (point, _rising(metric, point["metrics"][metric]))
            for point in attack["points"]
            if metric in point["metrics"]
        ]
        from_ = _rising(metric, start)
        back = [(point, now) for point, now in turned if _is_back(from_, now)]
        if back:
            found[metric] = max(back, key=lambda pair: _rise(from_, pair[1]))[0]
    return found


def _rising(metric: str, entry: Record) -> Record:
    """The entry, or of a metric that falls when something comes back its mirror image; a gap is a distance in both."""
    if metric not in FALLING:
        return entry
    return {**entry, **{part: _mirrored(entry[part]) for part in ("run", "reference")}}


def _mirrored(estimate: Record | None) -> Record | None:
    if estimate is None:
        return None
    low, high = estimate["low"], estimate["high"]
    return {
        **estimate, "value": -estimate["value"], "low": None if high is None else -high, "high": None if low is None else -low,
    }  # fmt: skip


def _is_back(start: Record, now: Record) -> bool:
    if not _above(now["run"], start["run"]):
        return False
    if now["gap"] is None or start["gap"] is None:
        return True
    return now["run"]["value"] > now["reference"]["value"] and _above(now["gap"], start["gap"])


def _above(now: Record, start: Record) -> bool:
    """Whether the intervals are apart. Of a single example there is none, and nothing is said."""
    return now["low"] is not None and start["high"] is not None and now["low"] > start["high"]


def _rise(start: Record, now: Record) -> float:
    """How far it came from where it was: in distance to the reference where that is known."""
    part = "gap" if now["gap"] is not None and start["gap"] is not None else "run"
    return now[part]["value"] - start[part]["value"]


def _risen(metric: str, start: Record, now: Record) -> float:
    """`_rise`, at most that of the run itself: a gap that grew because the reference changed is nothing that came back."""
    start, now = _rising(metric, start), _rising(metric, now)
    return min(_rise(start, now), now["run"]["value"] - start["run"]["value"])


def _noun(metric: str) -> str:
    return "fall" if metric in FALLING else "rise"


def _start(attack: Record, before: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an attack starts from: its own first point, which may be of fewer examples, else what was measured before all."""
    first = next((point for point in attack["points"] if point["label"] == "before"), None)
    return before if first is None else first["metrics"]


def _before(before: Mapping[str, Any], reference_missing: str | None) -> str:
    if reference_missing is not None:
        values = ", ".join(f"{word(name)} {_number(entry['run'])}" for name, entry in before.items())
        return (
            f"There is no retrained model to compare with ({reference_missing}): how far the run is from never having seen the data "
            f"is not known. Before any attack it has on the forgotten examples: {values}."
        )
    parts = [
        f"{word(name)} {_number(entry['gap'])} ({entry['run']['value']:.2f} against {entry['reference']['value']:.2f})"
        for name, entry in before.items()
        if entry["gap"] is not None
    ]
    if not parts:
        return "The retrained model has no metric in common with the run, so that there is no gap to state."
    return f"Gap to the retrained model on the forgotten examples before any attack: {', '.join(parts)}."


def _of_attack(attack: Record, before: Mapping[str, Any]) -> Iterator[str]:
    name = attack["attack"]
    if attack["absent"] is not None:
        yield f"{name}: not tried, {attack['absent']}."
        return
    start, back = _start(attack, before), came_back(attack, before)
    after = [point for point in attack["points"] if point["label"] != "before"]
    if not after:
        yield f"{name}: nothing was measured after it."
        return
    said = [metric for metric in start if FALLING.get(metric) not in start]
    for metric in (metric for metric in said if metric in back):
        how = "fell, so that it came back" if metric in FALLING else "came back"
        yield f"{name}: {word(metric)} {how}: {_change(metric, start, back[metric])}."
    others = [metric for metric in said if metric not in back and any(metric in p["metrics"] for p in after)]
    if others and not back:
        rise, metric, point = max(
            ((_risen(m, start[m], p["metrics"][m]), m, p) for m in others for p in after if m in p["metrics"]),
            key=lambda found: found[0],
        )
        if rise > 0:
            most = _change(metric, start, point, named=True)
            changed = "changed" if metric in FALLING else "rose"
            yield f"{name}: no metric {changed} so far that its intervals are apart; the largest {_noun(metric)} is in {most}."
        else:
            yield f"{name}: no metric {'fell' if metric in FALLING else 'rose'}."
    elif others:
        yield f"{name}: not so far that the intervals are apart, if at all: {', '.join(map(word, others))}."
    own = [metric for metric in after[-1]["metrics"] if metric not in start]
    if own:
        yield f"{name}: {'; '.join(_alone(metric, after[-1]) for metric in own)}. Nothing like it was measured before."
    if attack["reference_absent"] is not None:
        yield f"{name}: not tried on the retrained model, {attack['reference_absent']}."


def _change(metric: str, start: Mapping[str, Any], point: Record, named: bool = False) -> str:
    old, new = start[metric], point["metrics"][metric]
    said = f"{word(metric)}, " if named else ""
    said += f"{_number(old['run'])} before, {_number(new['run'])} after ({point['label']})"
    if old["gap"] is not None and new["gap"] is not None:
        said += f"; gap to the retrained model {_number(old['gap'])} before, {_number(new['gap'])} after the same attack on both"
    return said


def _alone(metric: str, point: Record) -> str:
    """A metric that only the attack has."""
    entry = point["metrics"][metric]
    beside = f", the retrained model {_number(entry['reference'])}" if entry["reference"] is not None else ""
    return f"{word(metric)} {_number(entry['run'])} ({point['label']}){beside}"


def _summary(back: Sequence[str], tried: int, referenced: bool) -> str:
    beyond = " beyond what the same attack does to the retrained model" if referenced else ""
    if back:
        return f"{len(back)} of {tried} attacks brought something back{beyond}: {', '.join(back)}."
    return (
        f"None of {tried} attacks raised a metric so far that its intervals are apart{beyond and ', and'}{beyond}. Other attacks, "
        "or more examples, may."
    )


def _number(estimate: Record) -> str:
    """The value with its interval."""
    if estimate["low"] is None:
        return f"{estimate['value']:.3f} (one example)"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def word(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))
