"""The results record, results.json, and each stage's result.json: typed, and checked when they are read. docs/results-record.md says
what the keys mean. It measures nothing, and imports nothing heavy.

Keys that a later version of the same schema adds are let through; those with a default are missing in records of earlier ones.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_clmul.errors import AGAIN, RunError, reason
from hf_clmul.recipe.problems import first_problem

SCHEMA = 1
COMPLETE = "complete"
CONTINUE = "Give `hf-clmul run` again, which continues it."
STAGE_AGAIN = (
    "Delete it and give `hf-clmul run` again: what it says is measured anew, or, if a later request removed the weights, choose "
    "another folder with --output."
)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Group(_Part):
    """A group of examples at a stage. Of pictures, `samples` are prompts with what is seen."""

    examples: int
    metrics: dict[str, float | None]
    counts: dict[str, int] = {}
    intervals: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    samples: list[dict[str, Any]] = []


class Suite(_Part):
    """What a suite says of no single group."""

    metrics: dict[str, float | None]
    counts: dict[str, int] = {}
    intervals: dict[str, list[float]] = {}
    absent: dict[str, str] = {}


class Task(_Part):
    """A column of R at a stage; `rows` is a hash of which examples it has."""

    examples: int
    metrics: dict[str, float | None]
    rows: str = ""


class Stage(_Part):
    """The model before the first request, or after one. Also result.json in its folder."""

    stage: str
    kind: Literal["base", "learn", "unlearn"]
    title: str
    seconds: float
    steps: int
    examples: dict[str, int]
    how: str
    log: str | None
    groups: dict[str, Group]
    suites: dict[str, Suite] = {}
    retains: str | None = None
    tasks: dict[str, Task] = {}
    edit: Any = None
    weights_sha256: str | None = None
    tokenizer_sha256: str | None = None
    adapters: dict[str, str | None] = {}
    measured: str | None = None
    evaluated: str | None = None


class Model(_Part):
    family: str = "causal_lm"
    path: str
    dtype: str
    sha256: str | None
    parameters: int
    trainable_parameters: int
    pipeline: str | None = None
    component: str | None = None
    task: str | None = None


class Hardware(_Part):
    device: str
    cpu: str
    cores: int | None
    threads: int
    memory_bytes: int | None
    processes: int = 1


class Export(_Part):
    kind: str
    max_difference: float
    tolerance: float


class Ledger(_Part):
    events: int
    hash: str


class Judged(_Part):
    classifier: str | None = None
    clip: str | None = None
    axis: str | None = None
    near: list[str] | None = None
    near_from: str | None = None
    similarity: dict[str, float] | None = None


class Figure(_Part):
    mean: float | None
    std: float | None
    n: int | None = None


class Reference(_Part):
    groups: dict[str, dict[str, Figure]]
    source: str


class Column(_Part):
    name: str
    kind: Literal["task", "forgotten"]
    task: str
    learned: list[int]
    forgotten: list[int]


class Stream(_Part):
    columns: list[Column]
    score: str
    matrix: list[list[float | None]]
    metrics: dict[str, float | None] = {}
    single: dict[str, float | None] = {}


class Results(_Part):
    """The whole record. `schema` is checked before the rest."""

    name: str
    seed: int
    status: Literal["running", "complete"]
    recipe_sha256: str
    source: str | None
    source_revision: str | None
    created: str
    finished: str | None
    command: str
    model: Model
    versions: dict[str, str]
    hardware: Hardware
    seconds: float | None
    peak_memory_bytes: int | None
    export: Export | None
    base_sha256_after: str | None = None
    ledger: Ledger | None = None
    judged: Judged | None = None
    reference: Reference | None
    stages: list[Stage]
    stream: Stream | None = None


def read_record(root: Path, remedy: str = AGAIN) -> dict[str, Any]:
    """results.json of a run folder, as it was written. Raises RunError where there is none, and, with `remedy`, for a damaged one and
    for one of another schema."""
    path = root / "results.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is not there. Give the folder of a run, such as runs/quickstart.") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not valid JSON ({error}). {remedy}") from None
    return checked(record, str(path), remedy)


def complete_record(root: Path, remedy: str = CONTINUE) -> dict[str, Any]:
    """As `read_record`, of a run that was carried out to its end. Raises RunError, with `remedy`, for one that was not."""
    record = read_record(root)
    if record["status"] != COMPLETE or not record["stages"]:
        raise RunError(f"{root} is not complete (status {record['status']!r}). {remedy}")
    return record


def checked(record: Any, where: str, remedy: str = AGAIN) -> dict[str, Any]:
    """The record as it was given. Raises RunError where it is not what `Results` says."""
    found = record.get("schema") if isinstance(record, dict) else None
    if found != SCHEMA or isinstance(found, bool):
        raise RunError(
            f"{where}: expected `schema` {SCHEMA}, found {found!r}. Another version of hf_clmul wrote it, or something else did. "
            f"{remedy}"
        )
    _validate(Results, record, where, remedy)
    return record


def read_stage(path: Path) -> dict[str, Any] | None:
    """result.json of a stage as it was written, None where it is not finished. Raises RunError for a damaged one."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not valid JSON ({error}). {STAGE_AGAIN}") from None
    _validate(Stage, record, str(path), STAGE_AGAIN)
    return record


def read_rows(place: Path) -> list[dict[str, Any]]:
    """The rows of the stage in a folder, each with its group. Raises RunError for rows that are missing or damaged."""
    try:
        rows = [json.loads(line) for line in (place / "examples.jsonl").read_text("utf-8").splitlines()]
        return [{**row, "group": row["group"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{place / 'examples.jsonl'} cannot be read as the rows of a stage ({reason(error)}). Delete {place / 'result.json'} and "
            "the run's results.json, and give `hf-clmul run` again: the stage is measured anew; if a later request removed the weights, "
            "choose another folder with --output."
        ) from error


def _validate(part: type[BaseModel], record: Any, where: str, remedy: str) -> None:
    try:
        part.model_validate(record)
    except ValidationError as error:
        raise RunError(f"{where} is no record of a run: {first_problem(error)}. {remedy}") from None
