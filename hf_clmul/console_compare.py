"""The tables printed by a comparison, by rich. It knows a comparison and terminals, and no files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from hf_clmul.report.compare import Comparison

BESIDE = 4
"""Runs that fit into 80 columns."""


def comparison_tables(found: "Comparison") -> "Iterator[Table]":
    """What was measured as rows, runs as columns; of many runs several tables, one below the other."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for first in range(0, len(found.runs), BESIDE):
        runs = found.runs[first : first + BESIDE]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column(found.columns[0], overflow="fold", max_width=28)
        for run in runs:
            table.add_column(Text(run.name), justify="right", overflow="fold", min_width=8)
        for at, column in enumerate(found.columns[1:], 1):
            table.add_row(Text(column), *(Text(run.cells[at]) for run in runs))
        yield table
