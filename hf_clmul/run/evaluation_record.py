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
AGAIN = "Give `hf-clmul evaluate` again: what was measured is read back."


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
    try:
        found = json.loads(path.read_text("utf-8"))
        schema = found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no record of an evaluation ({error!r}). {AGAIN}") from error
    if schema != SCHEMA or isinstance(schema, bool):
        raise RunError(f"{path} has schema {schema!r}, and this version reads {SCHEMA}. {AGAIN}")
    try:
        Evaluation.model_validate(found)
    except ValidationError as error:
        raise RunError(f"{path} is no record of an evaluation: {first_problem(error)}. {AGAIN}") from None
    return found


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """All that were made of a run, by name of the suite. Raises RunError as `read_evaluation`."""
    return [read_evaluation(path) for path in sorted((run / FOLDER).glob("*.json"))]


def has_numbers(record: Mapping[str, Any]) -> bool:
    """Whether a suite, where it asked for any metric, found a value of one."""
    entries = [*record["groups"].values(), *record["suites"].values()]
    values = [value for entry in entries for value in entry["metrics"].values()]
    return any(value is not None for value in values) or not values
