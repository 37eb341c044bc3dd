"""`hf-clmul evaluate`: measures the exported model of a run, or any other model with a recipe's data, with suites; keeps what it
measured as tables, and measures nothing that a table has. Knows runs, tables and suites; it changes no model."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.evaluation import SUITES
from hf_clmul.evaluation.audit.record import read_audit
from hf_clmul.evaluation.suite_table import Tables, results
from hf_clmul.evaluation.suites import Measuring, Row
from hf_clmul.evaluation.tables import REMEDY, SUFFIX, read_table, table_of, write_table
from hf_clmul.families.loaders import load_of
from hf_clmul.hashes import digest, file_hashes
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.files import remembered_head
from hf_clmul.models import adapters
from hf_clmul.models.loading import load
from hf_clmul.paths import atomic_write
from hf_clmul.plan.columns import Evaluated, evaluated, groups, texts
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run import chunks
from hf_clmul.run.comparison import examples as measured_examples
from hf_clmul.run.evaluate_more import check_lm_eval, muse, of_harness, of_stream
from hf_clmul.run.evaluation_record import FOLDER, SCHEMA
from hf_clmul.run.folder import RunFolder
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.measuring import measuring, plain
from hf_clmul.run.reference import found_reference
from hf_clmul.run.request import on_main_first
from hf_clmul.run.results import hardware, versions
from hf_clmul.run.results_schema import complete_record, read_record
from hf_clmul.run.retrained import alike, check_never_saw, references

log = logging.getLogger(__name__)

TABLES, REFERENCE = "tables", "reference-"
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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its numbers depend on: of a folder the files, of a model on the Hub the loaded weights."""
        if Path(self.model).is_dir():
            files = {name: hash_ for name, hash_ in file_hashes(Path(self.model)).items() if not name.endswith(".md")}
            return {"files": files, "base": self.base_sha256 or self.recipe.model.model_dump()}
        return self.loaded.hashes(self.loaded.model)

    def to(self, device: torch.device) -> Any:
        return self._whole.to(device)

    @cached_property
    def _whole(self) -> Any:
        model = self.loaded.model
        return PeftModel.from_pretrained(model, self.model).eval() if self.adapter else model

    def release(self) -> None:
        """Takes it out of memory, until it is asked for again."""
        for name in ("loaded", "_whole"):
            self.__dict__.pop(name, None)


def evaluate(
    target: str, recipe: str | None = None, overrides: Sequence[str] = (), suites: Sequence[str] = (),
    reference: Path | None = None, output: Path | None = None,
) -> list[Path]:  # fmt: skip
    """Measures a run folder, or a model with the data of `recipe`, with `suites` (those of the recipe, if none are named).
    Writes tables of what was measured and OUTPUT/SUITE.json, by default into TARGET/evaluation; returns the latter.

    `reference` is the folder of a run that never saw the forget group; by default the one that `evaluation.reference` names,
    or that `hf-clmul reference` trained. Raises RecipeError, and RunError for a run that is not complete, a folder that
    holds no run where no recipe is given, and unreadable tables.
    """
    root = Path(target)
    if recipe is None:
        _check_run(root)
    state = PartialState(cpu=not torch.accelerator.is_available())
    with quiet_libraries(), ExitStack() as held:
        chosen = load_recipe(recipe or root / "recipe.yaml", overrides)
        names = list(suites) or chosen.evaluation.suites
        _check_suites(chosen, names, recipe is None)
        steps = plan_steps(chosen)
        whole = groups(chosen, steps)
        wanted = evaluated(chosen, steps, whole)
        if reference is None:
            other = references(chosen, wanted)[1]
            reference = found_reference(chosen) if other is not None else None
        else:
            other = _reference(reference)
            alike(reference, wanted)
        if recipe is None:
            on_main_first(state, lambda: _held(RunFolder(root), held))
            subject = _of_run(chosen, root, whole)
        else:
            subject = Subject(chosen, target, texts(whole))
        place = output or (root if recipe is None else Path(FOLDER) / root.name) / FOLDER
        of = Evaluation(chosen, subject, reference, other, wanted, place, state)
        written = [place / f"{name}.json" for name in names]
        for name, path in zip(names, written, strict=True):
            found = of.record(name) | {"target": root.name}
            if state.is_main_process:
                atomic_write(path, json.dumps(found, indent=1) + "\n")
        state.wait_for_everyone()
    return written


