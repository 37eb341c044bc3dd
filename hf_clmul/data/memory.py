"""The memory: which examples of what was learned are kept for replay, and how they lie on disk. A pure function of the
tasks' rows, the size and the seed: there is no state that a resume could lose or a deletion leave wrong. Knows no
training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_clmul.data.keyed_hash import keyed_hash
from hf_clmul.data.sources import Example
from hf_clmul.errors import RunError
from hf_clmul.paths import atomic_write

FILE = "rows.jsonl"
_TASK, _OWN_TASK = "task", "task column"


def quotas(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """How many of `total` places each task gets; `sizes` are the tasks' rows, in the order in which they were learned.

    Equal shares; what a small task cannot fill goes to the others, and the remainder to those learned first. Together
    they are min(total, sum of sizes). Raises ValueError if `total` or a size is negative.
    """
    if total < 0 or any(size < 0 for size in sizes.values()):
        raise ValueError(f"the memory's size and the tasks' sizes are 0 or more, found {total} and {dict(sizes)}")
    full: dict[str, int] = {}
    left = total
    while open_tasks := [task for task in sizes if task not in full]:
        share, remainder = divmod(left, len(open_tasks))
        small = {task: sizes[task] for task in open_tasks if sizes[task] <= share}
        if not small:
            given = {task: share + (i < remainder) for i, task in enumerate(open_tasks)}
            return {task: (full | given)[task] for task in sizes}
        full |= small
        left -= sum(small.values())
    return {task: full[task] for task in sizes}


def remembered(tasks: Mapping[str, Sequence[Example]], size: int, seed: int) -> dict[str, list[Example]]:
    """Of each task the rows with the smallest keyed hash of (seed, id), as many as its quota, smallest first.

    `tasks` maps each task, in the order in which they were learned, to its rows that may be kept: without those that a
    request forgets. A uniform sample of each task, whatever the order of its rows; of fewer places, the first rows.
    So after a deletion it is the memory of a history that never had the rows: no place is left empty or refilled with
    a bias, as where a reservoir counts what it has seen. Raises ValueError where two rows of a task have one id.
    """
    kept = quotas({task: len(rows) for task, rows in tasks.items()}, size)
    return {task: _smallest(task, rows, kept[task], seed) for task, rows in tasks.items()}


def write(folder: Path, memory: Mapping[str, Sequence[Example]]) -> None:
    """Writes FOLDER/rows.jsonl, whole or not at all: one row a line, keys sorted, its task's name as `task`.

    The same memory always gives the same bytes. A column of the data called `task` becomes `task column`; a value that
    JSON does not know, such as a date, becomes text. Raises RunError if the place cannot be written.
    """
    lines = [_line(task, row) for task, rows in memory.items() for row in rows]
    atomic_write(folder / FILE, "".join(lines))


def read(folder: Path) -> dict[str, list[Example]]:
    """What `write` wrote; a task without rows left nothing there. Raises RunError if it is missing or broken."""
    path = folder / FILE
    memory: dict[str, list[Example]] = {}
    try:
        for line in path.read_text("utf-8").split("\n")[:-1]:  # splitlines would split inside texts
            row = json.loads(line)
            task = row.pop(_TASK)
            if _OWN_TASK in row:
                row[_TASK] = row.pop(_OWN_TASK)
            memory.setdefault(task, []).append(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: the memory cannot be read ({error!r}). Put the file back as it was, "
            "or run the recipe into another folder with --output."
        ) from error
    return memory


def _smallest(task: str, rows: Sequence[Example], count: int, seed: int) -> list[Example]:
    by_id = {str(row["id"]): row for row in rows}
    if len(by_id) < len(rows):
        raise ValueError(f"task {task!r}: {len(rows) - len(by_id)} of its {len(rows)} rows have the id of another row")
    return [by_id[name] for name in sorted(by_id, key=lambda name: (keyed_hash("memory", seed, name), name))[:count]]


def _line(task: str, row: Example) -> str:
    if _OWN_TASK in row:
        raise ValueError(f"task {task!r}: rename the column {_OWN_TASK!r}; the memory keeps a column {_TASK!r} there")
    own = {_OWN_TASK: row[_TASK]} if _TASK in row else {}
    return json.dumps({**row, **own, _TASK: task}, sort_keys=True, ensure_ascii=False, default=str) + "\n"
