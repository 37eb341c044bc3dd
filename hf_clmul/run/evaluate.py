"""`hf-clmul evaluate`: measures the exported model of a run, or any other model with a recipe's data, with suites; keeps what it
measured as tables, and measures nothing that a table has. Knows runs, tables and suites; it changes no model."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.evaluation.comparison import examples as measured_examples
from hf_clmul.evaluation.suite_table import SUITE_FUNCTIONS, Tables, results
from hf_clmul.evaluation.suites import Row
from hf_clmul.evaluation.tables import SUFFIX, read_table, write_table
from hf_clmul.families.loaders import load_of
from hf_clmul.hashes import digest, file_hashes
from hf_clmul.models import adapters
from hf_clmul.models.loading import load
from hf_clmul.paths import atomic_write
from hf_clmul.plan.columns import Evaluated, evaluated, groups, texts
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run import chunks
from hf_clmul.run.folder import COMPLETE, RunFolder
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.measuring import measuring
from hf_clmul.run.request import on_main_first
from hf_clmul.run.results import hardware, versions

SCHEMA = 1
FOLDER, TABLES = "evaluation", "tables"
COLUMNS = ("logps", "hits", "token_means", "generated")  # of every table


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a folder or Hub id, with the recipe whose data it is asked about. `base_sha256` is of the model below
    an exported adapter."""

    recipe: Recipe
    model: str
    texts: Sequence[str]
    base_sha256: str | None = None

    @cached_property
    def adapter(self) -> bool:
        return (Path(self.model) / "adapter_config.json").is_file()

    @cached_property
    def loaded(self) -> Any:
        if self.adapter:  # on the base that the recipe names
            return load_of(self.recipe, self.texts)
        local = Path(self.model).is_dir()
        changed = {"path": self.model, "scratch": None, **({"revision": None} if local else {})}
        section = self.recipe.model.model_copy(update=changed)
        return load(section, self.texts, derived_seed(self.recipe.seed, "model"))

    def identity(self) -> dict[str, Any]:
        """What its numbers depend on: of a folder the files, of a model on the Hub the loaded weights."""
        if Path(self.model).is_dir():
            files = {name: hash_ for name, hash_ in file_hashes(Path(self.model)).items() if not name.endswith(".md")}
            return {"files": files, "base": self.base_sha256 or self.recipe.model.model_dump()}
        return self.loaded.hashes(self.loaded.model)

    def to(self, device: torch.device) -> Any:
        model = self.loaded.model
        return (PeftModel.from_pretrained(model, self.model).eval() if self.adapter else model).to(device)