@dataclass(frozen=True)
class Evaluation:
    """What the suites of one call share. `other` are the rows of the reference, whose run folder is `reference`."""

    recipe: Recipe
    subject: Subject
    reference: Path | None
    other: Tables | None
    wanted: Evaluated
    place: Path
    state: PartialState

    @cached_property
    def tables(self) -> dict[str, list[Row]]:
        """Measured once, when the first suite asks."""
        return _tables(self.subject, self.wanted, measuring(self.recipe), self.place, self.state)

    def record(self, name: str) -> dict[str, Any]:
        """Of one suite."""
        how, about = measuring(self.recipe), {}
        if name == "continual":
            root = Path(self.subject.model).parent
            found = of_stream(read_record(root), str(root / "results.json"))
        elif name == "lm_eval":
            found, details = of_harness(self.recipe, self.subject.to(self.state.device), self.subject.loaded.tokenizer)
            about = {"lm_eval": details}
        elif name == "muse":
            retrained = None if self.reference is None else _of_reference(self.reference)
            found = muse(self._measure, self.subject, retrained, self.wanted, how, self.tables, self.other)
        else:
            found = results([name], self.tables, self.other)
        entries = {group: {"examples": len(self.tables[group]), **entry} for group, entry in found["groups"].items()}
        return {
            "schema": SCHEMA, "suite": name, "recipe": self.recipe.name, "seed": self.recipe.seed,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "reference": None if self.reference is None else self.reference.name,
            "measured": digest(_about(self.subject, how)), "settings": plain(how),
            "groups": entries, "suites": found["suites"], **about, "versions": versions(self.recipe.family),
            "hardware": hardware(self.state.device.type, self.state.num_processes),
        }  # fmt: skip

    def _measure(self, subject: Subject, wanted: Evaluated, how: Measuring) -> dict[str, list[Row]]:
        prefix = "" if subject is self.subject else REFERENCE
        return _tables(subject, wanted, how, self.place, self.state, prefix, fluency=False)


def _of_run(recipe: Recipe, root: Path, whole: Mapping[str, Sequence[Any]]) -> Subject:
    sha256 = read_record(root)["model"]["sha256"]
    return Subject(recipe, str(root / "model"), texts(whole), sha256)


def _of_reference(root: Path) -> Subject:
    recipe = load_recipe(root / "recipe.yaml")
    return _of_run(recipe, root, groups(recipe, plan_steps(recipe)))


def _about(subject: Subject, how: Measuring) -> dict[str, Any]:
    """What the rows of a table depend on, beside the example."""
    return {"model": subject.identity, "settings": plain(how)}


def _check_run(root: Path) -> None:
    _check_is_run(root, "Give one, or name the data to measure with: --recipe RECIPE.")
    complete_record(root, "There is no model to measure yet: give `hf-clmul run` again first.")
    if not (root / "model").is_dir():
        raise RunError(f"{root} has no folder `model`, which is what is measured: give `hf-clmul run` again first.")


def _held(folder: RunFolder, until: ExitStack) -> None:
    """Locks a run's folder. Raises RunError, before anything is measured, for what its report could not be written with."""
    until.enter_context(folder.locked())
    ledger.verify(folder.ledger, remembered_head(folder.root))
    read_audit(folder.root)


def _check_is_run(root: Path, remedy: str) -> None:
    if not (root / "results.json").is_file() or not (root / "recipe.yaml").is_file():
        raise RunError(f"{root} is not a run folder. {remedy}")


def _check_suites(recipe: Recipe, names: Sequence[str], of_run: bool) -> None:
    if recipe.family != "causal_lm":
        raise RunError("evaluate measures language models; pictures are measured by `hf-clmul run` itself.")
    known = [name for name in SUITES if name != "concepts"]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise RunError(f"there is no suite {unknown[0]!r} for language models; there are: {', '.join(known)}.")
    if "continual" in names and not of_run:
        raise RunError("the suite continual is of a run's requests: give a run folder, without --recipe.")
    if "lm_eval" in names:
        check_lm_eval(recipe)


