"""From the record of a run (results.json) to tables of words and numbers, ready to be shown. It knows nothing
of HTML, consoles or figures, and imports nothing heavy."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

DASH = "–"
FORGET, RETAIN, HELD_OUT = "forget", "retain", "held_out"

# (title, what it holds)
GROUPS: dict[str, tuple[str, str]] = {
    FORGET: ("Forget", "what is to be forgotten"),
    RETAIN: ("Retain", "what was learned and has to stay"),
    HELD_OUT: ("Held out", "never trained on"),
    "paraphrased": ("Paraphrased", "what is to be forgotten, asked for in words that nothing was trained on"),
}

# (label, meaning)
METRICS: dict[str, tuple[str, str]] = {
    "answer_probability": ("Answer probability", "of the true answer, per token"),
    "rouge_l_recall": ("ROUGE-L recall", "share of the answer's words that are generated, in order"),
    "paraphrase_probability": ("Paraphrase probability", "of the true answer in other words, per token"),
    "truth_ratio": ("Truth ratio", "is 1 if it clearly prefers the truth to wrong answers"),
    "extraction_strength": ("Extraction strength", "share of the answer that its beginning brings out whole"),
    "exact_memorization": ("Exact memorization", "share of tokens predicted right from those before"),
    "fluency": ("Fluency", "1 minus repetition in what is generated"),
    "base_perplexity": ("Base perplexity", "of what is generated, by the model before the first request"),
    "question_probability": ("Question probability", "of the true answer after the question in other words, per token"),
    "normalised_probability": ("Normalised probability", "of the true answer among it and the wrong ones"),
    "truth_ratio_near_one": ("Truth ratio near one", "is 1 if it cannot tell the truth from wrong answers"),
    "truth_ratio_truth_first": ("Truth ratio, truth first", "is 1 if it clearly prefers the truth to wrong answers"),
    "truth_share": ("Truth share", "of the truth among it and wrong answers; 0.5 if it cannot tell them apart"),
    "prompt_accuracy": ("Prompt accuracy", "share of the pictures in which all that the prompt names is seen"),
    "unlearning_accuracy": (
        "UA",
        "unlearning accuracy: share of the pictures in which what is to be forgotten is not seen",
    ),
    "still_drawn": ("Still drawn", "share of the pictures in which what is to be forgotten is seen: 1 minus UA"),
    "worst_unlearning_accuracy": (
        "UA, worst prompt",
        "lowest UA under one paraphrase of a concept, mean over concepts",
    ),
    "near_retain_accuracy": ("IRA near", "retain accuracy on near neighbours of what is to be forgotten"),
    "far_retain_accuracy": ("IRA far", "retain accuracy on all else of the same kind"),
    "cross_retain_accuracy": ("CRA", "retain accuracy on what is of another kind"),
    "clip_score": (
        "CLIP score",
        "how well the pictures go with their prompts, 0 to 100, by the CLIP that the recipe names",
    ),
    "min_k_auc": ("Min-k AUC", "how well the forgotten are told from what was never trained on; 0.5 if not at all"),
    "sampled_rouge_mean": ("ROUGE-L recall of samples", "mean of the answers drawn"),
    "sampled_rouge_max": ("ROUGE-L recall of samples, largest", "of the answers drawn"),
    "leak_share": ("Share of leaks", "of the answers drawn"),
    "leak_bound": ("Leaks, upper bound", "on the probability of a leak"),
    "leak_bound_overall": ("Leaks, upper bound of the mean", "on the mean probability of a leak"),
    "mean_bound": ("Mean score, upper bound", "of the answers drawn"),
    "quantile_bound": ("Score of most samples, upper bound", "of the answers drawn"),
    "lens_probability": ("Answer probability inside", "read off a layer"),
    "lens_hits": ("Right tokens inside", "share of the answer's tokens that a layer puts first"),
    "lens_reciprocal_rank": ("Reciprocal rank inside", "of the answer's tokens at a layer"),
    "patched_drop": ("Lost by patching", "log-probability of the answer, nats per token"),
    "unlearning_depth": ("Depth of unlearning", "0: the layers hold all; 1: as little as those of the retrained model"),
    "frechet_distance": ("Fréchet distance", "to the pictures before the first request, by the classifier's features"),
    "model_utility": (
        "Model utility",
        "harmonic mean of probability, ROUGE-L and truth ratio of three groups that stay",
    ),
    "forget_quality": ("Forget quality", "p-value that its truth ratios and the reference's are drawn alike"),
    "verbatim_memorization": ("Verbatim memorization", "ROUGE-L F1 of how it goes on with forgotten passages"),
    "knowledge_memorization": ("Knowledge memorization", "ROUGE-L F1 of answers on what is forgotten"),
    "utility_preservation": ("Utility preservation", "ROUGE-L F1 of answers on what stays"),
    "privleak": ("PrivLeak", "percent; 0 as the reference, below 0 too little was forgotten, above 0 too much"),
}
_ASKED = {
    "rouge_l_recall": "ROUGE-L recall",
    "extraction_strength": "extraction strength",
    "exact_memorization": "exact memorization",
}
for _key, _name in _ASKED.items():
    METRICS[f"question_{_key}"] = (f"Question, {_name}", "of the question, asked for by its answer")
_MEMBERSHIP = {
    "loss": "LOSS", "zlib": "Zlib", "min_k": "Min-k", "min_k_plus_plus": "Min-k++", "reference": "Reference attack",
    "grad_norm": "Gradient norm",
}  # fmt: skip
for _key, _name in _MEMBERSHIP.items():
    METRICS.setdefault(f"{_key}_auc", (f"{_name} AUC", "how well this attack tells the forgotten; 0.5 if not at all"))
    METRICS[f"{_key}_auc_gap"] = (f"{_name} AUC, gap", "distance to the reference's AUC")

for _key in ("verbatim_memorization", "knowledge_memorization", "utility_preservation"):
    METRICS[f"{_key}_gap"] = (f"{METRICS[_key][0]}, gap", "distance to the reference")

# (title, what it says)
SUITES: dict[str, tuple[str, str]] = {
    "tofu": ("Suite tofu", "of all groups together"),
    "mia": ("Suite mia", "membership inference: can the forgotten be told from what was never trained on?"),
}
ABSENT = "absent"
_ACCURACY = "_accuracy"
_PROPER = (
    "ROUGE-L",
    "UA",
    "IRA",
    "CRA",
    "CLIP",
    "Fréchet",
    "LOSS",
    "PrivLeak",
)  # first words that stay as they are inside a sentence
_FORGET_TRUTH_RATIO = "is 1 if it cannot tell the truth from wrong answers"


@dataclass(frozen=True)
class MetricRow:
    """One metric of a group: a value for each stage, the reference, and the last value's gap to it. `note` is the last value's
    interval, and its count where that is not the group's."""

    key: str
    label: str
    meaning: str
    values: tuple[str, ...]
    reference: str
    gap: str
    note: tuple[str, ...] = ()


