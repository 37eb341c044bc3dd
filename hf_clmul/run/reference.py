"""The reference of a recipe: the same model, trained by the same recipe without what its unlearn requests forget. Which recipe that
is, what it depends on, and where it lies once it was trained. It knows recipes, plans and folders; models only by their files."""

import io
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_clmul import __version__
from hf_clmul.data.encoding import example_format
from hf_clmul.data.sources import Example, content, load_examples, select, shown
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation import OF_NO_GROUP
from hf_clmul.evaluation.audit.options import Audit
from hf_clmul.evaluation.options import Evaluation
from hf_clmul.hashes import digest, file_hash
from hf_clmul.ledger.scan_cache import REFERENCES
from hf_clmul.models.diffusion.sources import BUILTIN, DIGITS
from hf_clmul.objectives import TERMS
from hf_clmul.paths import atomic_write, cache_folder
from hf_clmul.plan.columns import evaluated, groups, texts, untrained
from hf_clmul.plan.columns import shown as as_measured
from hf_clmul.plan.job_steps import optimizer_steps
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.schema import Data, Export, Learn, Learning, Model, Recipe, Unlearn, Unlearning
from hf_clmul.recipe.streams import BASE
from hf_clmul.report.claims import EXACT
from hf_clmul.run.folder import COMPLETE, settings
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.measuring import measuring
from hf_clmul.run.results import MORE_PACKAGES
from hf_clmul.run.results_schema import read_record

log = logging.getLogger(__name__)

SEED = 1000
"""Of a reference, where none is asked for: it must differ from the run in everything but the data."""
PACKAGES = ("torch", "transformers", "peft")
FORGOTTEN = "forgotten"
SHOWS = (
    "logging_", "log_", "save_", "report_to", "run_name", "disable_tqdm", "eval_", "per_device_eval_", "project", "trackio_", "hub_",
    "do_", "metric_for_best_model", "greater_is_better", "include_", "skip_memory_metrics", "ddp_timeout", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
)  # fmt: skip
"""Beginnings of training fields that say what is told of a training, or how data get to it; they move no weight."""
UNLIMITED = 10**9
"""Tokens; more than any example has."""
NO_MODEL = (".git", "README", "LICENSE")
NAME_FIGURES = "If you have figures of a model that never saw the data, name them with `evaluation.reference`."


class NoReference(RecipeError):
    """There is none of this recipe, and the message says why."""


def reference_recipe(recipe: Recipe, seed: int | None = None) -> Recipe:
    """The recipe without its unlearn requests, whose learn requests leave out what they forget, and which measures it instead, in
    the same groups with the same ids. `seed` is its own, by default `default_seed`.

    The forgotten rows are written to a file in the cache, for what measures them. Raises RecipeError with the reason where there
    is no reference, and as `plan_steps`.
    """
    derived, rows = _without(recipe)
    derived = derived.model_copy(update={"seed": default_seed(recipe) if seed is None else seed})
    if derived.evaluation.forget is not None:
        return derived
    file = _rows_file(rows)
    name = _free(FORGOTTEN, derived.data)
    evaluation = derived.evaluation.model_copy(update={"forget": name})
    found = derived.model_copy(
        update={"data": {**derived.data, name: Data(path=str(file))}, "evaluation": evaluation},
    )
    found._written = {**derived.written, ("data", name, "path"): file.name}
    return found


def fingerprint(recipe: Recipe, seed: int | None = None) -> str:
    """What the weights and the measurements of a recipe's reference depend on, as a hash, and its seed: base model, contents of
    data, how it learns, what is evaluated, versions. Neither names, places, the section `unlearning` nor what is shown of a run.

    Raises RecipeError as `reference_recipe`.
    """
    return f"{_key(recipe)}-{default_seed(recipe) if seed is None else seed}"


def default_seed(recipe: Recipe) -> int:
    return SEED if recipe.seed != SEED else 2 * SEED


def references_folder() -> Path:
    return cache_folder() / REFERENCES


def found_references(recipe: Recipe) -> list[Path]:
    """The run folders of the reference that are complete: the one that `evaluation.reference` names, else those in the cache, by
    seed. None where there is no reference."""
    named = recipe.evaluation.reference
    if named is not None and Path(named).is_dir():
        return [Path(named)]
    if not any(references_folder().glob("*/results.json")):
        return []
    try:
        key = _key(recipe)
    except RecipeError:
        return []
    places = [place for place in references_folder().glob(f"{key}-*") if is_complete(place)]
    return sorted(places, key=lambda place: int(place.name.rpartition("-")[2]))


def found_reference(recipe: Recipe) -> Path | None:
    """The first of `found_references`."""
    return next(iter(found_references(recipe)), None)


