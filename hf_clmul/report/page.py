"""From the record of a run (results.json, logs, recipe, ledger) to one HTML file that opens anywhere, with
its figures beside it. It knows files and the page; words, tables and figures come from `report_*`."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_clmul.errors import AGAIN, RunError
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.evaluation.audit.verdict import FALLING
from hf_clmul.report import picture_grid
from hf_clmul.report.answers import answers
from hf_clmul.report.audit import AttackTable, attack_tables, general, referenced
from hf_clmul.report.audit_age import of_earlier_model
from hf_clmul.report.claims import claims, explained
from hf_clmul.report.evaluations import evaluated
from hf_clmul.report.headlines import headline
from hf_clmul.report.settings import facts, text_of
from hf_clmul.report.stream import (
    LEGEND,
    StreamMetric,
    StreamTable,
    Unlearned,
    has_stream,
    metric_rows,
    stream_table,
    unlearned_rows,
)
from hf_clmul.report.tables import (
    DASH,
    FORGET,
    group_keys,
    group_tables,
    has_unlearned,
    metric_keys,
    metric_label,
    metric_meaning,
    sample_groups,
    suite_tables,
)
from hf_clmul.report.words import (
    checks,
    format_seconds,
    key_figures,
    model_name,
    near_neighbours,
    summary,
)
from hf_clmul.run.evaluation_record import read_evaluations
from hf_clmul.run.results_schema import read_record

_TEMPLATE = "report.html.j2"
_DRAWN = 8  # stages: of a hundred, bars would be hair lines, and all curves together take minutes and a heavy page

Record = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """A figure for light and dark pages, as data URIs, with its words for those who do not see it."""

    light: str
    dark: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Training:
    """The curves of one request; `missing` says why there are none."""

    title: str
    facts: str
    pictures: list[Picture]
    missing: str | None


@dataclass(frozen=True)
class Stream:
    """The matrix R as a table and as a picture of `width` pixels, its metrics, and what was unlearned."""

    table: StreamTable
    legend: str
    picture: Picture
    width: int
    metrics: list[StreamMetric]
    unlearned: list[Unlearned]
    meanings: list[str]


@dataclass(frozen=True)
class Audit:
    """What attacks brought back: a table and a picture each, and what the verdict says of no single one. `count`: of the
    examples that were asked. `earlier`: the run went on after it."""

    attacks: list[tuple[AttackTable, Picture | None]]
    verdict: list[str]
    reference: str
    count: int | None = None
    earlier: bool = False


def write_report(run: Path) -> Path:
    """Writes RUN/report/report.html and its figures as PNG files beside it; returns the path of the page.

    Raises RunError if RUN/results.json is missing, and if it or an audit is broken or of another version.
    """
    from hf_clmul.paths import atomic_write

    audited = read_audit(run)
    own = read_record(run)
    if not own["stages"]:
        raise RunError(f"{run / 'results.json'} has no stage that was measured. {AGAIN}")
    earlier = of_earlier_model(run, own, audited)
    current = None if earlier else audited  # nothing is said of this model that was found of another
    results = referenced(own, current)
    measured, unread = read_evaluations(run)
    folder, tables, suites = run / "report", group_tables(results), suite_tables(results)
    page = rendered(
        _TEMPLATE,
        results=results,
        dash=DASH,
        answers=answers(own, current),
        model=model_name(results["model"]["path"]),
        summary=summary(results),
        key_figures=key_figures(results),
        checks=checks(results),
        tables=[*tables, *suites],
        noted=any(row.note for table in (*tables, *suites) for row in table.rows),
        near=near_neighbours(results),
        reference=results["reference"],
        unlearned=has_unlearned(results),
        stream=_stream(results, folder) if has_stream(results) else None,
        pictures=_grids(run, results, folder),
        said=headline(results),
        bars=_bars(results, folder),
        left_out=max(0, len(results["stages"]) - _DRAWN),
        trainings=_trainings(run, results, folder),
        evaluations=[evaluated(found, own["finished"]) for found in measured],
        unread=unread,
        audit=None if audited is None else _audit(audited, folder, earlier),
        samples=sample_groups(results),
        titles={table.key: table for table in tables},
        facts=facts(run, results),
        recipe=text_of(run / "recipe.yaml"),
    )
    path = folder / "report.html"
    atomic_write(path, page)
    return path


def rendered(template: str, **values: Any) -> str:
    """A page from a template of this folder; values from elsewhere are escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _stream(results: Record, folder: Path) -> Stream:
    from hf_clmul.report import stream_figure as figures

    return Stream(
        table=stream_table(results),
        legend=LEGEND,
        picture=picture_of(
            lambda theme: figures.heat_map(results, theme),
            folder / "stream.png",
            figures.describe_heat_map(results),
            f"{metric_label(results['stream']['score'])} of each column after each request. Framed: learned by this "
            "request; hatched: forgotten.",
        ),
        width=round(96 * figures.heat_map_width(results)),
        metrics=metric_rows(results),
        unlearned=unlearned_rows(results),
        meanings=[explained(claim, results["model"].get("family") == "diffusion") for claim in claims(results)],
    )


