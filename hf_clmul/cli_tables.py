"""The tables of `hf-clmul ls`: what a recipe can name, one line each; and that of `hf-clmul evaluate`. It reads the tables of the
packages and loads nothing else."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from hf_clmul.evaluation import SUITES
from hf_clmul.evaluation.audit.attacks import attacks_of
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.models import FAMILIES, TEACHERS
from hf_clmul.objectives import terms_of
from hf_clmul.objectives.penalties import PENALTIES
from hf_clmul.recipe.checks import TERM_TABLES
from hf_clmul.recipe.sources import builtin_names
from hf_clmul.report.evaluations import evaluated

_ROLES = {"forget": "forget terms", "retain": "retain terms", "learn": "learning terms", "memory": "memory terms"}
NO_PAPER = "-"


def tables() -> Iterator[Table]:
    """Recipes, terms by role and family, penalties, conflict rules, teachers, attacks, suites."""
    files = builtin_names().items()
    recipes = ((name, _first_comment(file.read_text(encoding="utf-8")), NO_PAPER) for name, file in files)
    yield _table("recipes", recipes)
    for role, title in _ROLES.items():
        places = ", ".join(".".join(map(str, key)) for key, found in TERM_TABLES.items() if found == role)
        for family, models in FAMILIES.items():
            fitting = ((name, t.summary, t.paper) for name, t in terms_of(family).items() if role in t.roles)
            yield _table(f"{title} of {models.partition(':')[0]} ({places})", fitting)
    penalties = ((name, penalty.summary, penalty.paper) for name, penalty in PENALTIES.items())
    yield _table("penalties (learning.penalties, unlearning.penalties)", penalties)
    rules = ((name, rule.summary, rule.paper) for name, rule in CONFLICT_RULES.items())
    yield _table("conflict rules (learning.conflict, unlearning.conflict)", rules)
    yield _table("teachers (teacher)", ((name, summary, NO_PAPER) for name, summary in TEACHERS.items()))
    for family, models in FAMILIES.items():
        attacks = ((name, entry.summary, entry.paper) for name, entry in attacks_of(family).items())
        yield _table(f"attacks on {models.partition(':')[0]} (audit.attacks)", attacks)
    yield _table("suites (evaluation.suites)", ((name, summary, NO_PAPER) for name, summary in SUITES.items()))


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """The values of a suite, group by group, with intervals and counts; below them once why others are absent."""
    found = evaluated(record)
    caption = Text("\n".join((found.facts, *found.absent)))
    table = Table(title=Text(f"{record['target']}: {found.name}"), caption=caption)
    table.title_justify = table.caption_justify = "left"
    for name in ("metric", "value", "95 % interval", "n"):
        table.add_column(name, justify="left" if name == "metric" else "right", overflow="fold")
    for title, values in found.parts.items():
        table.add_section()
        table.add_row(Text(title, style="bold"))
        for one in values:
            table.add_row(Text(f"  {one.label}"), one.value, one.interval, one.n)
    return table


def _table(title: str, rows: Iterator[tuple[str, str, str]]) -> Table:
    table = Table(title=title, title_justify="left", expand=True)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is", ratio=1)
    table.add_column("paper", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _first_comment(text: str) -> str:
    """A recipe introduces itself in the comment that it begins with."""
    first = text.lstrip("\ufeff").split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