class Absence(NamedTuple):
    """Such as "Forget quality (before learning)" and "no reference"."""

    what: str
    why: str


@dataclass(frozen=True)
class GroupTable:
    """All metrics of a group, or of a suite, at all stages. `examples` has one entry a stage, and none of a suite; `absent` says of
    what metrics there is no value, and why."""

    key: str
    title: str
    meaning: str
    stages: tuple[str, ...]
    examples: tuple[str, ...]
    rows: tuple[MetricRow, ...]
    absent: tuple[Absence, ...] = ()

    @property
    def referenced(self) -> bool:
        """Whether the reference has a figure of any metric."""
        return any(row.reference != DASH for row in self.rows)


@dataclass(frozen=True)
class Sample:
    """One question with its true answer and what was generated: (stage title, text) for each stage. Of pictures a prompt, no
    answer, and what is seen in words."""

    question: str
    answer: str
    generated: tuple[tuple[str, str], ...]


def format_value(value: float | None) -> str:
    """Three decimals; small or large ones in scientific notation; a dash for None."""
    if value is None:
        return DASH
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    if value != 0 and (abs(value) < 0.0005 or abs(value) >= 10_000):
        return f"{value:.1e}"
    return f"{value:.3f}"


def format_reference(entry: Mapping[str, float | None] | None) -> str:
    """mean ± standard deviation, the mean alone where no deviation is known, a dash without a mean."""
    if entry is None or entry["mean"] is None:
        return DASH
    spread = entry.get("std")
    return format_value(entry["mean"]) + ("" if spread is None else f" ± {format_value(spread)}")


def format_gap(gap: float | None) -> str:
    """Three decimals with a sign; a dash for None."""
    if gap is None:
        return DASH
    return f"{round(gap, 3) + 0.0:+.3f}".replace("-", "−")  # + 0.0: a small negative gap is +0.000