def is_complete(place: Path) -> bool:
    """Whether a run was carried out there to its end."""
    if not (place / "results.json").is_file():
        return False
    try:
        return read_record(place)["status"] == COMPLETE and (place / "model").is_dir()
    except RunError as error:
        log.warning("%s: no reference is read from there, delete the folder: %s", place, error)
        return False


def about_reference(recipe: Recipe) -> str | None:
    """One sentence: what there is of the reference, or what it would cost; None where nothing is unlearned. Raises RecipeError as
    `plan_steps`."""
    if not any(isinstance(request, Unlearn) for request in recipe.requests):
        return None
    try:
        with quiet_libraries():
            derived, _ = _without(recipe)
            if found := found_references(recipe):
                return f"reference: trained already: {', '.join(map(str, found))}"
            if derived.family == "diffusion":
                return f"reference: none is made yet; `hf-clmul reference` makes {derived.model.path}, once, in some minutes"
            jobs = [job for step in plan_steps(derived) for job in step.jobs]
    except NoReference as error:
        return str(error)
    steps = sum(optimizer_steps(job, derived.request_training(job.settings_of)) for job in jobs)
    return (
        f"reference: none is trained yet; `hf-clmul reference` trains the same model without what is forgotten, once: {steps:,} "
        "steps"
    )


# ---- the recipe without the forgotten rows ---------------------------------------------------------------------


def _without(recipe: Recipe) -> tuple[Recipe, list[Example]]:
    """The recipe that never learns what is forgotten, not yet measuring it, with seed 0, and the rows to measure."""
    if (pictures := _of_digits(recipe)) is not None:
        return pictures
    _check_there_is_one(recipe)
    steps = plan_steps(recipe)
    whole = groups(recipe, steps)
    learned = {content(row) for step in steps for row in step.roles.get("learn", ())}
    gone = {content(row) for row in whole.get("forget", ())} & learned
    if not gone:
        raise NoReference(
            "there is no reference: all that is forgotten is learned again later, so that the run itself is a model that was trained on "
            "all data."
        )
    loaded = {request.data: _rows(recipe, request.data) for request in recipe.requests if isinstance(request, Learn)}
    data = {name: _thinned(recipe.data[name], name, rows, gone) for name, rows in loaded.items()}
    requests = [_kept(request, i, loaded[request.data], gone) for i, request in _learned(recipe)]
    requests = [request for request in requests if request is not None]
    if not requests:
        raise NoReference(
            "there is no reference to train: all that is learned is forgotten, so that it would be the model before the first "
            "request, which the run measures as its stage `base`."
        )
    kept = recipe.evaluation.model_copy(update={"forget": None, "reference": None})
    used = {request.data for request in requests} | set(
        untrained(recipe.model_copy(update={"evaluation": kept})).values()
    )
    rows, most = _measured(recipe, steps, whole)
    derived = recipe.model_copy(update={
        "name": f"{recipe.name}-reference", "seed": 0, "requests": requests,
        "data": {name: data.get(name, source) for name, source in recipe.data.items() if name in used},
        "unlearning": Unlearning(), "export": Export(), "teacher": _teacher(recipe, requests),
        "memory": recipe.memory if _replays(recipe, requests) else None, "audit": Audit(),
        "evaluation": kept.model_copy(update={"max_forgotten": most}),
    })  # fmt: skip
    derived = _measured_alike(recipe, derived)
    derived._written = {
        key: path for key, path in recipe.written.items() if key[0] == "model" or (key[0] == "data" and key[1] in used)
    }
    return derived, rows


def _measured_alike(recipe: Recipe, derived: Recipe) -> Recipe:
    """How a run measures follows from all its requests, and the derived recipe has only some: it says so where that differs."""
    how, own = measuring(recipe), measuring(derived)
    update: dict[str, Any] = {}
    if how.bf16 != own.bf16:
        update["bf16"] = how.bf16
    if how.max_length != own.max_length:
        update["max_length"] = how.max_length or UNLIMITED
    return derived.model_copy(update={"evaluation": derived.evaluation.model_copy(update=update)})


def _check_there_is_one(recipe: Recipe) -> None:
    unlearned = [(i, request) for i, request in enumerate(recipe.requests) if isinstance(request, Unlearn)]
    if not unlearned:
        raise NoReference("there is no reference: no request unlearns anything, so that nothing would be left out.")
    for i, request in unlearned:
        if request.from_task == BASE:
            raise NoReference(
                f"there is no reference: requests.{i}.unlearn.from is `{BASE}`, what the model knew before the first request, and its "
                f"pretraining cannot be repeated without it. {NAME_FIGURES}"
            )
    if recipe.family != "causal_lm":
        raise NoReference(
            f"there is no reference: it is not known what a {recipe.family} model could draw before the first request, so "
            f"that leaving pictures out makes no model that never saw them. {NAME_FIGURES}"
        )


