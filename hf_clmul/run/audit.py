"""Carries out an audit: each attack on the model of a run and on the reference, a fresh model each, kept one by one; then the record
and its verdict. Knows run folders and the protocol of attacks; nothing of what they do."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.audit.attacks import attack_parameters, attacks_of
from hf_clmul.evaluation.audit.kept import (
    REFERENCE,
    RUN,
    Attacked,
    read_cached,
    read_kept,
    write_cached,
    write_kept,
)
from hf_clmul.evaluation.audit.merging import compared, merged
from hf_clmul.evaluation.audit.protocol import BEFORE, Absent, Point, Stopped, Subject
from hf_clmul.evaluation.audit.record import FILE, SCHEMA, checked, model_sha256, read_audit
from hf_clmul.evaluation.audit.verdict import verdict
from hf_clmul.hashes import digest, file_hash, file_hashes
from hf_clmul.ledger import chain as ledger
from hf_clmul.paths import atomic_write, recover_folder
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.problems import did_you_mean
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.audit_families import Prepared, prepared
from hf_clmul.run.card import write_card
from hf_clmul.run.closing import show
from hf_clmul.run.folder import COMPLETE, RunFolder
from hf_clmul.run.ledger import check_ledger
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.reference import NoReference, found_reference, reference_recipe
from hf_clmul.run.results import hardware, peak_memory, versions
from hf_clmul.run.results_schema import read_record
from hf_clmul.run.retrained import check_never_saw

MODEL_FILES = ("config.json", "adapter_config.json", "model_index.json", "pytorch_lora_weights.safetensors")
"""One of them is in the folder of any model."""
SECTION = ("attacks", "after_run")
TIMES = ("created", "versions", "hardware")
"""What differs between two records of the same findings."""
ALIKE = ("model_sha256", "reference", "reference_missing", "seed", "before", "scope", "held")
"""What two records have in common whose attacks can stand side by side."""


@dataclass(frozen=True)
class Model:
    """One of the two models: the folder that is opened, a hash of its files, a name, and whether it is the run's own."""

    folder: Path
    sha256: str
    name: str
    is_run: bool


