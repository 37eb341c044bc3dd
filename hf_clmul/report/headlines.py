"""What a report says first, by family: which metrics tell what was forgotten, kept and learned, how they are shown, and the bounds
that they are judged by. It knows numbers and words; nothing of stages or pages."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_clmul.report.tables import DASH, FORGET, RETAIN, format_gap, format_reference, format_value, metric_label

# The bounds of the checks; each is shown beside its verdict. Those of pictures are shares of samples, not ratios.
CLOSE, OVER_FORGOTTEN, KEPT, FLUENT = 0.05, 0.5, 0.95, 0.9
FORGOTTEN, LOST = 0.98, 0.02
NO_REFERENCE = "no reference recorded"


@dataclass(frozen=True)
class Measured:
    """A metric of the unmodified model, before the unlearn requests, and at the end; with the reference and the gap to it."""

    metric: str
    given: float | None
    was: float | None
    now: float | None
    reference: Mapping[str, float | None] | None
    gap: float | None

    @property
    def arrow(self) -> str:
        return f"{format_value(self.was)} → {format_value(self.now)}"

    @property
    def share(self) -> float | None:
        """Of what it was."""
        return self.now / self.was if self.was and self.now is not None else None


Some = Sequence[Measured]
Verdict = tuple[bool | None, str]


@dataclass(frozen=True)
class Figure:
    """A key figure: `shown` gives its value and note. With `several` it is led by the first of its metrics that was measured."""

    label: str
    group: str
    metrics: tuple[str, ...]
    shown: Callable[[Some], tuple[str, str]]
    several: bool = False

    def of(self, some: Some) -> tuple[str, str, str]:
        """Label, value and note."""
        if not self.several:
            return self.label, *self.shown(some)
        measured = [one for one in some if one.was is not None or one.now is not None] or some
        return f"{self.label}: {metric_label(measured[0].metric)}", *self.shown(measured)


@dataclass(frozen=True)
class Bound:
    """A check: `judge` gives the verdict (None: the record does not allow one) and what was found."""

    title: str
    rule: str
    group: str
    metrics: tuple[str, ...]
    limit: float
    judge: Callable[[Some, float], Verdict]


@dataclass(frozen=True)
class Headline:
    """The words and metrics of a family. `forgotten` (of the forget group) and `kept` (of the retain group) tell of an unlearn
    request, `learned` of a learn request. `distance` (of the forget group) are those by which a model is told from one that never
    saw the data, each between 0 and 1, so that their gaps can be compared."""

    network: str
    """What has the parameters, as the beginning of a sentence."""
    asked: str
    samples: str
    """What the samples are called, as a title."""
    with_truth: bool
    """Whether a sample has a true answer beside it."""
    nothing: str
    """In the place of an empty sample."""
    aim: str
    """What the reference is for the forget group."""
    forgotten: tuple[str, ...]
    distance: tuple[str, ...]
    kept: tuple[str, ...]
    learned: tuple[str, ...]
    figures: tuple[Figure, ...]
    bounds: tuple[Bound, ...]


def headline(results: Mapping[str, Any]) -> Headline:
    """Of the family of a record; early ones are of language models and do not name it."""
    return HEADLINES[results["model"].get("family", "causal_lm")]


def listed(parts: Sequence[str]) -> str:
    """Such as "a, b and c"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def all_met(verdicts: Sequence[bool | None]) -> bool | None:
    """One that is not met decides, whatever was not measured beside it."""
    return False if False in verdicts else None if None in verdicts else True


# ---- how figures are shown -------------------------------------------------------------------------------------------


def _to_reference(some: Some) -> tuple[str, str]:
    first = some[0]
    return first.arrow, f"retrained: {format_reference(first.reference)}" if first.reference else NO_REFERENCE


def _share_left(some: Some) -> tuple[str, str]:
    first = some[0]
    return DASH if first.share is None else f"{first.share:.1%}", f"of what it was: {first.arrow}"


def _at_the_end(some: Some) -> tuple[str, str]:
    return format_value(some[0].now), f"before the request: {format_value(some[0].was)}"


def _beside_the_unmodified(some: Some) -> tuple[str, str]:
    first = some[0]
    retrained = f"; retrained: {format_reference(first.reference)}" if first.reference else ""
    return format_value(first.now), _unmodified(first) + retrained


def _with_the_others(some: Some) -> tuple[str, str]:
    return some[0].arrow, "; ".join(f"{metric_label(other.metric)}: {other.arrow}" for other in some[1:])


def _distance(some: Some) -> tuple[str, str]:
    return format_value(some[0].now), "to the pictures before the first request; 0 is unchanged"


def _unmodified(found: Measured) -> str:
    accuracy = None if found.given is None else 1 - found.given
    return f"unmodified model: {format_value(found.given)}, so an accuracy of {format_value(accuracy)}"


# ---- how bounds are judged -------------------------------------------------------------------------------------------


def _near_the_reference(some: Some, limit: float) -> Verdict:
    met = all_met([one.gap if one.gap is None else abs(one.gap) <= limit for one in some])
    gaps = listed([format_gap(one.gap) for one in some])
    return met, f"gap{'s' * (len(some) > 1)} {gaps}" if some[0].reference else NO_REFERENCE


