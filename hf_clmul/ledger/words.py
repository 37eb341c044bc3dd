"""A ledger in words: one line an event, and what became of its check. It only reads."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_clmul.ledger.chain import CHAIN
from hf_clmul.ledger.files import LEDGER, key_of, read_records, remembered_head
from hf_clmul.ledger.key import KEY

_SHORT = 12  # characters of a hash that tell it from others


def verified(root: Path) -> str:
    """What can be said of a whole ledger. Raises RunError for a broken one."""
    records, remembered = read_records(root), remembered_head(root)
    count = f"{len(records)} event{'s' * (len(records) != 1)}"
    lines = [f"{root / LEDGER}: {count}, unbroken", f"head: {records[-1]['hash'] if records else 'none'}"]
    if remembered is None:
        lines.append("no head is remembered in results.json: lines cut off the end would not be noticed")
    else:
        lines.append(f"nothing is missing of the {remembered['events']} events that results.json remembers")
    if key_of(root, records) is None and any(record.get("key") is not None for record in records):
        lines.append(f"{KEY} is gone or another one: the ledger is anonymous, and its examples cannot be recognised")
    return "\n".join(lines)


def event_rows(records: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str, str]]:
    """Number, time, kind and summary of each event."""
    for record in records:
        time = str(record["time"])[:19].replace("T", " ")
        yield str(record["n"]), time, record["event"], _what(record)


def _what(event: dict[str, Any]) -> str:
    match event["event"]:
        case "run":
            requests, processes = len(event["requests"]), event["processes"]
            spread = f" on {processes} processes" if processes > 1 else ""
            return f"{requests} request{'s' * (requests != 1)}{spread}, recipe {_short(event['recipe_sha256'])}"
        case "data":
            root = _short(event["merkle_root"])
            return f"{event['task']}: {event['count']} examples of {event['source']}, Merkle root {root}"
        case "request":
            return event["name"] + (", resumed" if event["resumed"] else "")
        case "finished":
            steps = f"{event['steps']} steps, " if "steps" in event else ""
            return f"{event['name']}: {steps}weights {_short(event['weights_sha256'])}"
        case "derived":
            parents = ", ".join(event["parents"]) or "nothing"
            return f"{event['artefact']} ({event['kind']}), from {parents}"
        case "erased":
            deleted = len(event["deleted"])
            return f"{event['request']}: {event['count']} examples, {event['claim']}, {deleted} files deleted"
        case "lifted":
            return f"{event['tombstone']}, by {event['by']}"
        case "exported":
            return f"{event['kind']}, {len(event.get('files', {}))} files"
        case "pushed":
            return str(event["url"])
        case "audited":
            against = f", against {event['reference']}" if event["reference"] else ""
            return f"{', '.join(event['attacks']) or 'no attack'}{against}"
        case "referenced":
            return str(event["source"])
        case "redacted":
            return f"{len(event['files'])} files"
    return ", ".join(
        f"{key}: {value}" for key, value in event.items() if isinstance(value, str | int) and key not in CHAIN
    )


def _short(digest: str | None) -> str:
    return "-" if digest is None else digest[:_SHORT]