def audit_run(
    root: Path, names: Sequence[str] | None = None, reference: Path | None = None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Audits a finished run and returns the record, which is in RUN/audit/audit.json then.

    `names` are attacks, all that the recipe names (or that there are) by default; `overrides` are options, such as
    `relearn.steps=20`. Raises RunError for a folder that is no complete run, RecipeError for attacks or options that there are
    not.
    """
    _check_alone(PartialState())  # before the lock, which one of several processes would get
    folder = RunFolder(Path(root))
    results = _results(folder)
    plain = load_recipe(folder.recipe)
    recipe = load_recipe(folder.recipe, [_whole_key(override) for override in overrides])
    with quiet_libraries(), folder.locked():
        recover_folder(folder.root)  # what a kill left in model/ would be hashed as a part of it
        check_ledger(folder)
        record = audit(recipe, folder, results, _chosen(plain, recipe, names), reference)
        show(folder, plan_steps(plain))
        return record


def audit_after(recipe: Recipe, folder: RunFolder) -> None:
    """The audit that a recipe asks for at the end of its run (`audit.after_run`), in a folder that is locked."""
    audit(recipe, folder, _results(folder), _chosen(recipe, recipe, None))


def audit(
    recipe: Recipe, folder: RunFolder, results: Mapping[str, Any], attacks: Mapping[str, Mapping[str, Any]],
    reference: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`audit_run` of a folder that is locked. `attacks` is {attack: {option: value}}."""
    state = PartialState()
    _check_alone(state)
    ready = prepared(recipe, plan_steps(recipe), state.device)
    own = Model(folder.model, _sha256(folder.model, results), results["name"], True)
    other, missing = _reference(recipe, reference)
    places = folder.root / FILE.parent / "attacks"
    models = [own] if other is None else [own, other]
    found: dict[str, dict[str, Attacked]] = {}
    with tqdm(total=(1 + len(attacks)) * len(models), desc="audit", unit="attack") as bar:
        for name, options in {BEFORE: {}, **attacks}.items():
            start = {side: one.points[0] for side, one in found.get(BEFORE, {}).items()}
            found[name] = _sides(recipe, ready, name, options, models, places / f"{name}.json", start, bar)
    record = _with_earlier(folder, _record(recipe, ready, own, other, missing, attacks, found, state), recipe.family)
    _write(folder, record)
    write_card(folder)
    return record


def _check_alone(state: PartialState) -> None:
    if state.num_processes > 1:
        raise RunError(
            "an audit takes one process, and this one runs on several: start it with plain `hf-clmul audit RUN`."
        )


def _sides(
    recipe: Recipe,
    ready: Prepared,
    name: str,
    options: Mapping[str, Any],
    models: Sequence[Model],
    file: Path,
    start: Mapping[str, Point],
    bar: Any,
) -> dict[str, Attacked]:
    """An attack on each model; what was measured before, under the same circumstances, is read back: for this run, and of a
    reference for any run. `start` is how the models were measured that no attack has touched."""
    before, sides = read_kept(file), {}
    for model in models:
        side = RUN if model.is_run else REFERENCE
        bar.set_postfix_str(f"{name}, {model.name}")
        key = _key(recipe, ready, name, options, model)
        known = before.get(side)
        if known is None or known.key != key:
            known = None if model.is_run else read_cached(key)
            if known is None:
                subject = partial(_opened, ready, model, start.get(side))
                known = _attacked(key, _attack(name, recipe.family), subject, ready, recipe.seed, options)
                if not model.is_run:
                    write_cached(known)
            write_kept(file, {**before, **sides, side: known})
        sides[side] = known
        bar.update()
    return sides


def _key(recipe: Recipe, ready: Prepared, name: str, options: Mapping[str, Any], model: Model) -> str:
    """A digest of all that the figures of an attack depend on; a folder that an option names counts by its files."""
    parameters = _parameters(name, recipe.family, options)
    folders = {option: Path(value) for option, value in parameters.items() if isinstance(value, str)}
    files = {option: file_hashes(place) for option, place in folders.items() if place.is_dir()}
    about = [vars(ready.data), ready.about, versions(recipe.family), PartialState().device.type]
    return digest([SCHEMA, name, {**parameters, **files}, recipe.seed, model.sha256, *about])


def _opened(ready: Prepared, model: Model, start: Point | None) -> Subject:
    """A fresh model. What attacks call "before" is the same measurement for all of them, made once."""
    subject = ready.open(model.folder, model.is_run)
    if start is not None:
        measure = subject.measure

        def known(label: str, x: float | None = None, forget: Sequence[Any] | None = None) -> Point:
            if label == BEFORE and forget is None:
                return replace(start, x=x)
            return measure(label, x, forget)

        subject.measure = known
    return subject


def _attack(name: str, family: str) -> Callable[..., Any]:
    return _untouched if name == BEFORE else attacks_of(family)[name].function


def _untouched(subject: Subject, data: Any, seed: int) -> list[Point]:
    return [subject.measure(BEFORE)]


def _attacked(
    key: str,
    attack: Callable[..., Any],
    opened: Callable[[], Subject],
    ready: Prepared,
    seed: int,
    options: Mapping[str, Any],
) -> Attacked:
    subject = opened()
    began, absent, stopped = time.monotonic(), None, None
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    points: list[Point] = []
    try:
        for point in attack(subject, ready.data, seed, **options):
            points.append(point)
    except Absent as reason:
        points, absent = [], str(reason)
    except Stopped as reason:
        stopped = str(reason)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
    return Attacked(key, points, round(time.monotonic() - began, 3), peak, absent, stopped)


def _record(
    recipe: Recipe, ready: Prepared, own: Model, other: Model | None, missing: str | None, attacks: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Attacked]], state: PartialState,
) -> dict[str, Any]:  # fmt: skip
    first = found[BEFORE]
    start = compared(first[RUN].points[0], first[REFERENCE].points[0] if REFERENCE in first else None, recipe.seed)
    entries = [_entry(recipe, ready, name, options, found[name]) for name, options in attacks.items()]
    return {
        "schema": SCHEMA,
        "run": own.folder.parent.resolve().name,
        "name": own.name,
        "model_sha256": own.sha256,
        "reference": None if other is None else {"folder": str(other.folder), "name": other.name},
        "reference_missing": missing,
        "seed": recipe.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(recipe.family),
        "hardware": hardware(state.device.type, state.num_processes),
        "before": start,
        "attacks": entries,
        "scope": list(ready.scope),
        "held": ready.held,
        "verdict": verdict(start, entries, missing, ready.scope, ready.held),
    }


def _entry(
    recipe: Recipe, ready: Prepared, name: str, options: Mapping[str, Any], sides: Mapping[str, Attacked]
) -> dict[str, Any]:
    run, other, known = sides[RUN], sides.get(REFERENCE), attacks_of(recipe.family)[name]
    points = merged(run.points, None if other is None else other.points, recipe.seed)
    if known.both is not None and other is not None and run.points and other.points:
        both = merged([known.both(run.points, other.points)], None, recipe.seed)
        points += [point for point in both if point["metrics"]]
    return {
        "attack": name,
        "changes": known.changes,
        "summary": known.summary + ready.notes.get(name, ""),
        "parameters": _parameters(name, recipe.family, options),
        "seconds": run.seconds,
        "reference_seconds": None if other is None else other.seconds,
        "peak_memory_bytes": max((s.peak_memory_bytes for s in sides.values() if s.peak_memory_bytes), default=None),
        "absent": run.absent,
        "reference_absent": None if other is None else other.absent,
        "stopped": run.stopped,
        "reference_stopped": None if other is None else other.stopped,
        "points": points,
    }


