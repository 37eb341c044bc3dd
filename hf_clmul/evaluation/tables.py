"""Tables of measured rows as parquet files, written whole or not at all. Knows files; nothing of what a row means.

Everything passes through memory: the cache in which `datasets` keeps what it reads from files would be one more place with
texts that were to be forgotten.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_clmul.errors import RunError, reason
from hf_clmul.paths import atomic_write

Row = dict[str, Any]
SUFFIX = ".parquet"
REMEDY = "Delete it and give the command that made it again: what is measured is written anew."
_OF = b"hf_clmul_of"


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, of: str | None = None) -> None:
    """Writes rows, one per example; where a row lacks another's key, None is written. `of` says what was measured, for
    `table_of`.

    Raises RunError if the place cannot be written, ValueError for columns that hold values of several kinds.
    """
    import datasets
    import pyarrow
    from pyarrow import parquet

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except pyarrow.ArrowException as error:
        raise ValueError(f"no table can be made of these rows: {error}") from error
    whole = table.data.table
    about = {**(whole.schema.metadata or {}), **({} if of is None else {_OF: of.encode()})}
    content = io.BytesIO()
    parquet.write_table(
        whole.replace_schema_metadata(about), content
    )  # `to_parquet` would write no metadata but its own
    atomic_write(path, content.getvalue())


def table_of(path: Path) -> str | None:
    """What the table says that it is of; None if an earlier version wrote it. Raises RunError as `read_table`."""
    from pyarrow import parquet

    with _explained(path):
        found = (parquet.read_schema(io.BytesIO(Path(path).read_bytes())).metadata or {}).get(_OF)
    return None if found is None else found.decode()


def read_table(path: Path, columns: Iterable[str] = ()) -> list[Row]:
    """The rows of a table, with at least these columns. Raises RunError for a file that is missing, damaged or of another
    kind, and says what to do."""
    import datasets
    from pyarrow import parquet

    with _explained(path):
        content = io.BytesIO(Path(path).read_bytes())
        rows = datasets.Dataset(datasets.table.InMemoryTable(parquet.read_table(content))).to_list()
    missing = [name for name in columns if rows and name not in rows[0]]
    if missing:
        raise RunError(f"{path} has no column {missing[0]!r}: it was written by another version. {REMEDY}")
    return rows


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError:
        raise RunError(f"{path}: there is no such table. Give the command that makes it again.") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise RunError(f"{path} cannot be read as a table of measured examples: {reason(error)}\n{REMEDY}") from error
