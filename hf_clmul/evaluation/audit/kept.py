"""What one model did under one attack, measured points with all their values, kept on disk until something that they depend on
changes. An audit that was killed goes on from there."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_clmul.evaluation.audit.protocol import Point
from hf_clmul.paths import atomic_write

RUN, REFERENCE = "run", "reference"


@dataclass(frozen=True)
class Attacked:
    """The points of an attack on one model, or why there are none, and what it cost. `key` is a digest of all that it depends on.

    `peak_memory_bytes`: of the device; without one, the most that the process had held by then.
    """

    key: str
    points: list[Point]
    seconds: float
    peak_memory_bytes: int | None = None
    absent: str | None = None


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


def _point(plain: Mapping[str, Any]) -> Point:
    against = {name: (pair[0], pair[1]) for name, pair in plain["against"].items()}
    return Point(**{**plain, "against": against})
