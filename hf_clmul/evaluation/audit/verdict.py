"""The verdict in words, from the record alone. A sentence states numbers, and says that something came back only where intervals
are apart; it never says that something is gone. It knows metrics by name, and no attack."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hf_clmul.evaluation.audit.protocol import BEFORE

Record = Mapping[str, Any]
WORDS = {
    "answer_probability": "answer probability",
    "rouge_l_recall": "ROUGE-L recall",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
    "min_k_auc": "min-k AUC",
    "question_probability": "probability of the question",
    "question_rouge_l_recall": "ROUGE-L recall of the question",
    "question_extraction_strength": "extraction strength of the question",
    "question_exact_memorization": "exact memorization of the question",
    "sampled_rouge_mean": "mean ROUGE-L recall of samples",
    "sampled_rouge_max": "largest ROUGE-L recall of samples",
    "leak_share": "share of leaks",
    "leak_bound": "upper bound on the probability of a leak",
    "leak_bound_overall": "upper bound on the mean probability of a leak",
    "mean_bound": "upper bound on the mean score",
    "quantile_bound": "upper bound on the score of most samples",
    "lens_probability": "answer probability inside",
    "lens_hits": "right tokens inside",
    "lens_reciprocal_rank": "reciprocal rank inside",
    "patched_drop": "log-probability lost by patching",
    "still_drawn": "share of pictures in which it is still drawn",
    "unlearning_accuracy": "UA",
}
FALLING = ("unlearning_accuracy",)
"""What falls when something comes back. `still_drawn` says the same and rises, so that sentences tell that one."""
OF_PICTURES = ("still_drawn", "unlearning_accuracy")
DEPTH = "unlearning_depth"
BY_LAYER = ("lens_probability", "lens_hits", "lens_reciprocal_rank", "patched_drop")
"""Their points are layers: all are answers to the question, and the last is no later one."""
WITHOUT_INTERVAL = ("leak_bound_overall",)
"""One number of all examples together. Whether two of them differ by chance cannot be told."""
CEILING = 0.9
"""Of metrics between 0 and 1: what lies above can hardly rise."""


def verdict(
    before: Mapping[str, Any],
    attacks: Sequence[Record],
    reference_missing: str | None,
    scope: Sequence[str] = (),
    held: bool = True,
) -> list[str]:
    """One sentence or two on what was there before, then on each attack. Where the model was never trained on the examples, not
    `held`, nothing is said to have been forgotten, or to come back."""
    if not before:
        return [*scope, "Nothing could be measured of the forgotten examples."]
    referenced = reference_missing is None
    said = [*scope, _before(before, reference_missing)]
    there = already(before, referenced, held)
    if there is not None:
        said.append(there)
    said += [sentence for attack in attacks for sentence in _of_attack(attack, before, held)]
    last = summary(before, attacks, reference_missing, held=held)
    return said if last is None else [*said, last]


def summary(
    before: Mapping[str, Any],
    attacks: Sequence[Record],
    reference_missing: str | None,
    named: Callable[[str], str] = str,
    held: bool = True,
) -> str | None:
    """The last sentence of the verdict: how many attacks brought something back, each as `named` calls it; None where none was tried."""
    told = tried(attacks)
    if not told or not before:
        return None
    back = [attack for attack in told if came_back(attack, before)]
    alone = [attack for attack in told if attack not in back and rose_unmatched(attack, before)]
    names = [[named(attack["attack"]) for attack in some] for some in (back, alone)]
    if not held:
        return _unheld(sum(names, []), len(told))
    return _summary(*names, len(told), reference_missing is None, bool(there_before(before)))


def tried(attacks: Sequence[Record]) -> list[Record]:
    """Those after which something was measured."""
    return [attack for attack in attacks if points_after(attack)]


def came_back(attack: Record, before: Mapping[str, Any]) -> dict[str, Record]:
    """{metric: the point where it rose most}, of metrics that rose so far that the interval lies above that from before.

    Where there is a reference, the same attack has to have left the run above it, and further above than before: what the attack
    itself teaches came back nowhere. Where there is none, that is not known, and all that rose is among them.
    """
    found: dict[str, Record] = {}
    referenced = _referenced(before)
    for metric, entry in start_of(attack, before).items():
        start = _rising(metric, entry)
        turned = [(p, _rising(metric, p["metrics"][metric])) for p in attack["points"] if metric in p["metrics"]]
        back = [(point, now) for point, now in turned if _is_back(start, now, referenced)]
        if back:
            found[metric] = max(back, key=lambda pair: _rise(start, pair[1]))[0]
    return found


def _rising(metric: str, entry: Record) -> Record:
    """The entry, or of a metric that falls when something comes back its mirror image; a gap is a distance in both."""
    return (
        entry if metric not in FALLING else {**entry, **{side: _mirrored(entry[side]) for side in ("run", "reference")}}
    )


def _mirrored(estimate: Record | None) -> Record | None:
    if estimate is None:
        return None
    value, low, high = (None if estimate[key] is None else -estimate[key] for key in ("value", "low", "high"))
    return {**estimate, "value": value, "low": high, "high": low}


def there_before(before: Mapping[str, Any]) -> list[str]:
    """Metrics in which the run shows the data before any attack: above the reference, the sign of the gap being sure; where there
    is none, so near to 1 that nothing could raise them."""
    return [
        metric
        for metric, entry in before.items()
        if metric not in FALLING
        and (side(entry) == "above" if entry["reference"] is not None else CEILING <= entry["run"]["value"] <= 1)
    ]


def asked(before: Mapping[str, Any]) -> str:
    """What the values measured before all attacks are of: prompts of pictures, or examples."""
    return "prompts" if any(metric in OF_PICTURES for metric in before) else "examples"


def _referenced(before: Mapping[str, Any]) -> bool:
    return any(entry["reference"] is not None for entry in before.values())


def _is_back(start: Record, now: Record, referenced: bool) -> bool:
    if not _above(now["run"], start["run"]):
        return False
    if not referenced:
        return True
    if now["gap"] is None or start["gap"] is None:  # it did not meet the same attack: nothing says what that teaches
        return False
    if now["run"]["value"] <= now["reference"]["value"] or now["gap"]["low"] is None or start["gap"]["high"] is None:
        return False
    return now["gap"]["low"] > max(0.0, _most(start))


def _most(start: Record) -> float:
    """The upper end of run - reference. A gap's interval is that of this difference, without its sign, and reaches down to 0 where
    the sign is open."""
    gap, below = start["gap"], start["run"]["value"] < start["reference"]["value"]
    return -gap["low"] if below and gap["low"] > 0 else gap["high"]


def _above(now: Record, start: Record) -> bool:
    """Whether the intervals are apart. Of a single example there is none, and nothing is said."""
    return now["low"] is not None and start["high"] is not None and now["low"] > start["high"]


def side(entry: Record) -> str | None:
    """Whether the run lies "above" or "below" the reference, or they "cannot be told apart"; None without intervals."""
    run, reference, gap = entry["run"], entry["reference"], entry["gap"]
    if gap is not None:
        if gap["low"] is None:
            return None
        return "cannot be told apart" if gap["low"] <= 0 else "above" if run["value"] > reference["value"] else "below"
    if run["low"] is None or reference["low"] is None:
        return None
    return "above" if _above(run, reference) else "below" if _above(reference, run) else "cannot be told apart"


def _rise(start: Record, now: Record) -> float:
    """How far it came from where it was: in distance above the reference where that is known, and no further than the run itself
    rose: a gap that grew because the reference changed is nothing that came back."""
    own = now["run"]["value"] - start["run"]["value"]
    if now["gap"] is not None and start["gap"] is not None:
        return min(own, _over(now) - _over(start))
    return own


def _over(entry: Record) -> float:
    return entry["run"]["value"] - entry["reference"]["value"]


def start_of(attack: Record, before: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an attack starts from: its own first point, which may be of fewer examples, else what was measured before all."""
    first = next((point for point in attack["points"] if point["label"] == BEFORE), None)
    return before if first is None else first["metrics"]


