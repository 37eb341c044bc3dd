"""The `hf-clmul` command: arguments in, one call, a table or one clear message out. It imports nothing heavy
before a command needs it, and holds no logic of its own."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from hf_clmul import __version__
from hf_clmul.cli_output import console, errors_explained, is_main_process, names_of, say

app = typer.Typer(
    help="Generative models that keep learning and can forget. A recipe lists what to learn and unlearn.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(help="The record of what was done with what data.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
Source = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, a built-in name, or hf://user/repo/file.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Settings to change.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/quickstart.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "diffusers",
    "huggingface_hub",
    "numpy",
)


def main() -> None:
    """Entry point of the console script."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        say(f"hf_clmul {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: Source,
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/RECIPE-NAME.")] = None,
    debug: Debug = False,
) -> None:
    """Execute a recipe. The same command continues a run that was stopped."""
    with errors_explained(debug):
        from hf_clmul.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        from hf_clmul.run.runner import run_recipe

        folder = output or Path("runs") / loaded.name
        report_file = run_recipe(loaded, folder)
        if is_main_process() and (folder / "results.json").is_file():
            from hf_clmul.console import print_results
            from hf_clmul.report.audit_age import current_audit
            from hf_clmul.run.results_schema import read_record

            found = read_record(folder)
            print_results(found, audit=current_audit(folder, found))
        receipts = sorted((folder / "receipts").glob("*.md"))
        if receipts:
            say(f"receipts: {', '.join(map(str, receipts[:3]))}" + (f", ... ({len(receipts)})" if receipts[3:] else ""))
        say(f"report: {report_file}")


@app.command()
def reference(
    recipe: Source,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder. Default: in the cache, where `run` finds it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Its seed; not that of the run, if left out.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, each with the next seed.")] = 1,
    debug: Debug = False,
) -> None:
    """Train the same model without what the recipe unlearns, once: what a run is compared with."""
    with errors_explained(debug):
        from hf_clmul.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        from hf_clmul.run.retrained import make_references

        for place, was_there in make_references(loaded, output, seed, seeds):
            say(f"reference: {place}" + " (was there already)" * was_there)


@app.command()
def validate(recipe: Source, overrides: Overrides = None, debug: Debug = False) -> None:
    """Check a recipe and list all its problems. Opens neither the model nor the data."""
    with errors_explained(debug):
        from hf_clmul.recipe.load import Learn, load_recipe

        loaded = load_recipe(recipe, overrides or ())
        requests = [f"learn {r.task}" if isinstance(r, Learn) else f"unlearn {r.name}" for r in loaded.requests]
        say(f"{recipe}: valid; {', '.join(requests)}")


@app.command()
def plan(recipe: Source, overrides: Overrides = None, debug: Debug = False) -> None:
    """Say what a recipe would do: examples, steps, tokens or samples, memory, and how exact each deletion is.

    Counted for one process. Several see more examples a step; where they cannot share an epoch evenly, its first examples
    come again at its end.
    """
    with errors_explained(debug):
        from hf_clmul.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides or ())
        from hf_clmul.report.words import format_bytes
        from hf_clmul.run.reference import about_reference
        from hf_clmul.run.runner import plan_recipe

        rows = plan_recipe(loaded)
        unit = rows[0]["unit"]
        columns = ("request", "examples", "steps", unit, "trainable", "memory")
        table = Table(*columns, title=f"{loaded.name}: what would happen")
        for row in rows:
            examples = ", ".join(f"{count} {role}" for role, count in row["examples"].items())
            memory = "-" if row["memory_bytes"] is None else format_bytes(row["memory_bytes"])
            counts = (_count(row[key]) for key in ("steps", unit, "trainable_parameters"))
            table.add_row(row["request"], examples, *counts, memory)
        console().print(table)
        for row in rows:
            say(f"{row['request']}: {row['how']} ({row['why']})")
            for note in row["notes"]:
                say(f"  {note}")
            if row["instead"]:
                again = ", ".join(row["instead"]["trainings"])
                say(f"  exact would be to train again, without these rows: {again} ({row['instead']['steps']:,} steps)")
        if (reference_line := about_reference(loaded)) is not None:
            say(reference_line)


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