def _reference(folder: Path) -> Tables:
    """What the reference said after its last request."""
    _check_is_run(folder, "Give that of a reference, such as `hf-clmul reference RECIPE` names.")
    _check_run(folder)
    check_never_saw(folder)
    found = measured_examples(folder)
    if not found.get("forget"):
        raise RunError(
            f"{folder} measured no forget group. Name what others forget in its recipe, `evaluation: {{forget: DATA}}`, and "
            "run it again."
        )
    return found


def _tables(
    subject: Subject, wanted: Evaluated, how: Measuring, place: Path, state: PartialState, prefix: str = "",
    fluency: bool = True,
) -> dict[str, list[Row]]:  # fmt: skip
    """The rows of each group, from their tables; of groups that have none, measured now, each example once. The names of the
    tables begin with `prefix`; with `fluency` the base model reads what was generated."""
    about = _about(subject, how)
    of = digest(about)
    files = {
        name: place / TABLES / f"{prefix}{name}-{digest([about, [wanted.rows[text] for text in chosen]])[:16]}{SUFFIX}"
        for name, chosen in wanted.groups.items()
    }
    state.wait_for_everyone()
    missing = [name for name, file in files.items() if not _is_there(file, state)]
    state.wait_for_everyone()  # all have looked before the main one writes
    found = {name: _read(file, of, wanted, name) for name, file in files.items() if name not in missing}
    if not missing:
        return found
    unique = list(dict.fromkeys(text for name in missing for text in wanted.groups[name]))
    measured = _measured(subject, [wanted.rows[t] for t in unique], how, place, state, fluency)
    rows = dict(zip(unique, measured, strict=True))
    for name in missing:
        found[name] = [{**rows[text], "group": name} for text in wanted.groups[name]]
        if state.is_main_process:
            write_table(found[name], files[name], of)
            for old in files[name].parent.glob(f"{prefix}{name}-*{SUFFIX}"):
                if old != files[name] and re.fullmatch(rf"{re.escape(prefix + name)}-[0-9a-f]{{16}}", old.stem):
                    old.unlink()
    if state.is_main_process:
        chunks.forget(place / TABLES)
    return {name: found[name] for name in files}


def _is_there(file: Path, state: PartialState) -> bool:
    """Whether there is a table that says what it is of."""
    if not file.is_file():
        return False
    if table_of(file) is None:
        if state.is_main_process:
            log.warning("%s is of an earlier version, and does not say of which model: it is measured anew", file)
        return False
    return True


def _read(file: Path, of: str, wanted: Evaluated, group: str) -> list[Row]:
    """The rows of a table. Raises RunError for those of another model, of other settings or of other examples, which only a file
    that was copied or renamed has."""
    rows, found = read_table(file, COLUMNS), table_of(file)
    if found != of:
        raise RunError(
            f"{file} was measured of another model, or in another way: it is marked {str(found)[:16]}, and what is measured here "
            f"{of[:16]}. {REMEDY}"
        )
    if [row.get("id") for row in rows] != [wanted.rows[text].get("id") for text in wanted.groups[group]]:
        raise RunError(f"{file} has rows of other examples than those of the group {group!r}. {REMEDY}")
    return rows


def _measured(
    subject: Subject, examples: Sequence[Any], how: Measuring, place: Path, state: PartialState, fluency: bool
) -> list[Row]:
    title, about = f"evaluating {Path(subject.model).name}", _about(subject, how)
    model = subject.to(state.device)

    def measure(some: Sequence[Any]) -> list[Row]:
        rows = subject.loaded.measure(model, some, how, title)
        if subject.adapter and fluency:
            with adapters.serving(model, ()) as base:
                subject.loaded.score_generated(base, some, rows, how, title)
        return rows

    rows = chunks.measured(examples, chunks.BATCHES * how.batch_size, place / TABLES, about, measure)
    if fluency and not subject.adapter and subject.recipe.model.path is not None and state.num_processes == 1:
        del model
        subject.release()  # one model in memory at a time
        base = load_of(subject.recipe, subject.texts)
        base.score_generated(base.to(state.device), examples, rows, how, "reading answers with the base model")
    return rows