def _before(before: Mapping[str, Any], reference_missing: str | None) -> str:
    if reference_missing is not None:
        values = ", ".join(f"{word(name)} {_number(entry['run'])}" for name, entry in _told(before).items())
        return (
            f"There is no retrained model to compare with ({reference_missing}): how far the run is from never having seen the data "
            f"is not known. Before any attack it has on the forgotten {asked(before)}: {values}."
        )
    parts = [
        f"{word(name)} {_number(entry['gap'])} ({_digits(entry['run']['value'])} against {_digits(entry['reference']['value'])})"
        for name, entry in _told(before).items()
        if entry["gap"] is not None
    ]
    if not parts:
        return "The retrained model has no metric in common with the run, so that there is no gap to state."
    return f"Gap to the retrained model on the forgotten {asked(before)} before any attack: {', '.join(parts)}."


def already(before: Mapping[str, Any], referenced: bool, held: bool = True) -> str | None:
    """What the run shows before any attack; None where it is nothing (`there_before`)."""
    words = _listed([word(metric) for metric in there_before(before)])
    if not words:
        return None
    if not held:
        where = "above the retrained model" if referenced else "near 1"
        return f"Before any attack the run lies {where} in {words}, though it was not trained on the {asked(before)}."
    if referenced:
        return (
            f"Before any attack the run already lies above the retrained model in {words}; how far apart two retrained models lie "
            "is not in these intervals."
        )
    return f"Before any attack the run already lies near 1 in {words}, so that no attack could raise that far."


