"""The table printed at the end of an audit, by rich. It knows the record and terminals, and no files."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_clmul.evaluation.audit.verdict import came_back, word
from hf_clmul.report.tables import DASH

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_audit(record: Mapping[str, Any], console: "Console") -> None:
    """Prints the figures, then the verdict."""
    console.print()
    console.print(audit_table(record))
    for sentence in record["verdict"]:
        console.print(f"- {sentence}", markup=False, highlight=False)


def audit_table(record: Mapping[str, Any]) -> "Table":
    """Attacks and their points as rows, metrics as columns: the run's value and, of a reference, its value under the same attack.
    What came back is marked."""
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
        table.add_section()
        tried = Text("not tried", style="dim") if attack["absent"] is not None else ""
        table.add_row(Text(attack["attack"], style="bold"), tried)
        back = came_back(attack, record["before"])
        for point in attack["points"]:
            if point["label"] != "before":
                marks = {name: "*" * (back.get(name) is point) for name in metrics}
                cells = [_cell(point["metrics"].get(name), marks[name]) for name in metrics]
                table.add_row(Text(f"  {point['label']}"), *cells)
    return table


def _cell(entry: Mapping[str, Any] | None, mark: str = "") -> str:
    if entry is None:
        return DASH
    other = "" if entry["reference"] is None else f"/{entry['reference']['value']:.2f}"
    return f"{entry['run']['value']:.2f}{mark}{other}"
