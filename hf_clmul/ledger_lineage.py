"""Which artefacts descend from erased examples, read from the events of a ledger alone. It looks at no file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_clmul.ledger_records import DATA, Event, tombstones


@dataclass(frozen=True)
class Descendant:
    """An artefact that was made, directly or not, from `rows` (how many) that the unlearn request `request` erased. `after`:
    it was made when the erasure had begun, so by the unlearning itself or later."""

    artefact: str
    kind: str
    request: str
    claim: str
    rows: int
    after: bool


def descendants(events: Sequence[Event]) -> list[Descendant]:
    """Descendants of tombstoned examples, by the newest record of each artefact.

    Of an artefact's parents, `data/TASK` gives the task's examples as recorded last, without those whose erasure had begun;
    another artefact gives all that it descends from itself.
    """
    stones = tombstones(events)
    erasures = {i: _began(events, i) for i, event in enumerate(events) if event["event"] == "erased"}
    ever = {example for i in erasures for example in events[i]["examples"]}
    starts: dict[int, list[int]] = {}
    for erased, began in erasures.items():
        starts.setdefault(began, []).append(erased)
    gone: dict[str, str] = {}
    began_at: dict[str, int] = {}
    claims: dict[str, str] = {}
    made: dict[str, tuple[int, str, frozenset[str]]] = {}
    tasks: dict[str, frozenset[str]] = {}
    for i, event in enumerate(events):
        for erased in starts.get(i, []):
            record = events[erased]
            gone |= dict.fromkeys(record["examples"], record["request"])
            began_at |= dict.fromkeys(record["examples"], i)
            claims[record["request"]] = record["claim"]
        match event["event"]:
            case "lifted":
                gone = {example: name for example, name in gone.items() if name != event["tombstone"]}
            case "data":
                tasks[DATA + event["task"]] = frozenset(event["examples"]) & ever
            case "derived":
                rows = _rows_of(event["parents"], tasks, gone, made)
                made[event["artefact"]] = (i, event["kind"], rows)
    found = []
    for artefact, (i, kind, rows) in made.items():
        by_request: dict[str, list[str]] = {}
        for example in rows & stones.keys():
            by_request.setdefault(stones[example], []).append(example)
        for request, examples in sorted(by_request.items()):
            after = all(i > began_at[example] for example in examples)
            found.append(Descendant(artefact, kind, request, claims[request], len(examples), after))
    return found


def _rows_of(
    parents: Iterable[str],
    tasks: dict[str, frozenset[str]],
    gone: dict[str, str],
    made: dict[str, tuple[int, str, frozenset[str]]],
) -> frozenset[str]:
    rows: frozenset[str] = frozenset()
    for parent in parents:
        if parent in tasks:
            rows |= tasks[parent] - gone.keys()
        elif parent in made:
            rows |= made[parent][2]
    return rows


def _began(events: Sequence[Event], erased: int) -> int:
    """Where the erasure began: at its first `request` event since it was last carried out; a kill may have come between."""
    name, began = events[erased]["name"], erased
    for i in range(erased - 1, -1, -1):
        if events[i].get("name") != name:
            continue
        if events[i]["event"] == "erased":
            break
        if events[i]["event"] == "request":
            began = i
    return began