def _of_attack(attack: Record, before: Mapping[str, Any], held: bool) -> Iterator[str]:
    name = attack["attack"]
    if attack["absent"] is not None:
        yield f"{name}: not tried, {attack['absent'].rstrip('.')}."
        return
    after = points_after(attack)
    if after:
        yield from _found(attack, before, after, held)
    else:
        yield f"{name}: nothing could be measured after it."
    if attack["reference_absent"] is not None:
        yield f"{name}: not tried on the retrained model, {attack['reference_absent'].rstrip('.')}."
    for side, where in (("stopped", ""), ("reference_stopped", " on the retrained model")):
        if attack.get(side) is not None:
            yield f"{name}: it ended early{where}, {attack[side].rstrip('.')}."


def _found(attack: Record, before: Mapping[str, Any], after: Sequence[Record], held: bool) -> Iterator[str]:
    name, referenced = attack["attack"], _referenced(before)
    start, back = (_told(found) for found in (start_of(attack, before), came_back(attack, before)))
    for metric, point in back.items():
        rose = "came back" if referenced and held else "rose"
        yield f"{name}: {word(metric)} {rose}: {_change(metric, start, point)}."
    alone = rose_unmatched(attack, before)
    for metric, point in alone.items():
        change = _change(metric, start, point)
        yield f"{name}: {word(metric)} rose: {change}; the retrained model has no figure under this attack to compare with."
    others = [m for m in start if m not in back and m not in alone and any(m in p["metrics"] for p in after)]
    if others and not back and not alone:
        metric, point = max(
            ((m, p) for m in others for p in after if m in p["metrics"]),
            key=lambda found: _rise(start[found[0]], found[1]["metrics"][found[0]]),
        )
        if _rise(start[metric], point["metrics"][metric]) > 0:
            most = _change(metric, start, point, named=True)
            beyond = " beyond the retrained model's" if referenced else ""
            yield f"{name}: no metric rose so far{beyond} that its intervals are apart; the largest rise is in {most}."
        else:
            yield f"{name}: no metric rose{', or none more than the retrained model' * referenced}."
    elif others:
        yield f"{name}: not so far that the intervals are apart, if at all: {', '.join(map(word, others))}."
    yield from _own(name, [m for m in _metrics(after) if m not in start and m not in FALLING], after, referenced)


def points_after(attack: Record) -> list[Record]:
    """The points behind the first that say anything: of a model that an attack destroyed there are no numbers."""
    return [point for point in attack["points"] if point["label"] != BEFORE and point["metrics"]]


def _told(found: Mapping[str, Any]) -> dict[str, Any]:
    return {metric: value for metric, value in found.items() if metric not in FALLING}


def rose_unmatched(attack: Record, before: Mapping[str, Any]) -> dict[str, Record]:
    """{metric: point} of what rose where there is a reference, but no figure of it under this attack."""
    if not _referenced(before):
        return {}
    start, back, after = _told(start_of(attack, before)), came_back(attack, before), points_after(attack)
    rest = [metric for metric in start if metric not in back]
    return {metric: found for metric in rest if (found := _rose_for_sure(metric, start, after)) is not None}


def _rose_for_sure(metric: str, start: Mapping[str, Any], after: Sequence[Record]) -> Record | None:
    """The highest point of the run where it rose for sure and there is nothing of the reference beside it."""
    found = [
        point
        for point in after
        if metric in point["metrics"]
        and (start[metric]["gap"] is None or point["metrics"][metric]["gap"] is None)
        and _above(point["metrics"][metric]["run"], start[metric]["run"])
    ]
    return max(found, key=lambda point: point["metrics"][metric]["run"]["value"], default=None)


