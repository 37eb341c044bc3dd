"""Measuring in chunks that outlive a kill: each chunk of examples is on disk as soon as it is measured, until the whole is. Knows
files and ranks; not what a row holds, nor what measured it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_clmul.hashes import digest
from hf_clmul.paths import atomic_write

Row = dict[str, Any]
FOLDER = "measured"
BATCHES = 16
"""Batches of answers in a chunk: enough that sorting them by length saves padding, few enough to lose."""


def measured(
    examples: Sequence[Any],
    size: int | None,
    place: Path,
    identity: Any,
    measure: Callable[[Sequence[Any]], list[Row]],
) -> list[Row]:
    """The rows of `examples`, `size` of them at once (all, if None), those of finished chunks read back from `place`.

    `identity` is all that decides a row beside its example: how is measured, and with what weights. What the main process
    says of it counts. Chunks are always cut in the same places, so that a resumed measuring has the same batches. Other
    ranks than the main one have blank rows where a chunk was read back.
    """
    state = PartialState()
    step = size or max(len(examples), 1)
    chunks = [examples[start : start + step] for start in range(0, len(examples), step)]
    if not chunks:
        return []
    files = [place / FOLDER / f"{digest([identity, list(chunk)])[:24]}.jsonl" for chunk in chunks]
    kept = [_read(file) for file in files] if state.is_main_process else [None] * len(chunks)
    there = [rows is not None for rows in kept]
    broadcast_object_list(there)
    found: list[Row] = []
    for chunk, file, rows, known in zip(chunks, files, kept, there, strict=True):
        if not known:
            rows = measure(chunk)
            if state.is_main_process and len(chunks) > 1:  # a single one is written with the whole
                atomic_write(file, "".join(json.dumps(row) + "\n" for row in rows))
        found += rows if rows is not None else [{} for _ in chunk]
    return found


def forget(place: Path) -> None:
    """Deletes the chunks: the whole is on disk."""
    shutil.rmtree(place / FOLDER, ignore_errors=True)


def _read(file: Path) -> list[Row] | None:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else None