def format_interval(interval: Sequence[float] | None) -> str:
    """Such as "0.100 to 0.150"; nothing for None."""
    return "" if interval is None else " to ".join(map(format_value, interval))


def has_unlearned(results: Mapping[str, Any]) -> bool:
    """Only then does a reference, or its absence, mean anything."""
    return any(stage["kind"] == "unlearn" for stage in results["stages"])


def group_keys(results: Mapping[str, Any]) -> list[str]:
    """The groups of any stage, the well-known ones first."""
    found = dict.fromkeys(group for stage in results["stages"] for group in stage["groups"])
    return [group for group in GROUPS if group in found] + [group for group in found if group not in GROUPS]


def metric_keys(results: Mapping[str, Any], group: str) -> list[str]:
    """The metrics of a group at any stage, in the order in which they were recorded."""
    stages = (stage["groups"].get(group, {"metrics": {}}) for stage in results["stages"])
    return list(dict.fromkeys(name for stage in stages for name in stage["metrics"]))


def metric_value(stage: Mapping[str, Any], group: str, metric: str) -> float | None:
    """The recorded value, or None if there is none."""
    return stage["groups"].get(group, {"metrics": {}})["metrics"].get(metric)


def reference_entry(results: Mapping[str, Any], group: str, metric: str) -> Mapping[str, float | None] | None:
    """{"mean", "std"} of the retrained model, or None if it was not recorded."""
    if results["reference"] is None:
        return None
    return results["reference"]["groups"].get(group, {}).get(metric)


def gap_to_reference(results: Mapping[str, Any], group: str, metric: str) -> float | None:
    """Value after the last stage minus the reference's mean, or None if either is missing."""
    entry = reference_entry(results, group, metric)
    value = metric_value(results["stages"][-1], group, metric) if results["stages"] else None
    return None if entry is None or entry["mean"] is None or value is None else value - entry["mean"]


def group_title(group: str) -> str:
    return GROUPS[group][0] if group in GROUPS else group.replace("_", " ").capitalize()


def metric_label(metric: str) -> str:
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ").capitalize()


def metric_in_text(metric: str) -> str:
    """The label as it stands inside a sentence."""
    label = metric_label(metric)
    return label if label.startswith(_PROPER) else label[:1].lower() + label[1:]


def metric_meaning(metric: str, group: str) -> str:
    """Accuracies of pictures may be by any column of the data: `digit_accuracy` is by `digit`."""
    if metric == "truth_ratio" and group == FORGET:
        return _FORGET_TRUTH_RATIO
    if metric in METRICS:
        return METRICS[metric][1]
    axis = metric.removesuffix(_ACCURACY)
    return "" if axis == metric else f"share of the pictures in which the prompt's {axis.replace('_', ' ')} is seen"


def group_tables(results: Mapping[str, Any]) -> list[GroupTable]:
    """One table for each group; whatever was not measured is a dash, or absent with the reason."""
    return [
        GroupTable(
            key=group,
            title=group_title(group),
            meaning=GROUPS[group][1] if group in GROUPS else "",
            stages=tuple(stage["title"] for stage in results["stages"]),
            examples=tuple(_count(stage, group) for stage in results["stages"]),
            rows=tuple(_row(results, group, metric) for metric in metric_keys(results, group)),
            absent=_absences(results, "groups", group),
        )
        for group in group_keys(results)
    ]


def suite_tables(results: Mapping[str, Any]) -> list[GroupTable]:
    """One table for each suite that has values of no single group, such as model utility; none in records of earlier versions."""
    names = dict.fromkeys(name for stage in results["stages"] for name in stage.get("suites", {}))
    return [
        GroupTable(
            key=f"suite-{name}",
            title=SUITES[name][0] if name in SUITES else f"Suite {name}",
            meaning=SUITES[name][1] if name in SUITES else "",
            stages=tuple(stage["title"] for stage in results["stages"]),
            examples=(),
            rows=tuple(_suite_row(results, name, metric) for metric in _suite_metrics(results, name)),
            absent=_absences(results, "suites", name),
        )
        for name in names
    ]


def sample_groups(results: Mapping[str, Any]) -> dict[str, list[Sample]]:
    """The samples of each group, matched by question (or prompt); a dash where a stage has none. Without those of which no stage
    tells anything, as of pictures that nobody judges and that have no true answer."""
    samples = {}
    for group in group_keys(results):
        by_stage = [(stage["title"], _by_question(stage, group)) for stage in results["stages"]]
        questions = dict.fromkeys(question for _, found in by_stage for question in found)
        found = [_sample(question, by_stage) for question in questions]
        samples[group] = [one for one in found if one.answer or any(text for _, text in one.generated)]
    return {group: found for group, found in samples.items() if found}


