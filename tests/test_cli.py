"""The command line: every error is a message and an exit code, nothing heavy is imported early, and other
ranks are silent."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from small_recipe import RECIPE, changed, write
from test_recipe_checks import MISTAKES, with_names
from typer.testing import CliRunner, Result

import hf_clmul
from hf_clmul.cli import app
from hf_clmul.cli_output import names_of
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation import SUITES
from hf_clmul.evaluation.audit.attacks import ATTACKS, PICTURE_ATTACKS
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.models import TEACHERS
from hf_clmul.objectives import TERMS
from hf_clmul.objectives.penalties import PENALTIES
from hf_clmul.recipe import sources as recipe_sources
from hf_clmul.recipe.load import dump_recipe, load_recipe, recipe_schema

PLAN = [
    {"request": "00-learn-people", "examples": {"learn": 96}, "steps": 84, "unit": "tokens", "tokens": 60000, "how": "training",
     "why": "a new task", "parts": [], "remembered": 0, "instead": None, "trainable_parameters": 1234567,
     "memory_bytes": 3 * 2**30, "notes": []},
    {"request": "01-unlearn-two", "examples": {"forget": 16, "retain": 80}, "steps": 40, "unit": "tokens", "tokens": 9000,
     "how": "approximate", "why": "shared weights", "parts": [], "remembered": 0,
     "instead": {"trainings": ["people after 00-learn-people", "b after 01-learn-b"], "steps": 1084},
     "trainable_parameters": None, "memory_bytes": None, "notes": ["near neighbours: up to 2 of one, nine"]},
]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "notes.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    write(RECIPE)
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Stands for hf_clmul.run.runner: records (recipe name, output) and returns a report."""
    calls: list[tuple[str, str]] = []

    def run_recipe(recipe: object, output: Path) -> Path:
        calls.append((recipe.name, str(output)))
        return output / "report/report.html"

    module = types.ModuleType("hf_clmul.run.runner")
    module.run_recipe, module.plan_recipe = run_recipe, lambda recipe: PLAN
    monkeypatch.setitem(sys.modules, "hf_clmul.run.runner", module)
    return calls


def fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def run_recipe(recipe: object, output: Path) -> Path:
        raise error

    monkeypatch.setattr(sys.modules["hf_clmul.run.runner"], "run_recipe", run_recipe)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_run_prints_the_report_and_has_a_default_folder(runs):
    result = invoke("run", "r.yaml", "name=other")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "report: runs/other/report/report.html\n"
    assert invoke("run", "r.yaml", "--output", "deep/out").stdout == "report: deep/out/report/report.html\n"
    assert runs == [("other", "runs/other"), ("small", "deep/out")]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RecipeError("r.yaml: two\nlines"), 2, "r.yaml: two\nlines\n"),
        (RunError("disk [full]"), 1, "disk [full]\n"),
        (ValueError("odd\n  value"), 1, "ValueError: odd value\nrun again with --debug for the traceback\n"),
        (ZeroDivisionError(), 1, "ZeroDivisionError\nrun again with --debug for the traceback\n"),
        (KeyboardInterrupt(), 130, "stopped; run the same command to continue\n"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(runs, monkeypatch, error, code, message):
    fails_with(monkeypatch, error)
    result = invoke("run", "r.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", message)


@pytest.mark.parametrize(("error", "code"), [(RecipeError("no"), 2), (RunError("no"), 1), (ValueError("no"), 1)])
def test_debug_shows_the_traceback_with_the_same_exit_code(runs, monkeypatch, error, code):
    fails_with(monkeypatch, error)
    result = invoke("run", "r.yaml", "--debug")
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.endswith("no\n")


@pytest.mark.parametrize(("variable", "rank"), [("RANK", "1"), ("LOCAL_RANK", "3")])
def test_other_ranks_print_nothing(runs, monkeypatch, variable, rank):
    monkeypatch.setenv(variable, rank)
    result = invoke("run", "r.yaml")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    fails_with(monkeypatch, RunError("seen on every rank"))
    failed = invoke("run", "r.yaml")
    assert (failed.exit_code, failed.stdout, failed.stderr) == (1, "", "")
    bad = invoke("run", "r.yaml", "seed=x")
    assert (bad.exit_code, bad.stdout, bad.stderr) == (2, "", "")


def test_the_first_process_of_another_machine_is_silent_too(runs, monkeypatch):
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert invoke("run", "r.yaml").stdout == ""
    monkeypatch.setenv("RANK", "0")
    assert invoke("run", "r.yaml").stdout == "report: runs/small/report/report.html\n"


def test_an_unexpected_failure_of_one_rank_is_not_silent(runs, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    fails_with(monkeypatch, MemoryError("too big"))
    assert invoke("run", "r.yaml").stderr.startswith("rank 2: MemoryError: too big\n")


def test_validate_names_the_requests():
    result = invoke("validate", "r.yaml")
    assert (result.exit_code, result.stdout) == (0, "r.yaml: valid; learn people, learn notes, unlearn two\n")


@pytest.mark.parametrize("command", ["validate", "run", "plan", "show"])
def test_commands_report_a_bad_recipe_alike(command):
    result = invoke(command, "r.yaml", "seed=x", "name=A")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "r.yaml has 2 problems:\n"
        "command line: name: expected lower-case letters, digits, - and _ only; found the text 'A'\n"
        "command line: seed: expected a whole number; found the text 'x'\n"
    )


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_ends_with_exit_code_2_and_one_message(mistake):
    old, new, line = MISTAKES[mistake]
    write(changed(old, new))
    result = invoke("validate", "r.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"r.yaml has 1 problem:\n{with_names(line)}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\n", "not valid YAML"),
        ("", "an empty file"),
        ("\x00", "not valid YAML"),
        ("[" * 5000, "nested too deeply"),
        ("name: 3\nextends: gone.yaml\n", "no such file"),
        ("requests: 3\nmodel: []\ndata: x\ntraining: y\nlearning: 1\nunlearning: [2]\n", "problems"),
        ("evaluation: {suites: 3}\nunlearning: {forget: [npo], retain: 3, conflict: []}\n", "problems"),
        ("requests: [3, {learn: 3}, {learn: {training: 4}}, {unlearn: {where: 1}}]\n", "problems"),
        ("data: {a: 3}\nadapter: x\nmodel: {path: 3, scratch: {heads: x, hidden: 3}}\n", "problems"),
    ],
)
def test_no_text_makes_a_traceback(text, message):
    write(text)
    result = invoke("validate", "r.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr and "Error" not in result.stderr


def test_files_that_are_no_recipe():
    assert invoke("validate", "gone.yaml").exit_code == 2
    result = invoke("validate", ".")
    assert (result.exit_code, result.stderr) == (2, ".: is a folder; give the recipe file in it\n")


def test_show_prints_what_loads_again(folder):
    result = invoke("show", "r.yaml", "seed=5")
    assert (result.exit_code, result.stdout) == (0, dump_recipe(load_recipe("r.yaml", ["seed=5"])))
    assert json.loads(invoke("show", "--schema").stdout) == recipe_schema()
    nothing = invoke("show")
    assert (nothing.exit_code, nothing.stderr) == (
        2, "give a recipe, or --schema; `hf-clmul ls` lists the built-in ones\n"
    )  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_plan_is_a_table(runs):
    lines = invoke("plan", "r.yaml").stdout.splitlines()
    first = next(line for line in lines if "00-learn-people" in line)
    assert cells(first) == ["00-learn-people", "96 learn", "84", "60,000", "1,234,567", "3.0 GiB"]
    second = next(line for line in lines if "01-unlearn-two" in line)
    assert cells(second)[1:] == ["16 forget, 80 retain", "40", "9,000", "-", "-"]
    assert lines[-4:] == [
        "00-learn-people: training (a new task)",
        "01-unlearn-two: approximate (shared weights)",
        "  near neighbours: up to 2 of one, nine",
        "  exact would be to train again, without these rows: people after 00-learn-people, b after 01-learn-b (1,084 steps)",
    ]


def test_ls_lists_every_name_a_recipe_can_use(folder, monkeypatch):
    (folder / "builtin").mkdir()
    (folder / "builtin/first.yaml").write_text("# The first of all recipes\n" + RECIPE)
    monkeypatch.setattr(recipe_sources, "builtin_recipes", lambda: folder / "builtin")
    result = invoke("ls")
    assert result.exit_code == 0
    rows = [cells(line) for line in result.stdout.splitlines() if "│" in line]
    assert rows[0] == ["first", "The first of all recipes", "-"]
    roles = ("forget", "retain", "learn", "memory")
    terms = [name for role in roles for name, term in TERMS.items() if role in term.roles]
    names = [row[0] for row in rows if row[0]]  # a long line goes on in a row without a name
    assert names == ["first", *terms, *PENALTIES, *CONFLICT_RULES, *TEACHERS, *ATTACKS, *PICTURE_ATTACKS, *SUITES]
    for title in ("memory terms of language models (learning.memory, unlearning.memory)",
                  "memory terms of diffusion models (learning.memory, unlearning.memory)", 
                  "penalties (learning.penalties, unlearning.penalties)",
                  "conflict rules (learning.conflict, unlearning.conflict)"):  # fmt: skip
        assert result.stdout.count(title) == 1
    assert ["esd", "guides away from the concept's prompt", "arXiv 2303.07345"] in rows
    assert ["npo", "negative preference optimisation against the teacher", "arXiv 2404.05868"] in rows


def test_cp_copies_and_does_not_overwrite(folder, monkeypatch):
    (folder / "builtin").mkdir()
    (folder / "builtin/first.yaml").write_text(RECIPE.replace("notes.jsonl", "user/notes"))
    monkeypatch.setattr(recipe_sources, "builtin_recipes", lambda: folder / "builtin")
    assert invoke("cp", "first").stdout == "first.yaml\n"
    assert invoke("validate", "first.yaml").exit_code == 0
    again = invoke("cp", "first")
    assert (again.exit_code, again.stderr) == (
        1, "first.yaml already exists and is not overwritten; choose another destination\n"
    )  # fmt: skip
    unknown = invoke("cp", "frist")
    assert unknown.exit_code == 2
    assert unknown.stderr.endswith("there are: first; did you mean 'first'?\n")


def test_report_passes_the_folder_on(monkeypatch):
    module = types.ModuleType("hf_clmul.run.card")
    module.report_anew = lambda run: run / "report/report.html"
    monkeypatch.setitem(sys.modules, "hf_clmul.run.card", module)
    assert invoke("report", "runs/small").stdout == "report: runs/small/report/report.html\n"


@pytest.mark.parametrize(("command", "option"), [("audit", "--attacks"), ("evaluate", "--suites")])
def test_an_option_that_names_nothing_is_no_silent_default(command, option):
    for given in (",", " ", ""):
        result = invoke(command, "runs/none", option, given)
        assert (result.exit_code, result.stderr) == (
            2, f"{option}: it names nothing. Give names, with commas between them, or leave it out.\n"
        )  # fmt: skip
    assert names_of(option, " a,b ,") == ["a", "b"] and names_of(option, None) is None


def test_env_and_version():
    lines = dict(line.split(": ", 1) for line in invoke("env").stdout.splitlines())
    assert lines["hf_clmul"] == hf_clmul.__version__
    assert lines["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "peft", "accelerate", "datasets", "device", "cores"} <= lines.keys()
    assert invoke("--version").stdout == f"hf_clmul {hf_clmul.__version__}\n"


PROBE = """
import sys
from hf_clmul.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
heavy = ["torch", "transformers", "datasets", "peft", "numpy", "matplotlib", "huggingface_hub"]
print("heavy:", [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["validate", "r.yaml"], ["show", "r.yaml"], ["ls"]]
)
def test_nothing_heavy_is_imported_before_work_starts(repo, arguments):
    result = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(repo)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_the_package_runs_as_a_module(repo):
    result = subprocess.run(
        [sys.executable, "-m", "hf_clmul", "validate", "r.yaml", "seed=x"],
        capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(repo)},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.endswith("command line: seed: expected a whole number; found the text 'x'\n")
