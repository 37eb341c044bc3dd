"""What one model did under one attack, measured points with all their values, kept on disk until something that they depend on
changes. An audit that was killed goes on from there; what a reference did is kept in the cache too, for other runs that are
compared with it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import JsonValue, TypeAdapter, ValidationError

from hf_clmul.evaluation.audit.protocol import SAMPLE, Point
from hf_clmul.paths import atomic_write, cache_folder

RUN, REFERENCE = "run", "reference"
AUDITS = "audits"
"""A folder of the cache."""


@dataclass(frozen=True)
class Attacked:
    """The points of an attack on one model, or why there are none (`absent`) or no more (`stopped`), and what it cost. `key` is a
    digest of all that it depends on.

    `peak_memory_bytes`: of the device; without one, the most that the process had held by then.
    """

    key: str
    points: list[Point]
    seconds: float
    peak_memory_bytes: int | None = None
    absent: str | None = None
    stopped: str | None = None


_KEPT, _ONE = TypeAdapter(dict[str, JsonValue]), TypeAdapter(Attacked)


def read_kept(file: Path) -> dict[str, Attacked]:
    """{side: what was measured} of a file, without a side that is damaged: that one is measured again then. Of a file that is no JSON
    none is left, as one JSON object holds both."""
    try:
        found = _KEPT.validate_json(file.read_bytes(), strict=True)
    except (OSError, ValueError):
        return {}
    sides = {side: _read(given) for side, given in found.items()}
    return {side: one for side, one in sides.items() if one is not None}


def _read(given: JsonValue) -> Attacked | None:
    """One side; None where it is damaged."""
    try:
        one = _ONE.validate_json(json.dumps(given), strict=True)
    except ValidationError:
        return None
    return one if _is_whole(one) else None


def write_kept(file: Path, sides: Mapping[str, Attacked]) -> None:
    atomic_write(file, json.dumps({side: asdict(one) for side, one in sides.items()}, indent=1) + "\n")


def read_cached(key: str) -> Attacked | None:
    """What a reference did, if it was measured for any run; its seconds are those of then."""
    found = read_kept(_cached(key)).get(REFERENCE)
    return found if found is not None and found.key == key else None


def write_cached(one: Attacked) -> None:
    write_kept(_cached(one.key), {REFERENCE: one})


def _cached(key: str) -> Path:
    return cache_folder() / AUDITS / f"{key}.json"


def _is_whole(one: Attacked) -> bool:
    """Whether there is all that a record is made of."""
    if not (one.points or one.absent or one.stopped):
        return False
    lengths = [{len(values) for values in point.values.values()} for point in one.points]
    samples = [sample for point in one.points for sample in point.samples]
    return all(len(of_point) <= 1 for of_point in lengths) and all(set(SAMPLE) <= set(sample) for sample in samples)
