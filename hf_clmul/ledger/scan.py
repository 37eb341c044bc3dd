"""Searches a run folder for what still descends from erased examples: artefacts that the ledger names, copies of
deleted files, and texts. It only reads. It knows where things lie in a run folder; nothing of models."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath

from hf_clmul.ledger.files import LEDGER, key_of, read_events
from hf_clmul.ledger.key import KEY
from hf_clmul.ledger.lineage import Descendant, descendants
from hf_clmul.ledger.records import Event, tombstones
from hf_clmul.ledger.scan_cache import cached, learn_from_references, named, referenced
from hf_clmul.ledger.scan_quotes import Needles, quoted
from hf_clmul.ledger.scan_text import (
    TABLE,
    TEXT_FILES,
    Erased,
    data_rows,
    erased_rows,
    json_values,
    plain_text,
    readable,
    rows_in,
)
from hf_clmul.report.claims import APPROXIMATE, FILTER

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".gguf")
REPORT = "report/report.html"
AUDIT = "audit/"
RECIPES = (".yaml", ".yml")
ROWS = (".json", ".jsonl", TABLE)
_LIVING = ("adapter", "checkpoint", "merge", "export", "memory")
"""Kinds that go on to exist after an approximate erasure: a `checkpoint` is the state of a model that is trained whole, where the
next request begins. Teachers and caches have done their work."""


@dataclass(frozen=True)
class Finding:
    """One line of a scan. `kind` is leftover, copy, unrecorded, quote, evaluation, cache (all wrong), or approximate, filter,
    note (said, not wrong); `path` is relative to the run folder, of kind cache and of a note on a reference to the cache
    folder; empty for a note on the whole of it."""

    kind: str
    path: str
    what: str
    todo: str = ""

    @property
    def wrong(self) -> bool:
        return self.kind not in ("approximate", "filter", "note")

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        return f"{self.kind}: {where}{self.what}" + (f"; {self.todo}" if self.todo else "")


def scan(root: Path, data: Path | None = None) -> list[Finding]:
    """Everything in a run folder that descends from erased examples. `data` is a file with rows, to know erased texts
    that are nowhere else. Raises RunError for a folder that is not a run, and for a broken ledger."""
    events = read_events(root)
    stones = tombstones(events)
    if not stones:
        return []
    found = [*_artefacts(root, events), *_copies(root, events), *_unrecorded(root, events)]
    erased = plain_texts(root, events, data)
    if erased is None:
        return [*found, without_key(root)]
    needles, captions = erased.needles(), erased.caption_needles()
    quotes = _quotes(root, erased, needles, captions)
    return [*found, *quotes, *_cached(erased, needles, captions), *_unknown(erased)]


def plain_texts(root: Path, events: Sequence[Event], data: Path | None) -> Erased | None:
    """Erased examples, with the texts that were met in rows anywhere, the cache's references included; None without the key."""
    given = data_rows(data) if data is not None else []
    key = key_of(root, events)
    if key is None:
        return None
    erased = erased_rows(events, key)
    erased.learn_texts(given)
    for path in text_files(root):
        if path.suffix in ROWS:
            values = json_values(*plain_text(path))
            rows = (row for value in values or [] for row in rows_in(value))
            erased.learn_texts(rows, of_audit=_name(root, path).startswith(AUDIT))
    learn_from_references(erased)
    return erased


def _artefacts(root: Path, events: Sequence[Event]) -> Iterator[Finding]:
    kept = {event["request"]: event["surviving"] for event in events if event["event"] == "erased"}
    for found in descendants(events):
        if (root / found.artefact).exists():
            in_use = any(PurePosixPath(name).is_relative_to(found.artefact) for name in kept[found.request])
            yield _descendant(found, in_use)
    finished = {event["name"] for event in events if event["event"] == "finished"}
    for path in sorted(root.glob("requests/*/checkpoint-*")):
        if path.parent.name in finished:
            what = "a checkpoint of a finished request is left"
            yield Finding("leftover", _name(root, path), what, "delete it")


def _descendant(found: Descendant, in_use: bool) -> Finding:
    """`in_use`: the erasure left it where it was, such as the adapter of another task that had replayed the examples."""
    of = f"{found.kind} that descends from {_count(found.rows, 'example')} which {found.request!r}"
    if found.claim == FILTER:
        return Finding("filter", found.artefact, f"{of} only filters, as the request says")
    if found.claim == APPROXIMATE and (found.after or in_use) and found.kind in _LIVING:
        return Finding("approximate", found.artefact, f"{of} unlearned approximately", "see the audit")
    todo = "purge it or delete it" if found.kind == "memory" else "delete it"
    return Finding("leftover", found.artefact, f"{of} erased{'' if found.after else ' later'}", todo)


