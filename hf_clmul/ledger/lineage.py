"""Which artefacts descend from erased examples, read from the events of a ledger alone. It looks at no file."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from hf_clmul.ledger.records import DATA, Event, tombstones


@dataclass(frozen=True)
class Descendant:
    """An artefact that was made, directly or not, from `rows` (how many) that the unlearn request `request` erased.
    `after`: it was made when the erasure had begun, so by the unlearning itself or later."""

    artefact: str
    kind: str
    request: str
    claim: str
    rows: int
    after: bool


@dataclass(frozen=True)
class _Made:
    """The newest record of an artefact: its place in the ledger, and which examples of interest it descends from."""

    at: int
    kind: str
    rows: frozenset[str]


def descendants(events: Sequence[Event]) -> list[Descendant]:
    """Descendants of tombstoned examples, by the newest record of each artefact.

    Of an artefact's parents, `data/TASK` gives all examples that the task was recorded with, without those whose erasure
    had begun; another artefact gives all that it descends from itself.
    """
    stones = tombstones(events)
    began, claims = {}, {}
    for i, event in enumerate(events):
        if event["event"] == "erased":
            began |= dict.fromkeys(event["examples"], _began(events, event["name"], i))
            claims[event["request"]] = event["claim"]
    found = []
    for artefact, made in _made(events, stones.keys()).items():
        by_request: dict[str, list[str]] = {}
        for example in made.rows:
            by_request.setdefault(stones[example], []).append(example)
        for request, examples in sorted(by_request.items()):
            after = all(made.at > began[example] for example in examples)
            found.append(Descendant(artefact, made.kind, request, claims[request], len(examples), after))
    return found


def closure(events: Sequence[Event], examples: Collection[str], name: str) -> list[str]:
    """Artefacts that descend from some of `examples` (keyed hashes), as it was when the unlearn request `name` (its
    folder) began, or as it is now: what an erasure of them has to delete or to make again. Sorted; the same after a
    kill."""
    before = events[: _began(events, name, len(events))]
    return sorted(artefact for artefact, made in _made(before, examples).items() if made.rows)


def _made(events: Sequence[Event], examples: Collection[str]) -> dict[str, _Made]:
    """Artefacts, with which of `examples` they descend from."""
    wanted = frozenset(examples)
    starts: dict[int, list[Event]] = {}
    for i, event in enumerate(events):
        if event["event"] == "erased":
            starts.setdefault(_began(events, event["name"], i), []).append(event)
    gone: dict[str, str] = {}
    tasks: dict[str, frozenset[str]] = {}
    made: dict[str, _Made] = {}
    for i, event in enumerate(events):
        for erased in starts.get(i, []):
            gone |= dict.fromkeys(erased["examples"], erased["request"])
        match event["event"]:
            case "lifted":
                gone = {example: request for example, request in gone.items() if request != event["tombstone"]}
            case "data":
                name = DATA + event["task"]
                tasks[name] = tasks.get(name, frozenset()) | wanted.intersection(event["examples"])
            case "derived":
                made[event["artefact"]] = _Made(i, event["kind"], _rows_of(event["parents"], tasks, gone, made))
    return made


def _rows_of(
    parents: Iterable[str],
    tasks: dict[str, frozenset[str]],
    gone: dict[str, str],
    made: dict[str, _Made],
) -> frozenset[str]:
    rows: frozenset[str] = frozenset()
    for parent in parents:
        if parent in tasks:
            rows |= tasks[parent] - gone.keys()
        elif parent in made:
            rows |= made[parent].rows
    return rows


def _began(events: Sequence[Event], name: str, end: int) -> int:
    """Where an erasure began: at the request's first `request` event since it was last carried out, before `end`; a
    kill may have come between, and a second event."""
    began = end
    for i in range(end - 1, -1, -1):
        if events[i].get("name") != name:
            continue
        if events[i]["event"] == "erased":
            break
        if events[i]["event"] == "request":
            began = i
    return began
