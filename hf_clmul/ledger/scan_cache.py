"""Finds erased examples in the cache, which is no part of a run folder: pictures copied from data sets, what a model drew, and
what audits asked references. It knows names of files; of pictures it opens none."""

from collections.abc import Iterator
from pathlib import Path

from hf_clmul.data.pictures import FILE, GENERATED
from hf_clmul.evaluation.audit.kept import AUDITS
from hf_clmul.ledger.scan_quotes import Needles, quoted
from hf_clmul.ledger.scan_text import Erased, json_values, plain_text, readable, rows_in
from hf_clmul.paths import cache_folder

REFERENCES = "references"
"""A folder of the cache."""


def cached(erased: Erased, needles: Needles) -> list[Path]:
    """Files in the cache that hold pictures of erased examples, not those that surviving examples have too; and audits of
    references that quote erased examples, captions among the `needles`."""
    pictures = [file for file, reference in _files(cache_folder()) if erased.image(reference)]
    audits = sorted((cache_folder() / AUDITS).glob("*")) if needles else []
    return pictures + [file for file in audits if quoted(needles, readable(file))]


def referenced(needles: Needles) -> list[Path]:
    """What quotes erased examples among the references in the cache, whole run folders and tables of rows: they never learned
    them, but are measured on them."""
    place = cache_folder() / REFERENCES
    if not needles:
        return []
    found = [file for file in _of_references() if quoted(needles, readable(file))]
    return sorted({place / file.relative_to(place).parts[0] for file in found})


def learn_from_references(erased: Erased) -> None:
    """Takes in the texts of erased examples that references are measured on, where the run itself has none any more. Other
    recipes' references are among them: an id says nothing there."""
    for file in _of_references():
        rows = (row for value in json_values(*plain_text(file)) or [] for row in rows_in(value))
        erased.learn_texts(({key: row[key] for key in row if key != "id"} for row in rows), others=False)


def _of_references() -> list[Path]:
    place = cache_folder() / REFERENCES
    tables = [*place.glob("*.parquet"), *place.glob("*.jsonl")]
    return [*tables, *place.glob("*/base/examples.jsonl"), *place.glob("*/requests/*/examples.jsonl")]


def named(file: Path) -> str:
    """A file of the cache for messages, wherever the cache lies."""
    return file.relative_to(cache_folder()).as_posix()


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Each picture with what it is known by (see `pictures.referenced` and `images.drawn_file`)."""
    for file in sorted((folder / "pictures").glob("*.*")):
        yield file, FILE + file.stem
    for file in sorted((folder / "generated").glob("*/*.png")):
        drawn, _, number = file.stem.rpartition("-")
        yield file, f"{GENERATED}{drawn}/{number}"