def _parameters(name: str, family: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options as plain data, defaults filled in."""
    known = {} if name == BEFORE else attack_parameters(name, family)
    return json.loads(json.dumps({**{key: default for key, (_, default) in known.items()}, **options}))


def _with_earlier(folder: RunFolder, record: dict[str, Any], family: str) -> dict[str, Any]:
    """With the other attacks of the record that is there, if these were made on the same models and measured alike: to make one
    attack must not take back what others found."""
    old, new = _old(folder), json.loads(json.dumps(record))
    if old is None or any(old.get(key) != new[key] for key in ALIKE):
        return record
    entries = {entry["attack"]: entry for entry in (*old["attacks"], *record["attacks"])}
    entries = [entries[name] for name in attacks_of(family) if name in entries]
    said = verdict(record["before"], entries, record["reference_missing"], record["scope"], record["held"])
    return {**record, "attacks": entries, "verdict": said}


def _write(folder: RunFolder, record: dict[str, Any]) -> None:
    """Nothing is written where nothing was found that is not recorded already, in the file and in the ledger."""
    checked(record, "the audit")
    file, new = folder.root / FILE, json.loads(json.dumps(record))
    old = _old(folder)
    if old is not None and all(old.get(key) == new[key] for key in new if key not in TIMES):
        return
    text = json.dumps(record, indent=1) + "\n"
    atomic_write(file, text)
    folder.outdate_report()  # it shows an earlier audit, or none
    reference = record["reference"] and record["reference"]["name"]
    ledger.append(
        folder.ledger, "audited", attacks=[entry["attack"] for entry in record["attacks"]],
        model_sha256=record["model_sha256"], reference=reference, record_sha256=sha256(text.encode()).hexdigest(),
    )  # fmt: skip


def _old(folder: RunFolder) -> dict[str, Any] | None:
    """The record that is there, if it can be read and the ledger tells of it: a kill may have come between the two."""
    try:
        old = read_audit(folder.root)
    except RunError:
        return None
    told = [event for event in ledger.verify(folder.ledger) if event["event"] == "audited"]
    known = bool(old and told) and told[-1]["record_sha256"] == file_hash(folder.root / FILE)
    return old if known else None


def _chosen(plain: Recipe, changed: Recipe, names: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """{attack: options}, in the order of the table. An attack whose option is changed on the command line is made too."""
    known, given = list(attacks_of(plain.family)), changed.audit.attacks or {}
    for name in names or ():
        if name not in known:
            raise RecipeError(
                f"--attacks: unknown attack {name!r}; there are {', '.join(known)}.{did_you_mean(name, known)}"
            )
    by_recipe = known if plain.audit.attacks is None else plain.audit.attacks
    wanted = {*(by_recipe if names is None else names), *(set(given) - set(plain.audit.attacks or ()))}
    return {name: given.get(name, {}) for name in known if name in wanted}


def _whole_key(override: str) -> str:
    """`relearn.steps=20` stands for `audit.attacks.relearn.steps=20`."""
    return (
        f"audit.{override}" if override.partition(".")[0].partition("=")[0] in SECTION else f"audit.attacks.{override}"
    )


def _results(folder: RunFolder) -> dict[str, Any]:
    """results.json of a complete run. Raises RunError for anything else."""
    for file in (folder.results, folder.recipe):
        if not file.is_file():
            raise RunError(
                f"{folder.root} is no run folder: there is no {file.name} in it. Give the folder of a run, such as runs/quickstart."
            )
    results = read_record(folder.root)
    if results["status"] != COMPLETE or not folder.model.is_dir():
        raise RunError(
            f"{folder.root} is not complete, and only a finished model can be audited: continue the run with "
            "`hf-clmul run` and the same recipe, then audit it."
        )
    return results


def _reference(recipe: Recipe, given: Path | None) -> tuple[Model | None, str | None]:
    """The reference that a user names, else the one that was trained for the recipe; or why there is none."""
    if given is not None:
        found = _model_at(given)
        # References of pictures are made in a run that has the request, and learned nothing of it.
        if recipe.family == "causal_lm":
            check_never_saw(given)
        return found, None
    found = found_reference(recipe)
    if found is not None:
        return _model_at(found), None
    try:
        reference_recipe(recipe)
    except NoReference as error:
        return None, str(error).rstrip(".")
    return None, "none was trained yet, `hf-clmul reference RECIPE` does it"


def _model_at(place: Path) -> Model:
    """A run's model, or a model's own folder."""
    if not place.is_dir():
        raise RunError(f"the reference {place} is no folder. Give a run, or a folder made by save_pretrained.")
    folder = RunFolder(place)
    if not folder.results.is_file():
        if not any((place / name).is_file() for name in MODEL_FILES):  # before anything is measured
            raise RunError(
                f"the reference {place} holds neither a run (results.json) nor a model ({', '.join(MODEL_FILES)}). Give the folder of "
                "one, such as `hf-clmul reference RECIPE` names."
            )
        return Model(place, _sha256(place, {}), place.resolve().name, False)
    results = _results(folder)
    return Model(folder.model, _sha256(folder.model, results), results["name"], False)


def _sha256(folder: Path, results: Mapping[str, Any]) -> str:
    return model_sha256(file_hashes(folder), results.get("model", {}).get("sha256"))
