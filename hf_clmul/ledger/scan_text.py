"""Finds erased examples by their keyed hashes in files that hold rows, and their texts in any file that can be read. It
knows hashes and texts; what lies where in a run folder, and what to do about it, is `scan`'s business."""

import csv
import html
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_clmul.data.encoding import FORMATS
from hf_clmul.errors import RunError
from hf_clmul.ledger.key import keyed
from hf_clmul.ledger.records import Event, keyed_caption, keyed_id, keyed_image, tombstones
from hf_clmul.ledger.scan_quotes import SHORTEST, Needles, Texts, pieces_of, plain
from hf_clmul.report.claims import FILTER

TABLE = ".parquet"
ERASED = "(erased)"
"""What stands where an erased text stood."""
TEXT_FILES = (".json", ".jsonl", ".html", ".md", ".yaml", ".yml", ".txt", ".csv", ".log", TABLE)

Row = Mapping[str, Any]


@dataclass
class Erased:
    """The tombstones of a ledger, and the texts of those erased examples that were met in plain.

    `shown` holds the forms in which an example was met, as evaluation may show it in another than it was learned in; `probes`
    those of them that an audit made, with words of its own and of other examples. `others` are texts of other rows, of which
    `kept` were learned.

    Of pictures, evaluation shows prompts: `by_caption` has the erased examples by their captions' keyed hashes, less what
    `kept_captions` names, which surviving examples have too; `captions` are those that were met in plain.
    `images` are keyed hashes of what erased pictures are known by, and no surviving ones.
    """

    key: bytes
    stones: dict[str, str]
    by_id: dict[str, str]
    known: set[str]
    shown: dict[Texts, str] = field(default_factory=dict)
    probes: set[Texts] = field(default_factory=set)
    others: set[Texts] = field(default_factory=set)
    kept: set[Texts] = field(default_factory=set)
    by_caption: dict[str, set[str]] = field(default_factory=dict)
    kept_captions: set[str] = field(default_factory=set)
    captions: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)

    def match(self, row: Row) -> str | None:
        """Hash of the erased example that a row holds: by its texts; or by its id, where they are shown in another form
        than they were learned in; or as such a form without its id."""
        texts = _texts(row)
        if not texts or ERASED in texts:
            return None
        hashes = [keyed(self.key, form) for form in _contents(row)]
        for hashed in hashes:
            if hashed in self.stones:
                return hashed
        caption = self.caption(row)
        if caption is not None and "image" not in row:
            return min(self._of_caption(caption), default=None)
        named = None
        if row.get("id") is not None and not self.known.intersection(hashes):
            named = self.by_id.get(keyed_id(self.key, row["id"]))
        return named or self.shown.get(texts)

    def learn_texts(self, rows: Iterable[Row], of_audit: bool = False, others: bool = True) -> None:
        """Takes in the texts of rows: of erased ones to search for them, of `others` because they may be quoted. An audit shows
        forgotten examples alone, asked in other ways too: none of its rows is a kept one."""
        for row in rows:
            if (texts := _texts(row)) and ERASED not in texts:
                hashed, caption = self.match(row), self.caption(row)
                if caption is not None:
                    self._learn_caption(caption, row, hashed)
                elif hashed is not None:
                    if of_audit and texts not in self.shown:
                        self.probes.add(texts)
                    elif not of_audit:
                        self.probes.discard(texts)
                    self.shown[texts] = hashed
                elif others and not of_audit:
                    self.others.add(texts)
                    if any(keyed(self.key, form) in self.known for form in _contents(row)):
                        self.kept.add(texts)

    def caption(self, row: Row) -> str | None:
        """The caption of a row of pictures, or of a sample of one, which has it as a question that nobody answers."""
        if isinstance(row.get("caption"), str):
            return row["caption"]
        pictures = bool(self.by_caption or self.kept_captions)
        asked = row.get("question") if pictures and row.get("answer") == "" else None
        return asked if isinstance(asked, str) else None

    def image(self, reference: str) -> bool:
        """Whether a picture is erased, by what it is known by."""
        return keyed_image(self.key, reference) in self.images

    def _of_caption(self, caption: str) -> set[str]:
        hashed = keyed_caption(self.key, caption)
        return set() if hashed in self.kept_captions else self.by_caption.get(hashed, set())

    def _learn_caption(self, caption: str, row: Row, hashed: str | None) -> None:
        """A ledger from before captions were recorded knows them by the rows that have them."""
        if hashed is not None:
            self.by_caption.setdefault(keyed_caption(self.key, caption), set()).add(hashed)
        elif any(keyed(self.key, form) in self.known for form in _contents(row)):
            self.kept_captions.add(keyed_caption(self.key, caption))
        self.captions.add(caption)

    @property
    def gone_captions(self) -> dict[str, set[str]]:
        """{caption met in plain: erased examples}, without those of surviving examples."""
        return {caption: found for caption in self.captions if (found := self._of_caption(caption))}

    @property
    def met(self) -> set[str]:
        """Erased examples of which a text is known."""
        return set(self.shown.values()).union(*self.gone_captions.values())

    def caption_needles(self) -> Needles:
        """Captions to search for in texts that no recipe wrote; a recipe names prompts itself."""
        wanted = {caption: found for caption, found in self.gone_captions.items() if len(plain(caption)) >= SHORTEST}
        ways: dict[str, list[Texts]] = {}
        for caption, hashes in wanted.items():
            ways.setdefault(min(hashes), []).append((plain(caption),))
        return Needles(ways)

    def captioned(self, page: str) -> set[str]:
        """Erased examples whose captions a report shows: each between tags, or in the list that describes a figure."""
        shown = plain(page)
        return {
            min(hashes)
            for caption, hashes in self.gone_captions.items()
            if re.search(rf'[>;:"] ?{re.escape(plain(caption))} ?[<;"]', shown)
        }

    def needles(self) -> Needles:
        """What to search for. A text that is short, or that a surviving example has too, counts only with the row's others; so
        many words of it in a row count if no other row has them."""
        others = {plain(text) for texts in self.others - self.shown.keys() for text in texts}
        there = "\n".join(others)  # plain texts have no line breaks: what is found lies in one of them
        ways: dict[str, list[Texts]] = {}
        for texts, hashed in self.shown.items():
            these = tuple(text for text in map(plain, texts) if text)
            alone = [(text,) for text in these if len(text) >= SHORTEST and text not in there]
            together = [these] if sum(map(len, these)) >= SHORTEST and not set(these) <= others else []
            if alone or together:
                ways.setdefault(hashed, []).extend(alone or together)
        learned = {texts: hashed for texts, hashed in self.shown.items() if texts not in self.probes}
        return Needles(ways, pieces_of(learned, self.kept, self.others - self.kept))