def _own(name: str, metrics: Sequence[str], points: Sequence[Record], referenced: bool) -> Iterator[str]:
    """Metrics that only the attack has, so that there is nothing before it to compare with: the run beside the reference."""
    found: dict[str | None, list[str]] = {}
    for metric in metrics:
        point = telling(metric, points)
        entry = point["metrics"][metric]
        if metric == DEPTH:
            yield (
                f"{name}: depth of unlearning {_number(entry['run'])}, where 0 means that the layers hold all that the retrained model "
                "lacks, and 1 as little as it does."
            )
            continue
        said = f"{word(metric)} {_number(entry['run'])}"
        if entry["reference"] is None:
            found.setdefault("alone", []).append(f"{said} ({point['label']})")
            continue
        said += f" against {_number(entry['reference'])} ({point['label']}"
        said += (
            f"; gap {_number(entry['gap'])})" if entry["gap"] is not None and metric not in WITHOUT_INTERVAL else ")"
        )
        where = None if metric in WITHOUT_INTERVAL else side(entry)
        found.setdefault(where, []).append(said)
    for where, parts in found.items():
        listed = "; ".join(parts)
        if where == "alone":
            missing = "has no such figure" if referenced else "is missing"
            yield f"{name}: {listed}. The retrained model to compare with {missing}."
        elif where is None:
            yield f"{name}: beside the retrained model, without intervals that would tell chance: {listed}."
        elif where == "cannot be told apart":
            yield f"{name}: cannot be told apart from the retrained model: {listed}."
        else:
            yield f"{name}: {where} the retrained model: {listed}."


def _metrics(points: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(metric for point in points for metric in point["metrics"]))


def telling(metric: str, points: Sequence[Record]) -> Record:
    """The last point that has the metric; of layers the one where run and reference are furthest apart, if that is known."""
    having = [point for point in points if metric in point["metrics"]]
    gaps = [point for point in having if point["metrics"][metric]["gap"] is not None]
    if metric in BY_LAYER and gaps:
        return max(gaps, key=lambda point: point["metrics"][metric]["gap"]["value"])
    return having[-1]


def _change(metric: str, start: Mapping[str, Any], point: Record, named: bool = False) -> str:
    old, new = start[metric], point["metrics"][metric]
    said = f"{word(metric)}, " if named else ""
    said += f"{_number(old['run'])} before, {_number(new['run'])} after ({point['label']})"
    if old["gap"] is not None and new["gap"] is not None:
        said += f"; gap to the retrained model {_number(old['gap'])} before, {_number(new['gap'])} after the same attack on both"
    return said


def _summary(back: Sequence[str], alone: Sequence[str], tried: int, referenced: bool, there: bool) -> str:
    beyond = " beyond what the same attack does to the retrained model" if referenced else ""
    more = (
        f" {len(alone)} of {tried} raised something for which the retrained model has no figure: {', '.join(alone)}."
        if alone
        else ""
    )
    if back and referenced:
        return f"{len(back)} of {tried} attacks brought something back{beyond}: {', '.join(back)}.{more}"
    if back:
        return (
            f"{len(back)} of {tried} attacks raised something: {', '.join(back)}. How much of that was still in the model, and how "
            "much such an attack teaches any model, is not known without the same attack on a retrained one."
        )
    if alone:
        return f"None of {tried} attacks is known to have brought something back{beyond}.{more}"
    said = f"None of {tried} attacks raised a metric so far that its intervals are apart{beyond and ', and'}{beyond}."
    if there:
        said += " This does not mean that the data were forgotten: see above what the run shows before any attack."
    elif not referenced:
        said += " How much the run still showed before the attacks is not known without a retrained model."
    return f"{said} Other attacks, or more examples, may."


def _unheld(rose: Sequence[str], tried: int) -> str:
    said = f"None of {tried} attacks raised a metric so far that its intervals are apart."
    if rose:
        said = f"{len(rose)} of {tried} attacks raised something: {', '.join(rose)}. It is no return: the model was not trained on them."
    return f"{said} No forgetting was put to the test."


def _number(estimate: Record) -> str:
    """The value with its interval."""
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None:
        return f"{_digits(value)} (one example)"
    return f"{_digits(value)} [{_digits(low)}, {_digits(high)}]"


def _digits(number: float) -> str:
    """So many that small numbers which differ look different."""
    return f"{number:.3f}" if number == 0 or abs(number) >= 0.01 else f"{number:.2g}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def word(metric: str) -> str:
    return WORDS.get(metric, metric.replace("_", " "))