def evaluate(
    target: str, recipe: str | None = None, overrides: Sequence[str] = (), suites: Sequence[str] = (),
    reference: Path | None = None, output: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Measures a run folder, or a model with the data of `recipe`, with `suites` (those of the recipe, if none are named).
    Writes tables of what was measured and OUTPUT/SUITE.json, by default into TARGET/evaluation; returns the latter.

    `reference` is the folder of a run that never saw the forget group. Raises RecipeError, and RunError for a run that is
    not complete, a folder that holds no run where no recipe is given, and unreadable tables.
    """
    root = Path(target)
    if recipe is None:
        _check_run(root)
    state = PartialState(cpu=not torch.accelerator.is_available())
    with quiet_libraries(), ExitStack() as held:
        chosen = load_recipe(recipe or root / "recipe.yaml", overrides)
        names = list(suites) or chosen.evaluation.suites
        _check_suites(chosen, names)
        steps = plan_steps(chosen)
        whole = groups(chosen, steps)
        wanted = evaluated(chosen, steps, whole)
        other = None if reference is None else _reference(reference)
        if recipe is None:
            on_main_first(state, lambda: held.enter_context(RunFolder(root).locked()))
            sha256 = json.loads((root / "results.json").read_text("utf-8"))["model"]["sha256"]
            subject = Subject(chosen, str(root / "model"), texts(whole), sha256)
        else:
            subject = Subject(chosen, target, texts(whole))
        place = output or (root if recipe is None else Path(FOLDER) / root.name) / FOLDER
        about = {"model": subject.identity(), "settings": asdict(measuring(chosen))}
        tables = _tables(subject, wanted, place, about, state)
        written = [place / f"{name}.json" for name in names]
        if state.is_main_process:
            for name, path in zip(names, written, strict=True):
                found = _record(name, tables, other, about, chosen, state)
                found |= {"target": root.name, "reference": None if reference is None else reference.name}
                atomic_write(path, json.dumps(found, indent=1) + "\n")
        state.wait_for_everyone()
    return written


def read_evaluation(path: Path) -> dict[str, Any]:
    """A record that `evaluate` wrote. Raises RunError for a damaged one, and one of another version."""
    try:
        found = json.loads(path.read_text("utf-8"))
        schema = found["schema"]
        found["suite"], found["groups"], found["suites"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is no record of an evaluation ({error!r}). Give `hf-clmul evaluate` again.") from error
    if schema != SCHEMA:
        raise RunError(
            f"{path} has schema {schema!r}, and this version reads {SCHEMA}. Give `hf-clmul evaluate` again: what was "
            "measured is read back."
        )
    return found


def _check_run(root: Path) -> None:
    if not (root / "results.json").is_file() or not (root / "recipe.yaml").is_file():
        raise RunError(f"{root} is not a run folder. Give one, or name the data to measure with: --recipe RECIPE.")
    try:
        status = json.loads((root / "results.json").read_text("utf-8"))["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{root / 'results.json'} cannot be read ({error!r}): give `hf-clmul run` again.") from error
    if status != COMPLETE or not (root / "model").is_dir():
        raise RunError(
            f"{root} is not complete, so that there is no model to measure: give `hf-clmul run` again first."
        )


def _check_suites(recipe: Recipe, names: Sequence[str]) -> None:
    if recipe.family != "causal_lm":
        raise RunError("evaluate measures language models; pictures are measured by `hf-clmul run` itself.")
    unknown = [name for name in names if name not in SUITE_FUNCTIONS]
    if unknown:
        raise RunError(
            f"there is no suite {unknown[0]!r} for language models; there are: {', '.join(SUITE_FUNCTIONS)}."
        )


def _reference(folder: Path) -> Tables:
    """What the reference said after its last request."""
    _check_run(folder)
    found = measured_examples(folder)
    if not found.get("forget"):
        raise RunError(
            f"{folder} measured no forget group. Name what others forget in its recipe, `evaluation: {{forget: DATA}}`, and "
            "run it again."
        )
    return found


def _tables(subject: Subject, wanted: Evaluated, place: Path, about: Any, state: PartialState) -> dict[str, list[Row]]:
    """The rows of each group, from their tables; of groups that have none, measured now, each example once."""
    files = {
        name: place / TABLES / f"{name}-{digest([about, [wanted.rows[text] for text in chosen]])[:16]}{SUFFIX}"
        for name, chosen in wanted.groups.items()
    }
    state.wait_for_everyone()
    missing = [name for name, file in files.items() if not file.is_file()]
    state.wait_for_everyone()  # all have looked before the main one writes
    found = {name: read_table(file, COLUMNS) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    unique = list(dict.fromkeys(text for name in missing for text in wanted.groups[name]))
    rows = dict(zip(unique, _measured(subject, [wanted.rows[t] for t in unique], place, about, state), strict=True))
    for name in missing:
        found[name] = [{**rows[text], "group": name} for text in wanted.groups[name]]
        if state.is_main_process:
            write_table(found[name], files[name])
            for old in files[name].parent.glob(f"{name}-*{SUFFIX}"):
                if old != files[name] and re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{16}}", old.stem):
                    old.unlink()
    if state.is_main_process:
        chunks.forget(place / TABLES)
    return {name: found[name] for name in files}


def _measured(
    subject: Subject, examples: Sequence[Any], place: Path, about: Any, state: PartialState
) -> list[Row]:  # fmt: skip
    how, title = measuring(subject.recipe), f"evaluating {Path(subject.model).name}"
    model = subject.to(state.device)

    def measure(some: Sequence[Any]) -> list[Row]:
        rows = subject.loaded.measure(model, some, how, title)
        if subject.adapter:
            with adapters.serving(model, ()) as base:
                subject.loaded.score_generated(base, some, rows, how, title)
        return rows

    rows = chunks.measured(examples, chunks.BATCHES * how.batch_size, place / TABLES, about, measure)
    if not subject.adapter and subject.recipe.model.path is not None and state.num_processes == 1:
        del model, subject.__dict__["loaded"]  # one model in memory at a time
        base = load_of(subject.recipe, subject.texts)
        base.score_generated(base.to(state.device), examples, rows, how, "reading answers with the base model")
    return rows


def _record(
    name: str,
    tables: Mapping[str, Sequence[Row]],
    reference: Tables | None,
    about: Any,
    recipe: Recipe,
    state: PartialState,
) -> dict[str, Any]:
    found = results([name], tables, reference)
    return {
        "schema": SCHEMA,
        "suite": name,
        "recipe": recipe.name,
        "seed": recipe.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "measured": digest(about),
        "settings": about["settings"],
        "groups": {group: {"examples": len(tables[group]), **entry} for group, entry in found["groups"].items()},
        "suites": found["suites"],
        "versions": versions(recipe.family),
        "hardware": hardware(state.device.type, state.num_processes),
    }
