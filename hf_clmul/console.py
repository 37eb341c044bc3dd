"""The tables printed at the end of a run, by rich. It knows the record and terminals, and no files."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_clmul.console_audit import audit_table
from hf_clmul.evaluation.stream import TASK
from hf_clmul.report.answers import answers
from hf_clmul.report.audit import referenced
from hf_clmul.report.headlines import headline
from hf_clmul.report.stream import (
    FORGOTTEN,
    KNOWN,
    LEARNED,
    LEGEND,
    MARKS,
    UNSEEN,
    cell_state,
    has_stream,
    metric_rows,
    stage_name,
)
from hf_clmul.report.tables import (
    ABSENT,
    DASH,
    FORGET,
    HELD_OUT,
    RETAIN,
    GroupTable,
    MetricRow,
    absent_once,
    group_tables,
    group_title,
    has_unlearned,
    metric_label,
    sample_groups,
    suite_tables,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# Colours of the terminal's own palette: it knows whether its background is light or dark.
_STYLES = {FORGET: "bold yellow", RETAIN: "bold blue", HELD_OUT: "bold green"}
_SHOWN_STAGES, _WIDE = 4, 100  # one stage less in fewer columns of a terminal
_WORD = 12  # a heading's words up to this length stay in one piece
_R_ROWS, _R_COLUMNS = 11, 6
_STATES = {UNSEEN: "dim", LEARNED: "bold", KNOWN: "", FORGOTTEN: "yellow"}


def print_results(
    results: Mapping[str, Any], console: "Console | None" = None, audit: Mapping[str, Any] | None = None
) -> None:
    """Prints the samples, the metrics, R where it says more, what an audit of the run's model found, and last the answers to the
    two questions of every run that unlearned something; on standard output if no console is given."""
    from rich.console import Console

    console = console or Console()
    tables = [samples_table(results), results_table(referenced(results, audit), console.width)]
    tables += [r_table(results)] if _is_stream(results) else []
    tables += [audit_table(audit)] if audit is not None else []
    for table in tables:
        console.print()
        console.print(table)
    for answer in answers(results, audit):
        console.print()
        console.print(answer.question, answer.said, style="bold", markup=False, highlight=False)
        console.print(answer.told, markup=False, highlight=False)


def results_table(results: Mapping[str, Any], width: int = 80) -> "Table":
    """Metrics as rows, a section for each group; stages and the recorded reference as columns.

    Readable from 80 columns on. Of many stages it shows the first, the one before anything was unlearned, and the last ones:
    four, or three in a terminal of less than 100 columns; and says so.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = _shown_stages(results["stages"], _SHOWN_STAGES - (width < _WIDE))
    compared = results["reference"] is not None
    title, caption = f"{results['name']}: what was measured", _caption(results, len(shown))
    table = Table(title=Text(title), caption=Text(caption), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify = table.caption_justify = "left"
    table.add_column("metric", no_wrap=True)
    for i in shown:
        heading = _heading(results["stages"][i])
        whole = min(_WORD, max(map(len, heading.plain.split()), default=1))
        table.add_column(heading, justify="right", min_width=whole, max_width=16, overflow="fold")
    if compared:
        table.add_column("reference", justify="right", no_wrap=True)
    for group in group_tables(results):
        table.add_section()
        sizes = ", ".join(dict.fromkeys(group.examples))
        table.add_row(Text(f"{group.title}, n = {sizes}", style=_STYLES.get(group.key, "bold")))
        for row in _present(group):
            cells = [row.values[i] for i in shown] + [row.reference] * compared
            table.add_row(Text(f"  {row.label}"), *map(Text, cells))
    for suite in suite_tables(results):
        if rows := _present(suite):
            table.add_section()
            table.add_row(Text(suite.title, style="bold"))
        for row in rows:
            table.add_row(Text(f"  {row.label}"), *(Text(row.values[i]) for i in shown))
    return table


def samples_table(results: Mapping[str, Any]) -> "Table":
    """The sample questions of each group with their true answers, beside them what each stage generated; of pictures the prompts,
    and what is seen at each stage."""
    from rich.table import Table
    from rich.text import Text

    shown, said = _shown_stages(results["stages"], _SHOWN_STAGES), headline(results)
    table = Table(title=said.samples, title_justify="left", show_lines=True)
    table.add_column("question and true answer" if said.with_truth else "prompt", ratio=1, overflow="fold")
    for i in shown:
        table.add_column(_heading(results["stages"][i]), ratio=1, overflow="fold")
    for group, samples in sample_groups(results).items():
        table.add_row(Text(group_title(group), style=_STYLES.get(group, "bold")))
        for sample in samples:
            truth = ("\n", sample.answer or DASH) if said.with_truth else ()
            asked = Text.assemble((sample.question or DASH, "bold"), *truth)
            texts = [sample.generated[i][1].strip() or f"({said.nothing})" for i in shown]
            table.add_row(asked, *map(Text, texts))
    return table


def r_table(results: Mapping[str, Any]) -> "Table":
    """R in two decimals: stages as rows, tasks and forgotten parts as columns, and the metrics of the stream below.

    Readable from 80 columns on. Of many stages it shows the first and the last, of many columns the last, and says so.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = results["stream"]
    rows, columns = range(len(found["matrix"])), range(len(found["columns"]))
    shown = [*rows[:1], *rows[max(1, len(rows) - _R_ROWS) :]]
    kept = columns[-_R_COLUMNS:]
    lines = [LEGEND]
    if len(shown) < len(rows) or len(kept) < len(columns):
        left = f"{len(rows) - len(shown)} stages and {len(columns) - len(kept)} columns"
        lines.append(f"{left} are left out here; the report has them.")
    lines += [f"{row.label}: {row.value}" for row in metric_rows(results) if row.value != DASH]
    title = f"R: {metric_label(found['score'])} after each request"
    table = Table(title=Text(title), caption=Text("\n".join(lines)), box=box.SIMPLE_HEAD)
    table.title_justify = table.caption_justify = "left"
    table.add_column("after", min_width=19, max_width=26, overflow="fold")
    for j in kept:
        table.add_column(Text(found["columns"][j]["name"]), justify="right", max_width=12, overflow="fold")
    for t in shown:
        cells = []
        for j in kept:
            value, state = found["matrix"][t][j], cell_state(found["columns"][j], t)
            cells.append(Text((DASH if value is None else f"{value:.2f}") + MARKS[state], style=_STATES[state]))
        table.add_row(Text(stage_name(results["stages"][t])), *cells)
    return table


def _is_stream(results: Mapping[str, Any]) -> bool:
    """Of one task and two requests the other table says all."""
    if not has_stream(results):
        return False
    found = results["stream"]
    return len(found["matrix"]) > 3 or sum(column["kind"] == TASK for column in found["columns"]) > 1


def _shown_stages(stages: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    last = len(stages) - 1
    learned = next((i for i, stage in enumerate(stages) if stage["kind"] == "unlearn"), last + 1) - 1
    wanted = dict.fromkeys((last, learned, 0, *range(last, 0, -1)))
    return sorted(list(wanted)[:count])


def _heading(stage: Mapping[str, Any]) -> "Text":
    # Not a plain string: rich would read square brackets in it as markup.
    from rich.text import Text

    return Text(stage["title"])


def _all_tables(results: Mapping[str, Any]) -> list[GroupTable]:
    return [*group_tables(results), *suite_tables(results)]


def _present(table: GroupTable) -> list[MetricRow]:
    """Without the metrics that are absent at every stage: the caption says why."""
    return [row for row in table.rows if set(row.values) != {ABSENT}]


def _caption(results: Mapping[str, Any], shown: int) -> str:
    lines = []
    if shown < len(results["stages"]):
        lines.append(f"{len(results['stages']) - shown} stages in between are left out here; the report has them.")
    if results["reference"] is not None:
        lines.append("reference: retrained without the forgotten data, mean ± standard deviation.")
        lines.append(f"Source: {results['reference']['source']}")
    elif has_unlearned(results):
        lines.append("No figures of a model retrained without the forgotten data are recorded.")
    lines += absent_once((table.title, told) for table in _all_tables(results) for told in table.absent)
    return "\n".join(lines)
