"""What one model did under one attack, measured points with all their values, kept on disk until something that they depend on
changes. An audit that was killed goes on from there; what a reference did is kept in the cache too, for other runs that are
compared with it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_clmul.evaluation.audit.protocol import Point
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


def read_kept(file: Path) -> dict[str, Attacked]:
    """{side: what was measured} of a file, empty for none and for one that cannot be read: it is measured again then."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return {
            side: Attacked(**{**one, "points": [_point(point) for point in one["points"]]})
            for side, one in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


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


def _point(plain: Mapping[str, Any]) -> Point:
    against = {name: (pair[0], pair[1]) for name, pair in plain["against"].items()}
    return Point(**{**plain, "against": against})