@app.command()
def show(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="As for `run`.")] = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of recipes, for editors.")] = False,
    debug: Debug = False,
) -> None:
    """Print a recipe as it is understood: base and changes merged, defaults filled in."""
    with errors_explained(debug):
        from hf_clmul.recipe.load import dump_recipe, load_recipe, recipe_schema

        if schema:
            import json

            say(json.dumps(recipe_schema(), indent=2))
            return
        if recipe is None:
            say("give a recipe, or --schema; `hf-clmul ls` lists the built-in ones", stderr=True)
            raise typer.Exit(2)
        loaded = load_recipe(recipe, overrides or ())
        if loaded.source_revision is not None:
            say(f"# from {loaded.source} at commit {loaded.source_revision}")
        say(dump_recipe(loaded).rstrip("\n"))


@app.command("ls")
def list_names(debug: Debug = False) -> None:
    """List what a recipe can name: built-in recipes, terms, penalties, conflict rules, teachers, attacks, suites."""
    with errors_explained(debug):
        from hf_clmul.cli_tables import tables

        for table in tables():
            console().print(table)


@app.command("cp")
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A built-in recipe (`hf-clmul ls`).")],
    # Not a Path, which would drop the slash that says "a folder".
    destination: Annotated[str, typer.Argument(metavar="[DEST]", help="A new file, or a folder.")] = ".",
    debug: Debug = False,
) -> None:
    """Copy a built-in recipe, and what it builds on, to start from."""
    with errors_explained(debug):
        from hf_clmul.recipe.sources import copy_builtin

        for file in copy_builtin(name, destination):
            say(f"{file}")


@app.command()
def report(
    run_folder: RunFolder,
    debug: Debug = False,
) -> None:
    """Write the report of a run anew from its results."""
    with errors_explained(debug):
        from hf_clmul.run.card import report_anew

        say(f"report: {report_anew(run_folder)}")


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN", help="A run folder; or with --recipe a model.")],
    overrides: Overrides = None,
    recipe: Annotated[str | None, typer.Option(help="Whose data a model is measured with.")] = None,
    suites: Annotated[str | None, typer.Option(help="Such as basic,tofu. Default: those of the recipe.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Run folder of a model that never saw the forget data.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write. Default: RUN/evaluation.")] = None,
    debug: Debug = False,
) -> None:
    """Measure a run's exported model, or another model, with suites. What was measured before is read back."""
    with errors_explained(debug):
        from hf_clmul.run import evaluate as evaluation
        from hf_clmul.run.evaluation_record import has_numbers, read_evaluation

        named = names_of("--suites", suites) or ()
        files = evaluation.evaluate(target, recipe, overrides or (), named, reference, output)
        if is_main_process():
            from hf_clmul.cli_tables import evaluation_table

            records = [read_evaluation(file) for file in files]
            for file, record in zip(files, records, strict=True):
                console().print(evaluation_table(record))
                say(f"{file}")
            if recipe is None and output is None:
                from hf_clmul.run.closing import show_anew
                from hf_clmul.run.folder import RunFolder as Folder

                show_anew(folder := Folder(Path(target)))
                say(f"report: {folder.report}")
            if empty := [record["suite"] for record in records if not has_numbers(record)]:
                say(
                    f"nothing could be measured by {', '.join(empty)}: the reasons stand beside each metric",
                    stderr=True,
                )
                raise typer.Exit(1)


