"""The record of an audit, RUN/audit/audit.json: typed, versioned and checked when it is read. It measures nothing, and knows no
attack by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_clmul.errors import RunError
from hf_clmul.hashes import digest
from hf_clmul.recipe.problems import first_problem

SCHEMA = 1
FILE = Path("audit") / "audit.json"
REMEDY = "Audit the run again (`hf-clmul audit RUN`) to write it anew."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Value(_Part):
    """A number, of how many examples it is, and its 95 % interval; none of a single example."""

    value: float
    n: int
    low: float | None
    high: float | None


class Compared(_Part):
    """One metric of the run and of the reference under the same attack, and the distance between the two."""

    run: Value
    reference: Value | None
    gap: Value | None


class Sample(_Part):
    """What was asked, the true answer, what the run said, and what the reference did; of texts, the example's id."""

    id: str | int | None = None
    question: str
    answer: str
    generated: str
    reference: str | None


class Measured(_Part):
    """A point of an attack; `x` is on the attack's own scale (steps, samples, layers)."""

    label: str
    x: float | None
    metrics: dict[str, Compared]
    samples: list[Sample]


class AttackRecord(_Part):
    """One attack on the run and on the reference. `absent`: why it could not be tried, and then there are no points;
    `reference_absent`: why not on the reference. `stopped`, `reference_stopped`: why there are no points beyond those there are."""

    attack: str
    changes: Literal["weights", "question", "nothing"]
    summary: str
    parameters: dict[str, Any]
    seconds: float
    reference_seconds: float | None
    peak_memory_bytes: int | None
    absent: str | None
    reference_absent: str | None
    stopped: str | None = None
    reference_stopped: str | None = None
    points: list[Measured]


class Reference(_Part):
    folder: str
    name: str


class AuditRecord(_Part):
    """The whole record. `reference_missing`: why there is no reference. `scope`: what the attacked model does not hold of what was
    to be forgotten; `held`: whether it was trained on any of it."""

    schema_version: Literal[1]
    run: str
    name: str
    model_sha256: str
    reference: Reference | None
    reference_missing: str | None
    seed: int
    created: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    scope: list[str] = []
    held: bool = True
    before: dict[str, Compared]
    attacks: list[AttackRecord]
    verdict: list[str]


def model_sha256(files: Mapping[str, str], base: str | None) -> str:
    """Which model was audited: {file: hash} of all its files but the card, and of the base that an adapter stands on."""
    return digest([{name: sha256 for name, sha256 in files.items() if name != "README.md"}, base])


def checked(record: Any, where: str) -> dict[str, Any]:
    """The record as it was given. Raises RunError, with a remedy, where it is not what `AuditRecord` says."""
    version = record.get("schema") if isinstance(record, dict) else None
    if version != SCHEMA:
        raise RunError(
            f"{where} is no audit record of schema {SCHEMA}, the one that this version reads; found schema "
            f"{json.dumps(version, default=str)}. {REMEDY}"
        )
    renamed = {"schema_version": version, **{key: value for key, value in record.items() if key != "schema"}}
    try:
        AuditRecord.model_validate(renamed)
    except ValidationError as error:
        problem = first_problem(error).replace("schema_version", "schema")
        raise RunError(f"{where} is no audit record: {problem}. {REMEDY}") from None
    return record


def read_audit(root: Path) -> dict[str, Any] | None:
    """The audit of a run folder, or None where there was none. Raises RunError for a corrupt one, or one of another schema."""
    file = root / FILE
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read as JSON ({error}). {REMEDY}") from None
    return checked(record, str(file))