def _copies(root: Path, events: Sequence[Event]) -> Iterator[Finding]:
    """Files of other names with the content of a deleted one; only weights and rows tell whose they are."""
    deleted: dict[str, tuple[str, str]] = {}
    for event in events:
        if event["event"] == "erased" and event["claim"] != FILTER:
            deleted |= {digest: (name, event["request"]) for name, digest in event["deleted"].items()}
            for digest in [*event["surviving"].values(), *event["rebuilt"].values()]:
                deleted.pop(digest, None)
    wanted = {PurePosixPath(name).suffix for name, _ in deleted.values()} & {*WEIGHTS, ".jsonl"}
    for path in _files(root):
        if path.suffix in wanted:
            with open(path, "rb") as file:
                name, request = deleted.get(file_digest(file, "sha256").hexdigest(), ("", ""))
            if name:
                what = f"has the content of {name}, which {request!r} deleted"
                yield Finding("copy", _name(root, path), what, "delete it")


def _unrecorded(root: Path, events: Sequence[Event]) -> Iterator[Finding]:
    """Weights that no event names could descend from anything. A request at work has checkpoints of its own."""
    recorded = [PurePosixPath(event["artefact"]) for event in events if event["event"] == "derived"]
    seen = set()
    for path in _files(root):
        place = PurePosixPath(_name(root, path))
        if path.suffix not in WEIGHTS or any(part.startswith("checkpoint-") for part in place.parts):
            continue
        if not any(place.is_relative_to(artefact) for artefact in recorded) and place.parent not in seen:
            seen.add(place.parent)
            what = "holds weights that the ledger does not name: what they descend from is not known"
            shown = place if str(place.parent) == "." else place.parent
            yield Finding("unrecorded", str(shown), what, "delete it, unless you know where it is from")


def _quotes(root: Path, erased: Erased, needles: Needles, captions: Needles) -> Iterator[Finding]:
    for path in text_files(root):
        name = _name(root, path)
        text = readable(path)
        hashes = quoted(needles, text)
        if name == REPORT:
            hashes |= erased.captioned(text)
        elif path.suffix not in RECIPES:
            hashes |= quoted(captions, text)
        if path.suffix in ROWS:
            values = json_values(*plain_text(path)) or []
            hashes |= {hit for value in values for row in rows_in(value) if (hit := erased.match(row)) is not None}
        if not hashes:
            continue
        if is_evaluation(name):
            what = f"evaluation records quote {_count(len(hashes))}"
            yield Finding(
                "evaluation", name, what, "`hf-clmul scan RUN --redact` blanks the texts and keeps the figures"
            )
        elif name.startswith("memory/"):
            yield Finding(
                "leftover",
                name,
                f"the memory holds {_count(len(hashes))}",
                "delete the rows, or the memory",
            )
        else:
            todo = "delete the file, or the texts in it"
            yield Finding("quote", name, f"quotes {_count(len(hashes))}", todo)


def _cached(erased: Erased, needles: Needles, captions: Needles) -> Iterator[Finding]:
    for file in cached(erased, needles | captions):
        todo = "`hf-clmul scan RUN --redact` deletes the file"
        what = "an audit that quotes an erased example" if file.suffix == ".json" else "a picture of an erased example"
        yield Finding("cache", named(file), f"the cache folder holds {what}", todo)
    for place in referenced(needles):
        what = "a reference in the cache folder, which is measured on erased examples, quotes them"
        yield Finding("note", named(place), what, "delete it when no run is compared with it any more")


def _unknown(erased: Erased) -> Iterator[Finding]:
    unknown = len(set(erased.stones) - erased.met)
    if unknown:
        what = f"the texts of {_count(unknown)} are nowhere in plain, so no file was searched for them"
        yield Finding("note", "", what, "--data FILE names a file that has them")


def without_key(root: Path) -> Finding:
    gone = f"{root / KEY} is gone or another one: the ledger is anonymous"
    what = f"{gone}, and erased examples cannot be recognised in any file"
    return Finding("note", "", what, "only artefacts that the ledger names were looked for")


def is_evaluation(name: str) -> bool:
    """Records that quote what was measured, forgotten examples among them, and the page that shows them."""
    parts = PurePosixPath(name).parts
    place = parts[1:] if parts[0] == "base" else parts[2:] if parts[0] == "requests" else ()
    stage = place in (("examples.jsonl",), ("result.json",)) or (len(place) == 2 and place[0] == "measured")
    audit = name.startswith(AUDIT) and name.endswith(".json")
    return name in ("results.json", REPORT) or stage or audit or parts[0] == "evaluation"


def _files(root: Path) -> Iterable[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def text_files(root: Path) -> Iterable[Path]:
    return [path for path in _files(root) if path.suffix in TEXT_FILES and path != root / LEDGER]


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _count(rows: int, noun: str = "erased example") -> str:
    return f"{rows} {noun}{'s' * (rows != 1)}"
