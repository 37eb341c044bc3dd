"""The tables of `hf-clmul ls`: what a recipe can name, one line each. It reads the tables of the packages and
loads nothing else."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from hf_clmul.evaluation import SUITES
from hf_clmul.evaluation.audit.attacks import attacks_of
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.models import FAMILIES, TEACHERS
from hf_clmul.objectives import terms_of
from hf_clmul.objectives.penalties import PENALTIES
from hf_clmul.recipe.checks import TERM_TABLES
from hf_clmul.recipe.sources import builtin_names

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
    """The values of a suite: a line for each metric of each group, with its interval and count, or why there is none."""
    table = Table("group", "metric", "value", "95 % interval", "n", title=f"{record['target']}: {record['suite']}")
    for group, entry in {**record["groups"], **{f"all ({name})": e for name, e in record["suites"].items()}}.items():
        for name, value in entry["metrics"].items():
            if value is None:
                table.add_row(group, name, "absent", escape(entry["absent"][name]), "")  # formulas have brackets
                continue
            between = " to ".join(f"{bound:.3f}" for bound in entry["intervals"].get(name, ()))
            table.add_row(group, name, f"{value:.4g}", between, str(entry["counts"][name]))
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