@app.command()
def audit(
    run_folder: RunFolder,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="ATTACK.OPTION=VALUE", help="Such as relearn.steps=20.")
    ] = None,
    attacks: Annotated[str | None, typer.Option(help="Names, with commas. Default: the recipe's, else all.")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A run or a model that never saw the data. Default: the recipe's reference.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Attack the model of a run: does what was forgotten come back? The same command continues an audit."""
    with errors_explained(debug):
        from hf_clmul.run.audit import audit_run

        record = audit_run(run_folder, names_of("--attacks", attacks), reference, overrides or ())
        from hf_clmul.console_audit import print_audit

        print_audit(record, console())


@app.command()
def compare(
    run_folders: Annotated[list[Path], typer.Argument(metavar="RUN RUN ...", help="Run folders.")],
    output: Annotated[Path, typer.Option(help="The folder to write compare.html into.")] = Path("runs/compare"),
    debug: Debug = False,
) -> None:
    """Lay runs side by side: where each ended, and forgetting drawn against keeping."""
    with errors_explained(debug):
        from hf_clmul.console_compare import comparison_tables
        from hf_clmul.report.compare import write_comparison

        found, page = write_comparison(run_folders, output)
        for table in comparison_tables(found):
            console().print(table)
        for note in (*found.below, *found.notes):
            say(note)
        say(f"comparison: {page}")


@ledger_app.command("verify")
def verify_ledger(run_folder: RunFolder, debug: Debug = False) -> None:
    """Check that nobody changed, removed, put in or moved a line of the ledger."""
    with errors_explained(debug):
        from hf_clmul.ledger.words import verified

        say(verified(run_folder))


@ledger_app.command("show")
def show_ledger(
    run_folder: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="All events, whole.")] = False,
    debug: Debug = False,
) -> None:
    """Print the ledger, the newest event last."""
    with errors_explained(debug):
        from hf_clmul.ledger.files import read_records
        from hf_clmul.ledger.words import event_rows

        records = read_records(run_folder)
        if as_json:
            say(json.dumps(records, indent=1))
            return
        table = Table("n", "time (UTC)", "event", "what")
        for row in event_rows(records):
            table.add_row(*map(Text, row))  # names may hold brackets, which are no markup
        console().print(table)


@app.command()
def receipt(
    request: Annotated[str | None, typer.Argument(metavar="[REQUEST]", help="Name of an unlearn request.")] = None,
    run_folder: Annotated[Path | None, typer.Option("--run", help="Default: here, or the only one in runs/.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: print it.")] = None,
    check: Annotated[Path | None, typer.Option(help="A receipt to compare with the run.")] = None,
    debug: Debug = False,
) -> None:
    """Give a signed record of an erasure, to hand over; or check one."""
    with errors_explained(debug):
        if (request is None) == (check is None):
            say("give the name of an unlearn request, or --check FILE", stderr=True)
            raise typer.Exit(2)
        from hf_clmul.ledger import receipt as receipts
        from hf_clmul.ledger.files import find_run
        from hf_clmul.paths import atomic_write

        folder = find_run(run_folder)
        if check is not None:
            found = receipts.check(folder, receipts.read(check))
            say("\n".join(found.lines(check)), stderr=bool(found.problems))
            raise typer.Exit(1 if found.problems else 0)
        text = receipts.receipt(folder, request)
        if output is None:
            say(text.rstrip("\n"))
        elif is_main_process():
            atomic_write(output, text)
            say(f"{output}")


@app.command()
def scan(
    run_folder: RunFolder,
    data: Annotated[Path | None, typer.Option(help="A file with erased rows, to search for their texts.")] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Blank what evaluation shows of them; delete their cached pictures.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Search a run folder for what still descends from erased examples. Exit code 1 if something does."""
    with errors_explained(debug):
        from hf_clmul.ledger.scan import scan as search

        if redact and is_main_process():
            from hf_clmul.ledger.scan_redact import redact as blank

            for name in blank(run_folder, data):
                say(f"redacted: {name}")
        found = search(run_folder, data)
        for finding in found:
            say(str(finding))
        if not any(finding.wrong for finding in found):
            say(f"{run_folder}: nothing was found that should not be there")
            return
        raise typer.Exit(1)


@app.command()
def env(debug: Debug = False) -> None:
    """Print versions and hardware, for a bug report."""
    with errors_explained(debug):
        import torch

        lines = {
            "hf_clmul": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
        }
        for package in PACKAGES:
            try:
                lines[package] = version(package)
            except PackageNotFoundError:
                lines[package] = "not installed"
        has_cuda = torch.cuda.is_available()
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if has_cuda else []
        lines["device"] = ", ".join(names) or ("mps" if torch.backends.mps.is_available() else "cpu")
        lines["cores"] = str(os.cpu_count())
        lines["threads"] = str(torch.get_num_threads())
        say("\n".join(f"{key}: {value}" for key, value in lines.items()))
