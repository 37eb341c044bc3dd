"""The tables printed at the end of an audit, by rich. It knows the record and terminals, and no files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_clmul.evaluation.audit.verdict import came_back, points_after, telling, word
from hf_clmul.report.tables import DASH, format_value

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Record = Mapping[str, Any]


def print_audit(record: Record, console: "Console") -> None:
    """Prints the figures, then the verdict."""
    for table in (audit_table(record), own_table(record)):
        if table is not None:
            console.print()
            console.print(table)
    for sentence in record["verdict"]:
        console.print(f"- {sentence}", markup=False, highlight=False)


def audit_table(record: Record) -> "Table":
    """Attacks and their points as rows, the metrics that were measured before any attack as columns: the run's value and, of a
    reference, its value under the same attack. What came back is marked. Attacks that were not tried have no figures, and those
    with figures of their own are in `own_table`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    metrics = list(record["before"])
    caption = Text("* rose: the intervals are apart")
    if record["reference"] is not None:
        back = "came back" if record.get("held", True) else "rose"
        caption = Text(f"run / reference under the same attack; * {back}: the intervals are apart")
    table = Table(title=Text(f"{record['name']}: does it come back?"), caption=caption, box=box.SIMPLE_HEAD, padding=0)
    table.title_justify = table.caption_justify = "left"
    table.add_column("attack", overflow="fold", min_width=16)
    for name in metrics:
        table.add_column(Text(word(name)), justify="right", min_width=10, max_width=12, overflow="fold")
    table.add_row(Text("before attacks", style="bold"), *(_cell(record["before"].get(name)) for name in metrics))
    for attack in record["attacks"]:
        points = [point for point in points_after(attack) if set(point["metrics"]) & set(metrics)]
        if not points:
            continue
        table.add_section()
        table.add_row(Text(attack["attack"], style="bold"))
        back = came_back(attack, record["before"])
        for point in points:
            marks = {name: "*" * (back.get(name) is point) for name in metrics}
            cells = [_cell(point["metrics"].get(name), marks[name]) for name in metrics]
            table.add_row(Text(f"  {point['label']}"), *cells)
    return table


def own_table(record: Record) -> "Table | None":
    """The metrics that only one attack has, at the point that tells most; None where there are none."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text("measured by one attack alone"), title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("attack", "metric", "after", "run", "reference")[: 4 if record["reference"] is None else 5]
    for name in columns:
        table.add_column(name, justify="right" if name in columns[3:] else "left", overflow="fold")
    for attack in record["attacks"]:
        points = points_after(attack)
        metrics = dict.fromkeys(name for point in points for name in point["metrics"] if name not in record["before"])
        first = attack["attack"]
        for name in metrics:
            point = telling(name, points)
            entry = point["metrics"][name]
            # In a table of few columns there is room for what two decimals would make 0: a probability of 0.0029.
            run, other = (format_value(entry[of] and entry[of]["value"]) for of in ("run", "reference"))
            cells = (word(name), point["label"], run, other)
            table.add_row(Text(first, style="bold"), *map(Text, cells[: len(columns) - 1]))
            first = ""
    return table if table.row_count else None


def _cell(entry: Record | None, mark: str = "") -> str:
    if entry is None:
        return DASH
    other = "" if entry["reference"] is None else f"/{entry['reference']['value']:.2f}"
    return f"{entry['run']['value']:.2f}{mark}{other}"