def _of_digits(recipe: Recipe) -> tuple[Recipe, list[Example]] | None:
    """Of the built-in pipeline, of which one request forgets a digit or a colour: the pipeline that was made without it, with the
    forget data as a group. A run has a request, and this one's takes one step of no length. None for any other recipe."""
    request = recipe.requests[0]
    if (
        len(recipe.requests) > 1
        or not isinstance(request, Unlearn)
        or recipe.model.path != DIGITS
        or not request.retain
    ):
        return None
    from hf_clmul.digits import CLASSES, rows

    asked = load_examples(recipe.data[request.data], request.data)
    ids = {row["id"] for row in asked}
    classes = [(axis, name) for axis, names in CLASSES.items() for name in names]
    left_out = [name for axis, name in classes if {row["id"] for row in rows("train") if row[axis] == name} == ids]
    if not left_out:
        return None
    kept = Learn(task="kept", data=request.retain, training={"max_steps": 1, "learning_rate": 0.0})
    used = {request.data, request.retain, recipe.evaluation.held_out}
    found = recipe.model_copy(update={
        "name": f"{recipe.name}-reference", "seed": 0, "requests": [kept], "adapter": None, "memory": None,
        "model": recipe.model.model_copy(update={"path": f"{DIGITS}/no-{left_out[0]}"}),
        "data": {name: source for name, source in recipe.data.items() if name in used},
        "learning": Learning(learn={"denoising": {}}), "unlearning": Unlearning(forget={"esd": {}}, retain={"distill": {}}),
        "export": Export(), "teacher": Recipe.model_fields["teacher"].default, "audit": Audit(),
        "evaluation": recipe.evaluation.model_copy(update={"forget": request.data, "reference": None}),
    })  # fmt: skip
    found._written = {
        key: path
        for key, path in recipe.written.items()
        if (key[0] == "data" and key[1] in used) or key[:2] == ("evaluation", "images")
    }
    return found, asked


def _learned(recipe: Recipe) -> list[tuple[int, Learn]]:
    return [(i, request) for i, request in enumerate(recipe.requests) if isinstance(request, Learn)]


def _rows(recipe: Recipe, name: str) -> list[Example]:
    return load_examples(recipe.data[name], name)


def _thinned(source: Data, name: str, rows: Sequence[Example], gone: Collection[str]) -> Data:
    """The data section less the rows with these contents. They are named by id: rows are numbered before any is left out, so that
    those that stay keep theirs."""
    leave = [row["id"] for row in rows if content(row) in gone]
    if not leave:
        return source
    if source.exclude is not None:  # a condition on two columns would leave out what meets both
        stay = {row["id"] for row in rows}
        everything = load_examples(source.model_copy(update={"exclude": None}), name)
        leave = [row["id"] for row in everything if row["id"] not in stay] + leave
    return source.model_copy(update={"exclude": {"id": leave}})


def _kept(request: Learn, i: int, rows: Sequence[Example], gone: Collection[str]) -> Learn | None:
    """The request without the rows, None if nothing is left of it. Values that only these had are no longer asked for."""
    left = [row for row in rows if content(row) not in gone]
    chosen = {id(row) for row in select(rows, request.where, f"requests.{i}.learn.where")}
    if not any(id(row) in chosen for row in left):
        return None
    where = None
    if request.where is not None:
        present = {column: {row[column] for row in left} for column in request.where}
        where = {
            column: [value for value in values if value in present[column]] if isinstance(values, list) else values
            for column, values in request.where.items()
        }
    return request.model_copy(update={"where": where, "lifts": []})


def _measured(
    recipe: Recipe, steps: Sequence[Any], whole: Mapping[str, list[Example]]
) -> tuple[list[Example], int | None]:
    """The rows that the run's forget group is chosen from, and how many of them are."""
    proved = {content(row) for step in steps if step.how in EXACT for row in step.roles["forget"]}
    rows = [row for row in whole["forget"] if content(row) not in proved]
    if rows:
        return rows, recipe.evaluation.max_forgotten
    chosen = set(evaluated(recipe, steps, whole).groups["forget"])
    return [row for row in whole["forget"] if content(row) in chosen], None


def _teacher(recipe: Recipe, requests: Sequence[Learn]) -> Any:
    """As it is if any term of learning asks one; else which one it is changes nothing."""
    tables = [recipe.learning.learn, recipe.learning.memory, *(r.memory for r in requests if r.memory is not None)]
    if any("teacher" in TERMS[name].needs for table in tables for name in table):
        return recipe.teacher
    return Recipe.model_fields["teacher"].default