def _audit(record: Record, folder: Path, earlier: bool) -> Audit:
    from hf_clmul.report import audit_figure

    attacks: list[tuple[AttackTable, Picture | None]] = []
    for attack, table in zip(record["attacks"], attack_tables(record), strict=True):
        drawn = None
        if audit_figure.worth_drawing(attack):
            drawn = picture_of(
                lambda theme, attack=attack: audit_figure.attack_figure(attack, theme),
                folder / f"audit-{_file_name(table.name)}.png",
                f"{table.title}. {audit_figure.describe_attack(attack)}",
                "",
            )
        attacks.append((table, drawn))
    reference = record["reference"]
    told = (
        f"Each attack on the finished model, and the same on the reference ({reference['name']}). Gap: distance between the two; an "
        "attack that opens it brings back what a model without the data does not have."
        if reference
        else f"Each attack on the finished model. There is no reference: {record['reference_missing']}."
    )
    if any(metric in FALLING for metric in record["before"]):
        told += " Still drawn: share of the pictures in which what is to be forgotten is seen; UA is 1 minus it."
    count = next((entry["run"]["n"] for entry in record["before"].values()), None)
    return Audit(attacks, general(record), told, count, earlier)


def _grids(run: Path, results: Record, folder: Path) -> list[Picture]:
    from hf_clmul.paths import atomic_write

    found = []
    for grid in picture_grid.grids(run, results):
        light, dark = (grid.png(colours) for colours in (picture_grid.LIGHT, picture_grid.DARK))
        atomic_write(folder / f"{_file_name(grid.name)}.png", light)
        found.append(Picture(_data_uri(light), _data_uri(dark), grid.alt, grid.caption))
    return found


def _bars(results: Record, folder: Path) -> list[Picture]:
    from hf_clmul.report import figures

    if len(results["stages"]) > _DRAWN:
        results = {**results, "stages": [results["stages"][0], *results["stages"][1 - _DRAWN :]]}
    metrics = dict.fromkeys(
        name
        for group in group_keys(results)
        for name in metric_keys(results, group)
        if any(stage["groups"].get(group, {}).get("metrics", {}).get(name) is not None for stage in results["stages"])
    )
    return [
        picture_of(
            lambda theme, metric=metric: figures.metric_bars(results, metric, theme),
            folder / f"bars-{_file_name(metric)}.png",
            figures.describe_bars(results, metric),
            _bars_caption(metric),
        )
        for metric in metrics
    ]


def _bars_caption(metric: str) -> str:
    forget, others = metric_meaning(metric, FORGET), metric_meaning(metric, "")
    caption = others if forget == others else f"forget: {forget}; others: {others}"
    return caption[:1].upper() + caption[1:]


def _trainings(run: Path, results: Record, folder: Path) -> list[Training]:
    requests = [stage for stage in results["stages"] if stage["kind"] != "base"]
    return [_training(run, stage, folder, i >= len(requests) - _DRAWN) for i, stage in enumerate(requests)]


def _training(run: Path, stage: Record, folder: Path, drawn: bool) -> Training:
    from hf_clmul.report import figures

    log = stage["log"] or "its log"
    counts = ", ".join(f"{count} {role} examples" for role, count in stage["examples"].items())
    took = f"{stage['steps']} steps in {format_seconds(stage['seconds'])}"
    told = "; ".join(part for part in (stage["how"], counts, took, stage.get("retains")) if part)
    if not drawn:
        return Training(stage["title"], told, [], f"only the last {_DRAWN} requests are drawn; {log} has the numbers")
    records = [] if stage["log"] is None else _read_log(run / stage["log"])
    pictures = [
        picture_of(
            lambda theme, curves=curves: curves.draw(records, theme),
            folder / f"{_file_name(stage['stage'])}-{curves.name}.png",
            figures.describe_curves(f"{stage['title']}: {curves.name}", records, curves.prefixes),
            curves.caption,
        )
        for curves in figures.CURVES
        if figures.drawable(records, curves)
    ]
    missing = None if pictures else f"{log} holds none"
    return Training(stage["title"], told, pictures, missing)


def picture_of(draw: Callable[[Any], Any], path: Path, alt: str, caption: str) -> Picture:
    from hf_clmul.paths import atomic_write
    from hf_clmul.report.figures import pngs

    light, dark = pngs(draw)
    atomic_write(path, light)
    return Picture(_data_uri(light), _data_uri(dark), alt, caption)


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _read_log(path: Path) -> list[dict[str, float]]:
    """One record a step, in order; what a step logged twice counts as it was logged last."""
    steps: dict[float, dict[str, float]] = {}
    for line in (text_of(path) or "").splitlines():
        try:
            record = json.loads(line)
            steps.setdefault(record["step"], {}).update(record)
        except (ValueError, KeyError, TypeError):  # a kill can leave half a line at the end
            continue
    return [steps[step] for step in sorted(steps)]


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower())