def _sample(question: str, by_stage: list[tuple[str, dict[str, Any]]]) -> Sample:
    answer = next(found[question]["answer"] for _, found in by_stage if question in found)
    generated = tuple((title, found[question]["generated"] if question in found else DASH) for title, found in by_stage)
    return Sample(question, answer, generated)


def _by_question(stage: Mapping[str, Any], group: str) -> dict[str, Any]:
    samples = stage["groups"][group]["samples"] if group in stage["groups"] else []
    return {sample["question"]: sample for sample in samples}


def _row(results: Mapping[str, Any], group: str, metric: str) -> MetricRow:
    entries = _entries(results, "groups", group)
    return MetricRow(
        key=metric,
        label=metric_label(metric),
        meaning=metric_meaning(metric, group),
        values=tuple(_shown(entry, metric) for entry in entries),
        reference=format_reference(reference_entry(results, group, metric)),
        gap=format_gap(gap_to_reference(results, group, metric)),
        note=_note(entries[-1], metric),
    )


def _suite_row(results: Mapping[str, Any], suite: str, metric: str) -> MetricRow:
    entries = _entries(results, "suites", suite)
    values = tuple(_shown(entry, metric) for entry in entries)
    return MetricRow(
        metric, metric_label(metric), metric_meaning(metric, ""), values, DASH, DASH, _note(entries[-1], metric)
    )


def _suite_metrics(results: Mapping[str, Any], suite: str) -> list[str]:
    return list(dict.fromkeys(name for entry in _entries(results, "suites", suite) for name in entry["metrics"]))


def _entries(results: Mapping[str, Any], kind: str, name: str) -> list[Mapping[str, Any]]:
    """Of a group or a suite at each stage; empty where there is none."""
    return [stage.get(kind, {}).get(name, {"metrics": {}}) for stage in results["stages"]]


def _shown(entry: Mapping[str, Any], metric: str) -> str:
    value = entry["metrics"].get(metric)
    return ABSENT if value is None and metric in entry.get("absent", {}) else format_value(value)


def _note(entry: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    """Such as "0.031 to 0.211" and "n = 14"."""
    if entry["metrics"].get(metric) is None:
        return ()
    count = entry.get("counts", {}).get(metric)
    counted = "" if count is None or count == entry.get("examples") else f"n = {count}"
    return tuple(part for part in (format_interval(entry.get("intervals", {}).get(metric)), counted) if part)


def _absences(results: Mapping[str, Any], kind: str, name: str) -> tuple[Absence, ...]:
    """The metrics that are absent for the same reason at the same stages together."""
    told = [i for i, stage in enumerate(results["stages"]) if name in stage.get(kind, {})]
    why: dict[tuple[str, str], list[int]] = {}
    for i, entry in enumerate(_entries(results, kind, name)):
        for metric, reason in entry.get("absent", {}).items():
            if entry["metrics"].get(metric) is None:
                why.setdefault((metric, reason), []).append(i)
    together: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (metric, reason), at in why.items():
        together.setdefault((reason, tuple(at)), []).append(metric_label(metric))
    titles = [stage["title"] for stage in results["stages"]]
    return tuple(
        Absence(
            f"{'; '.join(labels)}{'' if list(at) == told else ' (' + '; '.join(titles[i] for i in at) + ')'}", reason
        )
        for (reason, at), labels in together.items()
    )


def absent_once(found: Iterable[tuple[str, Absence]]) -> list[str]:
    """Each reason once, of (where, absence): "Absent: Truth ratio (Forget, Retain): no example has ..."."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for where, (what, why) in found:
        reasons.setdefault(why, {}).setdefault(what, []).append(where)
    return [f"Absent: {_by_place(of_reason)}: {why}" for why, of_reason in reasons.items()]


def _by_place(found: Mapping[str, Sequence[str]]) -> str:
    """Such as "Truth ratio; PrivLeak (Forget, Retain)", of {what: places}."""
    together: dict[str, list[str]] = {}
    for what, places in found.items():
        together.setdefault(", ".join(places), []).append(what)
    return "; ".join(f"{'; '.join(some)} ({places})" for places, some in together.items())


def _count(stage: Mapping[str, Any], group: str) -> str:
    return str(stage["groups"][group]["examples"]) if group in stage["groups"] else DASH
