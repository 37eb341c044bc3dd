"""The record of `hf-clmul evaluate`, RUN/evaluation/SUITE.json, checked when it is read. docs/results-record.md says what the keys mean.
It measures nothing, and imports nothing heavy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_clmul.errors import RunError
from hf_clmul.recipe.problems import first_problem
from hf_clmul.run.results_schema import Group, Suite

SCHEMA = 1
FOLDER = "evaluation"


class Evaluation(BaseModel):
    """What is read of it; more is in the file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    suite: str
    target: str
    recipe: str
    reference: str | None
    seed: int
    created: str
    groups: dict[str, Group]
    suites: dict[str, Suite]


def read_evaluation(path: Path) -> dict[str, Any]:
    """A record that `evaluate` wrote, as it was written. Raises RunError for a damaged one, and one of another version."""
    again = f"Give `hf-clmul evaluate RUN --suites {path.stem}` again, which reads back what was measured, or delete the file."
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}). {again}") from error
    if not isinstance(found, dict) or "schema" not in found:
        missing = "it has no `schema`" if isinstance(found, dict) else "it is no JSON object"
        raise RunError(f"{path} is no record of an evaluation: {missing}. {again}")
    schema = found["schema"]
    if schema != SCHEMA or isinstance(schema, bool):
        raise RunError(f"{path} has schema {json.dumps(schema)}, and this version reads {SCHEMA}. {again}")
    try:
        Evaluation.model_validate(found)
    except ValidationError as error:
        raise RunError(f"{path} is no record of an evaluation: {first_problem(error)}. {again}") from None
    return found


def read_evaluations(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All that were made of a run, by name of the suite; and of those that cannot be read, why: one keeps no other from a page."""
    records, unread = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            records.append(read_evaluation(path))
        except RunError as error:
            unread.append(str(error))
    return records, unread


def has_numbers(record: Mapping[str, Any]) -> bool:
    """Whether a suite, where it asked for any metric, found a value of one."""
    entries = [*record["groups"].values(), *record["suites"].values()]
    values = [value for entry in entries for value in entry["metrics"].values()]
    return any(value is not None for value in values) or not values
