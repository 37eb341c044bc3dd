"""The ledger: an append-only, hash-chained record of what data and requests made what artefact. It knows lines and
hashes; what an event means is its writer's business (see `records`)."""

import json
import os
import re
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from hf_clmul.errors import RunError
from hf_clmul.paths import explained_writes

START = "0" * 64
CHAIN = ("n", "time", "event", "previous", "hash")
"""What every line has beside the details of its event."""
_BLOCK = 1 << 16  # bytes read at once from the end; most lines are far shorter
_SEAL = re.compile(rb'.*(, "hash": "([0-9a-f]{64})"\})', re.DOTALL)

Head = dict[str, Any]
"""{"events": how many, "hash": of the last}: what the ledger was at some time."""


def append(path: Path, event: str, **details: Any) -> dict[str, Any]:
    """Adds one event and returns it as `verify` would give it: a JSON line that ends with the hash of all bytes before
    it, the hash of the line before among them. A half-written last line (a kill) is cut off. Reads the last line only.

    Raises RunError if the last line is broken, or the disk is full; ValueError for a detail with a name from CHAIN.
    """
    if not details.keys().isdisjoint(CHAIN):
        raise ValueError(f"a ledger's line has {', '.join(CHAIN)} of its own; name the details of {event!r} otherwise")
    with explained_writes(path):
        path.touch()
        with open(path, "r+b") as file:
            size, last, rest = _end(file)
            _check_rest(path, rest)
            n, previous = _sealed_end(path, last)
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            record = {"n": n, "time": time, "event": event, **details, "previous": previous}
            line = json.dumps(record).encode()
            file.truncate(size)
            file.seek(size)
            file.write(line[:-1] + b', "hash": "' + _hash(line).encode() + b'"}\n')
            file.flush()
            os.fsync(file.fileno())
    return {key: value for key, value in json.loads(line).items() if key != "previous"}


def head(path: Path) -> Head:
    """Number of events and hash of the last one; reads the last line only. Kept elsewhere, it shows later whether lines
    were cut off the end (`verify`). Raises RunError if the last line is broken."""
    if not path.exists():
        return {"events": 0, "hash": START}
    with open(path, "rb") as file:
        n, previous = _sealed_end(path, _end(file)[1])
    return {"events": n, "hash": previous}


def verify(path: Path, head: Head | None = None) -> list[dict[str, Any]]:
    """All events, without their hashes. Raises RunError naming the first line that was changed, removed, put in or
    moved.

    Lines removed from the end leave a whole, shorter chain: they are missed only if an earlier `head` is given, which
    may be older than the file. A half-written last line, as a kill leaves it, is not looked at.
    """
    return [{key: record[key] for key in record if key not in ("previous", "hash")} for record in records(path, head)]


def records(path: Path, head: Head | None = None) -> list[dict[str, Any]]:
    """As `verify`, with the `previous` and `hash` of each line."""
    content = path.read_bytes() if path.exists() else b""
    *lines, rest = content.split(b"\n")
    found: list[dict[str, Any]] = []
    previous = START
    for i, line in enumerate(lines):
        record = _record(line)
        if record is None or record.get("previous") != previous or record.get("n") != i:
            raise _broken(path, i + 1)
        previous = record["hash"]
        found.append(record)
    _check_rest(path, rest)
    if head is not None:
        _check_head(path, found, head)
    return found


def _check_head(path: Path, found: list[dict[str, Any]], head: Head) -> None:
    if len(found) < head["events"]:
        raise RunError(
            f"{path}: the ledger ends after {_events(len(found))}, but had {_events(head['events'])} before: lines "
            "were cut off its end. Put the file back as it was, or run the recipe into another folder with --output."
        )
    if head["events"] and found[head["events"] - 1]["hash"] != head["hash"]:
        raise _broken(path, head["events"])


def _events(number: int) -> str:
    return f"{number} event{'s' * (number != 1)}"


def _record(line: bytes) -> dict[str, Any] | None:
    """The record that a line holds, if its own hash is right: one over bytes, so that no change is too small to be
    seen."""
    seal = _SEAL.fullmatch(line)
    if seal is None or _hash(line[: seal.start(1)] + b"}") != seal[2].decode():
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _hash(line: bytes) -> str:
    return sha256(line).hexdigest()


def _end(file: BinaryIO) -> tuple[int, bytes | None, bytes]:
    """Size up to the end of the last whole line, that line (None in an empty ledger), and what follows it."""
    end = file.seek(0, os.SEEK_END)
    start, tail = end, b""
    while start and tail.count(b"\n") < 2:
        start = max(0, start - max(_BLOCK, len(tail)))
        file.seek(start)
        tail = file.read(end - start)
    whole, newline, rest = tail.rpartition(b"\n")
    return end - len(rest), whole.rpartition(b"\n")[2] if newline else None, rest


def _sealed_end(path: Path, line: bytes | None) -> tuple[int, str]:
    """Number of events and hash of the last one."""
    if line is None:
        return 0, START
    record = _record(line)
    if record is None or not isinstance(record.get("n"), int):
        raise _broken(path, path.read_bytes().count(b"\n"))
    return record["n"] + 1, record["hash"]


def _check_rest(path: Path, rest: bytes) -> None:
    """What follows the last whole line is the beginning of one: more than that was not left by a kill."""
    try:
        _, end = json.JSONDecoder().raw_decode(rest.decode(errors="replace"))
    except ValueError:
        return
    if end < len(rest.decode(errors="replace")):
        raise _broken(path, path.read_bytes().count(b"\n") + 1)


def _broken(path: Path, number: int) -> RunError:
    return RunError(
        f"{path}:{number}: the chain of hashes breaks here; the ledger was changed after it was written. "
        "Put the file back as it was, or run the recipe into another folder with --output."
    )