def _replays(recipe: Recipe, requests: Sequence[Learn]) -> bool:
    """Whether learning looks into the memory at all; else its size changes nothing."""
    return any(recipe.learning.memory if r.memory is None else r.memory for r in requests)


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "-rows"
    return name


def _rows_file(rows: Sequence[Example]) -> Path:
    """A file with the rows, ids and all, in the cache. Raises NoReference for rows that one file cannot hold."""
    ids = [str(row["id"]) for row in rows]
    twice = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    if twice is not None:
        raise NoReference(
            f"there is no reference: two of the rows that are forgotten have the id {twice!r}, in different data, and could not be told "
            "apart where they are measured. Give each row its own id."
        )
    every = dict.fromkeys(column for row in rows for column in row)
    odd = next((row for row in rows if example_format(row) != example_format(list(every))), None)
    if odd is not None:
        raise NoReference(
            "there is no reference: the rows that are forgotten are of different formats, such as "
            f"{shown(content(odd))}, and are measured from one table. Give them the same columns."
        )
    file = references_folder() / f"{FORGOTTEN}-{digest(list(rows))[:16]}.parquet"
    lines = file.with_suffix(".jsonl")
    if file.is_file() or lines.is_file():
        return file if file.is_file() else lines
    import pyarrow
    from pyarrow import parquet

    whole, held = [{column: row.get(column) for column in every} for row in rows], io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(whole), held)
    except (
        pyarrow.ArrowException
    ):  # a column with values of several kinds, such as probes that are texts or questions with answers
        atomic_write(lines, "".join(json.dumps(row) + "\n" for row in whole))
        return lines
    atomic_write(file, held.getvalue())
    return file


# ---- what it depends on --------------------------------------------------------------------------------------


def _key(recipe: Recipe) -> str:
    """The fingerprint without the seed."""
    derived, rows = _without(recipe)
    bare = _bare(derived)
    steps = plan_steps(bare)
    shown_steps = as_measured(bare, steps)
    whole = groups(bare, shown_steps)
    text = texts({**whole, "forget": rows}) if recipe.model.scratch is not None else []
    packages = (*PACKAGES, *MORE_PACKAGES[recipe.family])
    return digest([
        _model_files(derived.model), text, settings(bare, steps, steps[-1]), rows, evaluated(bare, shown_steps, whole).plain(),
        _measured_by(bare.evaluation), {"hf_clmul": __version__, **{name: version(name) for name in packages}},
    ])[:16]  # fmt: skip


def _measured_by(evaluation: Evaluation) -> dict[str, Any]:
    """What decides the figures and the rows of a reference. Suites of no group read the rows that there are, and what is not asked
    for leaves no trace: references that were trained before it could be asked for are found."""
    left_out = ("reference", "samples", "score", "forget", "held_out", "lm_eval")
    unasked = {"gradient_norms": False, "bf16": None, "max_length": None}
    more = [name for name, default in unasked.items() if getattr(evaluation, name) is default]
    found = evaluation.model_dump(exclude={**dict.fromkeys((*left_out, *more), True), "images": {"shown"}})
    return {**found, "suites": [name for name in evaluation.suites if name not in OF_NO_GROUP]}


def _bare(derived: Recipe) -> Recipe:
    """Without what only says where the model lies or what is shown of a training."""
    model = derived.model.model_copy(update={"path": None, "revision": None, "trust_remote_code": False})
    requests = [request.model_copy(update={"training": _weighty(request.training)}) for request in derived.requests]
    learning = derived.learning.model_copy(update={"training": _weighty(derived.learning.training)})
    return derived.model_copy(update={
        "model": model, "requests": requests, "learning": learning, "training": _weighty(derived.training),
    })  # fmt: skip


def _weighty(training: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in training.items() if not name.startswith(SHOWS)}


def _model_files(model: Model) -> Any:
    """What the base model is: hashes of its files, the commit on the Hub, or how it is made. Raises RecipeError if it is not
    there."""
    if model.scratch is not None:
        return model.scratch.model_dump()
    if model.path.startswith(BUILTIN):
        from hf_clmul.digits.pipeline import made_of
        from hf_clmul.models.diffusion.sources import chosen

        return made_of(*chosen(model.path)).name
    from hf_clmul.models.loading import explained_loading, model_file

    place = Path(model_file(model.path))
    if place.is_file():
        return file_hash(place)
    if place.is_dir():
        files = [path for path in sorted(place.iterdir()) if path.is_file() and not path.name.startswith(NO_MODEL)]
        return {path.name: file_hash(path) for path in files}
    from huggingface_hub import hf_hub_download

    with explained_loading(model):
        config = hf_hub_download(model.path, "config.json", revision=model.revision)
    return [model.path, Path(config).parent.name]  # the cache keeps files under snapshots/COMMIT/
