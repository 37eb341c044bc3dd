"""Runs side by side: a table of where each ended and what attacks brought back, and forgetting drawn against keeping. It knows the
records of runs and of audits; it measures nothing."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.report.audit import attack_title, referenced
from hf_clmul.report.audit_age import of_earlier_model
from hf_clmul.report.claims import claims
from hf_clmul.report.headlines import Headline, headline
from hf_clmul.report.page import picture_of, rendered
from hf_clmul.report.tables import (
    DASH,
    FORGET,
    RETAIN,
    format_value,
    metric_in_text,
    metric_label,
    metric_value,
    reference_entry,
)
from hf_clmul.report.words import format_seconds
from hf_clmul.run.results_schema import complete_record

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """One run: where it stood before the unlearn requests and where it ended. `left` and `kept` are the first metrics of its family
    for what is forgotten (turned so that less is better) and kept; None where they were not measured."""

    name: str
    left: float | None
    kept: float | None
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """`columns` head the cells of the runs; `axes` are the labels of `left` and `kept`; `reference` is that pair of a retrained
    model, if a run recorded one (an audit's has no figure of what is kept: None); `efficient` are the runs than which no other
    forgets more and keeps more. `notes` say what keeps runs from being compared, `below` why a cell of the table is a dash."""

    columns: tuple[str, ...]
    runs: tuple[Compared, ...]
    axes: tuple[str, str]
    reference: tuple[float, float | None] | None
    efficient: frozenset[int]
    notes: tuple[str, ...]
    below: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Raises RunError for a run that is not complete, for fewer than two, and for runs of different families."""
    if len(folders) < 2:
        raise RunError("compare needs at least two run folders, such as runs/npo and runs/simnpo.")
    places = [folder.resolve() for folder in folders]
    if twice := [folder for at, folder in enumerate(folders) if places[at] in places[:at]]:
        raise RunError(f"{twice[0]} is named twice, and a run is not compared with itself: leave one out.")
    own = [_complete(folder) for folder in folders]
    read = [read_audit(folder) for folder in folders]
    old = [of_earlier_model(folder, record, audit) for folder, record, audit in zip(folders, own, read, strict=True)]
    audits = [None if earlier else audit for audit, earlier in zip(read, old, strict=True)]
    records = [referenced(record, audit) for record, audit in zip(own, audits, strict=True)]
    families = {record["model"].get("family", "causal_lm") for record in records}
    if len(families) > 1:
        raise RunError(
            f"the runs are of different families ({', '.join(sorted(families))}): their metrics are not the same."
        )
    said = headline(records[0])
    columns, metrics = _columns(said)
    names = _names(folders, records)
    runs = tuple(
        _compared(record, audit, name, said, metrics)
        for record, audit, name in zip(records, audits, names, strict=True)
    )
    below = tuple(
        _of_earlier(name, folder) for name, folder, earlier in zip(names, folders, old, strict=True) if earlier
    )
    places = [(run.left, run.kept) for run in runs]
    axes = _left_label(said.forgotten[0]), f"{metric_label(_kept(said))}, retain"
    return Comparison(columns, runs, axes, _reference(records, said), efficient(places), tuple(_notes(records)), below)


def write_comparison(folders: Sequence[Path], folder: Path) -> tuple[Comparison, Path]:
    """Writes compare.html and its figure into `folder`; returns what they show and the path of the page."""
    from hf_clmul import __version__
    from hf_clmul.paths import atomic_write
    from hf_clmul.report.compare_figure import describe_pareto, pareto_figure

    found = compare(folders)
    drawn = picture_of(lambda theme: pareto_figure(found, theme), folder / "compare.png", describe_pareto(found), "")
    page = folder / "compare.html"
    atomic_write(page, rendered("compare.html.j2", found=found, drawn=drawn, version=__version__))
    return found, page


def efficient(places: Sequence[tuple[float | None, float | None]]) -> frozenset[int]:
    """The indices of the places (left, kept) than which no other has less left and more kept (at least one of the two strictly)."""
    whole = [(i, left, kept) for i, (left, kept) in enumerate(places) if left is not None and kept is not None]
    return frozenset(
        i for i, left, kept in whole if not any(a <= left and b >= kept and (a, b) != (left, kept) for _, a, b in whole)
    )


def _complete(folder: Path) -> Record:
    return complete_record(folder, "Continue it with `hf-clmul run`, then compare.")


def _of_earlier(name: str, folder: Path) -> str:
    return (
        f"{name}: its audit is of an earlier model, and nothing of it is shown here. Audit it again with "
        f"`hf-clmul audit {shlex.quote(str(folder))}`."
    )


def _columns(said: Headline) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    metrics = [*((FORGET, metric) for metric in said.forgotten), *((RETAIN, metric) for metric in said.kept)]
    measured = tuple(f"{metric_label(metric)}, {group}" for group, metric in metrics)
    first = metric_in_text(said.forgotten[0])
    gaps = f"gap to reference, {first}", f"widest gap in the audit, {first}"
    return ("run", "how", *measured, *gaps, "time"), metrics


def _names(folders: Sequence[Path], records: Sequence[Record]) -> list[str]:
    """The runs' own names, with their folders where two have the same."""
    names = [record["name"] for record in records]
    return [
        name if names.count(name) == 1 else f"{name} ({folder.resolve().name})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _compared(
    record: Record, audit: Record | None, name: str, said: Headline, metrics: Sequence[tuple[str, str]]
) -> Compared:
    last = record["stages"][-1]
    how = ", ".join(claims(record)) or DASH
    values = tuple(format_value(metric_value(last, group, metric)) for group, metric in metrics)
    first = said.forgotten[0]
    now, entry = metric_value(last, FORGET, first), reference_entry(record, FORGET, first)
    gap = None if now is None or entry is None or entry["mean"] is None else abs(now - entry["mean"])
    return Compared(
        name,
        None if now is None else _turned(first, now),
        metric_value(last, RETAIN, _kept(said)),
        (name, how, *values, format_value(gap), _widest(audit, first), format_seconds(record["seconds"])),
    )


def _widest(audit: Record | None, metric: str) -> str:
    """The attack after which the run is furthest from the reference, or shows most where there is none."""
    if audit is None:
        return DASH
    kind = "gap" if audit["reference"] is not None else "run"
    found = [
        (point["metrics"][metric][kind]["value"], attack["attack"], point["label"])
        for attack in audit["attacks"]
        for point in attack["points"]
        if point["metrics"].get(metric, {}).get(kind) is not None
    ]
    if not found:
        return DASH
    value, attack, label = max(found, key=lambda told: told[0] if kind == "gap" else _turned(metric, told[0]))
    told = f"{attack_title(attack).lower()}, {label}"
    return f"{format_value(value)} ({told})" if kind == "gap" else f"no reference; {format_value(value)} ({told})"


def _reference(records: Sequence[Record], said: Headline) -> tuple[float, float | None] | None:
    """Of the first run that has both figures, else of the first that has the forget group's."""
    found: list[tuple[float, float | None]] = []
    for record in records:
        left, kept = (
            None if entry is None else entry["mean"]
            for entry in (
                reference_entry(record, FORGET, said.forgotten[0]),
                reference_entry(record, RETAIN, _kept(said)),
            )
        )
        if left is not None:
            found.append((_turned(said.forgotten[0], left), kept))
    return next((pair for pair in found if pair[1] is not None), found[0] if found else None)


def _notes(records: Sequence[Record]) -> list[str]:
    """What keeps these figures from being compared as they are."""
    notes = []
    if len({record["model"]["sha256"] for record in records}) > 1:
        notes.append("The runs began with different models.")
    counts = {tuple(sorted((g, e["examples"]) for g, e in r["stages"][-1]["groups"].items())) for r in records}
    digests = {record["stages"][-1].get("evaluated") for record in records}
    if len(counts) > 1 or len(digests) > 1:
        notes.append("The runs were not measured on the same examples.")
    if len({record["seed"] for record in records}) == 1 or len({record["name"] for record in records}) == len(records):
        notes.append("One seed each: differences may be chance.")
    return notes


def _kept(said: Headline) -> str:
    """The metric of the vertical axis: the first that every run of the family has."""
    return "far_retain_accuracy" if "far_retain_accuracy" in said.kept else said.kept[0]


_ACCURACY_OF_FORGETTING = "unlearning_accuracy"


def _turned(metric: str, value: float) -> float:
    """What is left of what was to be forgotten: UA says how much is gone."""
    return 1 - value if metric == _ACCURACY_OF_FORGETTING else value


def _left_label(metric: str) -> str:
    return "Still drawn (1 − UA)" if metric == _ACCURACY_OF_FORGETTING else f"{metric_label(metric)}, forget"