def _not_far_below_the_reference(some: Some, limit: float) -> Verdict:
    now, mean = some[0].now, some[0].reference["mean"] if some[0].reference else None
    met = None if None in (mean, now) else now >= limit * mean
    return met, f"{format_value(now)}, reference {format_value(mean)}" if some[0].reference else NO_REFERENCE


def _share_of_before(some: Some, limit: float) -> Verdict:
    met = all_met([one.share if one.share is None else one.share >= limit for one in some])
    return met, f"{listed([format_value(one.share) for one in some])} of before"


def _above(some: Some, limit: float) -> Verdict:
    """No verdict where it was so from the beginning: what a model never showed it cannot forget."""
    first, earlier = some[0], [value for value in (some[0].given, some[0].was) if value is not None]
    unclear = first.now is None or (earlier and min(earlier) >= limit)
    return None if unclear else first.now >= limit, f"{format_value(first.now)}; {_unmodified(first)}"


def _little_below_before(some: Some, limit: float) -> Verdict:
    """Of those that were measured at all: without near neighbours there is no IRA near."""
    measured = [one for one in some if one.was is not None or one.now is not None]
    if not measured:
        return None, "not measured"
    # Shares of samples are compared to more digits than they have, which rounding must not decide.
    lost = [None if None in (one.was, one.now) else one.was - one.now <= limit + 1e-9 for one in measured]
    return all_met(lost), "; ".join(f"{metric_label(one.metric)}: {one.arrow}" for one in measured)


# ---- the families ----------------------------------------------------------------------------------------------------

_PROBABILITY, _ROUGE, _FLUENCY = "answer_probability", "rouge_l_recall", "fluency"
_UA, _DISTANCE, _PROMPT = "unlearning_accuracy", "frechet_distance", "prompt_accuracy"
_KEPT = ("near_retain_accuracy", "far_retain_accuracy", "cross_retain_accuracy")

HEADLINES: dict[str, Headline] = {
    "causal_lm": Headline(
        network="The model",
        asked="questions",
        samples="sample answers",
        with_truth=True,
        nothing="nothing was generated",
        aim="In the forget group the reference is the aim, not zero: less than the reference also shows that something was "
        "removed.",
        forgotten=(_PROBABILITY, _ROUGE),
        distance=(
            _PROBABILITY, _ROUGE, "extraction_strength", "exact_memorization", "paraphrase_probability", "truth_ratio",
        ),
        kept=(_PROBABILITY, _ROUGE),
        learned=(_PROBABILITY,),
        figures=(
            Figure("Forget: answer probability", FORGET, (_PROBABILITY,), _to_reference),
            Figure("Retain: answer probability", RETAIN, (_PROBABILITY,), _share_left),
            Figure("Forget: fluency", FORGET, (_FLUENCY,), _at_the_end),
        ),
        bounds=(
            Bound(
                "Forgot as much as a retrained model",
                f"forget: answer probability and ROUGE-L recall within {CLOSE} of the reference",
                FORGET, (_PROBABILITY, _ROUGE), CLOSE, _near_the_reference,
            ),
            Bound(
                "Did not forget too much",
                "forget: answer probability at least half of the reference's; less shows what was removed",
                FORGET, (_PROBABILITY,), OVER_FORGOTTEN, _not_far_below_the_reference,
            ),
            Bound(
                "Kept the rest",
                f"retain: answer probability and ROUGE-L recall at least {KEPT} of what they were",
                RETAIN, (_PROBABILITY, _ROUGE), KEPT, _share_of_before,
            ),
            Bound(
                "Stayed fluent", f"forget: fluency at least {FLUENT} of what it was",
                FORGET, (_FLUENCY,), FLUENT, _share_of_before,
            ),
        ),
    ),
    "diffusion": Headline(
        network="The pipeline's denoiser",
        asked="prompts",
        samples="what the classifier sees",
        with_truth=False,
        nothing="nothing was judged",
        aim="In the forget group the reference is the aim.",
        forgotten=(_UA,),
        distance=(_UA,),
        kept=(*_KEPT, _DISTANCE),
        learned=(_PROMPT,),
        figures=(
            Figure("Forget: UA", FORGET, (_UA,), _beside_the_unmodified),
            Figure("Retain", RETAIN, _KEPT, _with_the_others, several=True),
            Figure("Retain: Fréchet distance", RETAIN, (_DISTANCE,), _distance),
        ),
        bounds=(
            Bound("Forgot", f"forget: UA at least {FORGOTTEN}, and less before", FORGET, (_UA,), FORGOTTEN, _above),
            Bound(
                "Forgot as much as a retrained model", f"forget: UA within {CLOSE} of the reference",
                FORGET, (_UA,), CLOSE, _near_the_reference,
            ),
            Bound(
                "Kept the rest", f"retain: IRA near, IRA far and CRA at most {LOST} below what they were",
                RETAIN, _KEPT, LOST, _little_below_before,
            ),
        ),
    ),
}  # fmt: skip
