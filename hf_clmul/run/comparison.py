"""How far a run is from a model that never saw the forgotten data: forget quality, utility and fluency, always together,
since a destroyed model passes a test of forget quality alone. Knows run folders' records; no models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_clmul.evaluation.metrics import Row, forget_quality, model_utility, truth_ratio
from hf_clmul.run.results_schema import complete_record, read_rows

UTILITY = ("answer_probability", "rouge_l_recall", "truth_ratio")


def compare(run: Path, reference: Path) -> dict[str, float]:
    """Compares the last stages of two run folders on the forget group.

    `forget_quality` is the p-value of a two-sample KS test between their truth ratios (arXiv 2401.06121, section 2.2.2:
    above 0.05 they cannot be told apart); `utility` the harmonic mean of probability, ROUGE-L recall and truth ratio on
    the retain group; `fluency` of the forget group's answers.
    """
    last = last_stage(run)
    metrics = last["groups"]
    return {
        "forget_quality": forget_quality(*(truth_ratios(examples(folder)["forget"]) for folder in (run, reference))),
        "utility": model_utility(metrics["retain"]["metrics"][name] for name in UTILITY),
        "fluency": metrics["forget"]["metrics"]["fluency"],
        "forget_probability": metrics["forget"]["metrics"]["answer_probability"],
        "forget_rouge": metrics["forget"]["metrics"]["rouge_l_recall"],
    }


def last_stage(run: Path) -> dict[str, Any]:
    """The record of a finished run's last stage. Raises RunError for a run that is not complete, and a record of it that cannot be
    read."""
    return complete_record(run)["stages"][-1]


def examples(run: Path, stage: str | None = None) -> dict[str, list[Row]]:
    """Per-example statistics of a stage (the last one), by group. Raises RunError, as `last_stage`, and for rows that are missing or
    damaged."""
    stage = stage or last_stage(run)["stage"]
    place = run / "base" if stage == "base" else run / "requests" / stage
    grouped: dict[str, list[Row]] = {}
    for row in read_rows(place):
        grouped.setdefault(row["group"], []).append(row)
    return grouped


def truth_ratios(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Truth ratios of the rows that have paraphrased and wrong answers."""
    found = [truth_ratio(row) for row in rows]
    return [value for value in found if value is not None]