def erased_rows(events: Sequence[Event], key: bytes) -> Erased:
    """What is erased and not lifted; what is only filtered is not. An id that a surviving example has too names
    nothing."""
    claims = {event["request"]: event["claim"] for event in events if event["event"] == "erased"}
    stones = {example: name for example, name in tombstones(events).items() if claims[name] != FILTER}
    pairs = {
        (identity, example)
        for event in events
        if event["event"] in ("data", "erased")
        for identity, example in zip(event["ids"], event["examples"], strict=True)
    }
    kept = {identity for identity, example in pairs if example not in stones}
    by_id = {identity: example for identity, example in pairs if example in stones and identity not in kept}
    found = Erased(key, stones, by_id, {example for _, example in pairs})
    for caption, example in _of_pictures(events, "captions"):
        if example in stones:
            found.by_caption.setdefault(caption, set()).add(example)
        else:
            found.kept_captions.add(caption)
    images = _of_pictures(events, "images")
    found.images = {image for image, example in images if example in stones}
    found.images -= {image for image, example in images if example not in stones}
    return found


def _of_pictures(events: Sequence[Event], column: str) -> set[tuple[str, str]]:
    """(keyed hash in a column, example) of rows of pictures; texts, and an older ledger, have none."""
    return {
        (value, example)
        for event in events
        if event["event"] in ("data", "erased")
        for value, example in zip(event.get(column, ()), event["examples"], strict=False)
        if value is not None
    }


def plain_text(path: Path) -> tuple[str, str]:
    """The content of a file and what kind it is, by its ending: of a table, its rows as lines of JSON. Raises RunError for a
    damaged table."""
    if path.suffix != TABLE:
        return path.read_text("utf-8", errors="replace"), path.suffix
    from hf_clmul.evaluation.tables import read_table

    return "".join(json.dumps(row, default=str) + "\n" for row in read_table(path)), ".jsonl"


def readable(path: Path) -> str:
    """All text of a file as its reader sees it: without the escapes of its format."""
    raw, suffix = plain_text(path)
    values = json_values(raw, suffix)
    if values is not None:
        return "\n".join(text for value in values for text in strings(value))
    shown = html.unescape(raw)
    unquoted = shown.replace("''", "'").replace('""', '"').replace('\\"', '"')
    return shown if unquoted == shown else f"{shown}\n{unquoted}"


def json_values(raw: str, suffix: str) -> list[Any] | None:
    """What a .json file or the lines of a .jsonl file hold, a broken line as text; None for another file, or a broken
    one."""
    try:
        if suffix == ".json":
            return [json.loads(raw)]
    except ValueError:
        return None
    return [_line(line) for line in raw.split("\n") if line.strip()] if suffix == ".jsonl" else None


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a kill can leave half a line
        return line


def rows_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping inside plain data, the outer ones first."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from rows_in(inner)


def strings(value: Any) -> Iterator[str]:
    """Every text inside plain data; of mappings, the values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def data_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a user names. Raises RunError if there are none in a form that was learned."""
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "no such file"
        raise RunError(f"--data {path}: {what}.")
    raw, suffix = plain_text(path)
    if suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(raw, newline="")))
    else:
        rows = [row for value in json_values(raw, suffix) or [] for row in rows_in(value)]
    if not any(_contents(row) for row in rows):
        known = "; ".join(" + ".join(names) for names in FORMATS)
        raise RunError(
            f"--data {path}: no examples in it. Give a .jsonl, .json or .csv file with the columns as they were "
            f"learned (after `columns` in the recipe): {known}."
        )
    return rows


def _contents(row: Row) -> list[str]:
    """The canonical forms in which the texts of a row may have been learned. Evaluation calls them question and answer,
    whatever they are called in the data."""
    forms = [{name: row[name] for name in names} for names in FORMATS if all(name in row for name in names)]
    if "question" in row and "answer" in row:
        forms.append({"prompt": row["question"], "completion": row["answer"]})
        if not row["question"]:
            forms.append({"text": row["answer"]})
    return [json.dumps(form, sort_keys=True) for form in forms]


def _texts(row: Row) -> Texts:
    """The texts of a row's first known form; of messages, what is said."""
    for names in FORMATS:
        if all(name in row for name in names):
            values = [row[name] for name in names]
            said = [[m.get("content") for m in v if isinstance(m, dict)] if isinstance(v, list) else v for v in values]
            return tuple(text for text in strings(said) if text)
    return ()
