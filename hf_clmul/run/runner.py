"""Executes a recipe: its requests in order, each measured and resumable, then the export and the report.
Knows all rooms by their doors; mathematics and file formats live elsewhere."""

import json
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.stream import stream_metrics, stream_record
from hf_clmul.evaluation.suite_table import Tables
from hf_clmul.families.loaders import load_of
from hf_clmul.hashes import digest
from hf_clmul.ledger import chain as ledger
from hf_clmul.models import adapters
from hf_clmul.paths import atomic_write
from hf_clmul.plan.columns import evaluated, groups, shown, texts, untrained_rows
from hf_clmul.plan.exported import erasing, exported
from hf_clmul.plan.notes import notes
from hf_clmul.plan.steps import Step, plan_steps
from hf_clmul.recipe.load import dump_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.report.claims import EXACT
from hf_clmul.report.model_card import model_card
from hf_clmul.run import carried
from hf_clmul.run.audit import audit_after
from hf_clmul.run.audit_families import prepared
from hf_clmul.run.closing import close
from hf_clmul.run.comparison import examples
from hf_clmul.run.export import REPORT, Wanted, export
from hf_clmul.run.folder import COMPLETE, RunFolder, recipe_sha256
from hf_clmul.run.ledger import RunLedger, check_ledger
from hf_clmul.run.log import quiet_libraries
from hf_clmul.run.measuring import measuring, plain
from hf_clmul.run.request import Run, carry_out, draw_pictures, on_main_first, prepare, superseded, try_first
from hf_clmul.run.results import hardware, record, shared, versions
from hf_clmul.run.retrained import references
from hf_clmul.run.stages import compared, further_suites, measure_stage

log = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, output: Path) -> Path:
    """Carries out a recipe into `output`, or continues what was begun there; returns the path of the report.

    Raises RecipeError for unusable data, RunError if the run cannot go on; finished requests stay on disk then.
    """
    began = time.time()
    with quiet_libraries(), ExitStack() as held:
        # Several processes on CPUs find each other only if told that they are on CPUs.
        trainings = [recipe.request_training(i) for i in range(len(recipe.requests))]
        on_cpu = any(training.get("use_cpu", False) for training in trainings)
        # A trainer comes too late to say how long processes wait for each other.
        wait = timedelta(seconds=max(training.get("ddp_timeout", 1800) for training in trainings))
        state = PartialState(cpu=on_cpu or not torch.accelerator.is_available(), timeout=wait)
        folder, steps = RunFolder(Path(output)), plan_steps(recipe)
        _wanted(recipe, steps)  # a mistake there must not cost hours
        if _is_audited(recipe, steps):
            prepared(recipe, steps, state.device)
        named = untrained_rows(recipe)
        whole = groups(recipe, shown(recipe, steps), named)
        chosen, how = evaluated(recipe, shown(recipe, steps), whole), measuring(recipe)
        measured = digest([recipe.model.model_dump(), recipe.evaluation.suites, plain(how), list(named.values())])
        found: list[Any] = []  # of the main process
        on_main_first(state, lambda: (found.extend(references(recipe, chosen)), held.enter_context(folder.locked())))
        reference, others = found or (None, None)
        on_main_first(state, lambda: (check_ledger(folder), folder.check(recipe, steps, measured)))
        sha256 = recipe_sha256(recipe)
        if folder.finished(sha256) is None:
            with state.main_process_first():  # one process converts a GGUF file, the others find it in the cache
                loaded = load_of(recipe, texts(whole))
            model = loaded.to(state.device)
            of_run = recipe, sha256, folder, steps, chosen, how, measured, state, loaded, model, reference, others
            _execute(Run(*of_run), began)
            del model, loaded  # the audit loads its own, one at a time
        else:
            on_main_first(state, lambda: folder.write_recipe(recipe))  # what looks at the run reads it
        on_main_first(state, lambda: _refer(recipe, folder, reference, others))
        on_main_first(state, lambda: _audited(recipe, folder, steps, state))
        on_main_first(state, lambda: close(recipe, folder, steps))
    return folder.report


def plan_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """What `run_recipe` would do, one entry a request, without training. Raises RecipeError as it would."""
    from hf_clmul.plan.estimates import estimate

    with quiet_libraries():
        steps = plan_steps(recipe)
        _wanted(recipe, steps)
        whole = groups(recipe, shown(recipe, steps))
        chosen = evaluated(recipe, shown(recipe, steps), whole)
        entries = estimate(recipe, steps, texts(whole))
        return [{**entry, "notes": notes(recipe, step, chosen)} for entry, step in zip(entries, steps, strict=True)]


def _execute(run: Run, began: float) -> None:
    """All stages that are not finished yet, then the export."""
    try_first(run)
    base = run.loaded.hashes(run.model) if run.main else {}
    draw_pictures(run, base)
    prepare(run)
    on_main_first(run.state, lambda: run.folder.begin(run.recipe, run.steps, base))
    if run.main:
        run.ledger = RunLedger(run.recipe, run.steps, run.folder)
        processes = run.state.num_processes
        about = {"versions": versions(run.recipe.family), "hardware": hardware(run.state.device.type, processes)}
        run.ledger.begun(run.recipe_sha256, base, processes, **about)
    carried.read_targets(run)
    first = {
        "title": f"before {run.steps[0].kind}ing",
        "seconds": 0.0,
        "steps": 0,
        "examples": {},
        "how": "",
        "log": None,
        **base,
    }
    measure_stage(run, None, {"stage": "base", "kind": "base", **first})
    _write_record(run, "running", began)
    for step in run.steps:
        trained = carry_out(run, step)
        if trained is not None:
            log_file = (run.folder.request(step) / "log.jsonl").relative_to(run.folder.root)
            stage = {
                "stage": step.name, "kind": step.kind, "title": step.title, "how": step.how,
                "examples": {role: len(rows) for role, rows in step.roles.items()},
                **({"retains": step.retains} if step.retains else {}),
                "log": log_file.as_posix() if any(not job.part for job in step.jobs) else None, **trained,
            }  # fmt: skip
            measure_stage(run, step, stage)
            _write_record(run, "running", began)
        if not any((run.folder.request(later) / "settings.json").is_file() for later in run.steps[step.index + 1 :]):
            _settle(run, step, base.get("weights_sha256", ""))
        run.state.wait_for_everyone()
    on_main_first(run.state, lambda: _finish(run, began))


def _settle(run: Run, step: Step, base: str) -> None:
    """What a finished request leaves on disk: the memory as it is now, and no weights from which nothing starts any more."""
    if run.recipe.memory is not None:
        carried.remember(run, step)
    if not run.main:
        return
    if run.recipe.memory is not None:
        run.ledger.remembers(step)
    # As the ledger has them: a kill may come between deleting and saying so.
    deleted = run.ledger.recorded(run.folder.state(earlier, job) for earlier, job in superseded(run, step))
    for job in step.jobs:
        run.folder.clear_checkpoints(step, job)
    for earlier, job in superseded(run, step):
        deleted |= run.folder.clear_state(earlier, job)
    if step.how in EXACT:  # what a complete run exported before would outlive the claim until the next export
        for place in run.ledger.exports_of(run.folder.state(earlier, job) for earlier, job in superseded(run, step)):
            deleted |= run.folder.delete(place)
    if any(carried.is_shared(job, step) for job in step.jobs):  # an isolated task hands nothing on
        for earlier, job in [(s, j) for s in run.steps[: step.index] for j in s.jobs]:
            for path in carried.outdated(run.folder.state(earlier, job)):
                path.unlink()
    if step.kind == "unlearn":
        record = run.folder.result(step)
        now = adapters.base_sha256(run.model) if isinstance(run.model, PeftModel) else base
        run.ledger.erased(step, record, deleted, (base, now))


def _finish(run: Run, began: float) -> None:
    """The export, then the final record: from then on the run is complete."""
    wanted = _wanted(run.recipe, run.steps)
    public = shared(_record(run, COMPLETE, began), run.recipe)
    card = model_card(public, dump_recipe(run.recipe, shared=True), wanted.kind, run.loaded.base)
    some = [run.evaluated.rows[texts[0]] for texts in run.evaluated.groups.values()]
    exported = export(run.loaded, run.model, run.folder, wanted, card, run.loaded.probe(some))
    run.ledger.exported(wanted)
    run.folder.outdate_report()  # it may show an earlier export
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    whole = {**_record(run, COMPLETE, began), "export": exported, "finished": finished}
    if isinstance(run.model, PeftModel):
        whole["base_sha256_after"] = adapters.base_sha256(run.model)
        if whole["base_sha256_after"] != whole["model"]["sha256"]:
            raise RunError(f"the base model's weights changed during the run, which nothing should do. {REPORT}")
    _write_json(run.folder.results, whole)


def _refer(recipe: Recipe, folder: RunFolder, reference: dict[str, Any] | None, others: Tables | None) -> None:
    """Puts beside a complete run a reference that was trained since, and what suites say with its rows `others`."""
    results = json.loads(folder.results.read_text("utf-8"))
    if reference is not None and results["reference"] != reference:
        stages = results["stages"]
        if others is not None and further_suites(recipe):
            stages = [compared(recipe, stage, examples(folder.root, stage["stage"]), others) for stage in stages]
        # Before the record, with which nothing would tell of the change any more.
        folder.outdate_report()
        ledger.append(folder.ledger, "referenced", source=reference["source"])
        _write_json(folder.results, {**results, "stages": stages, "reference": reference})


def _is_audited(recipe: Recipe, steps: Sequence[Step]) -> bool:
    """A reference, made from a recipe without its unlearn requests, is attacked beside the run only."""
    return recipe.audit.after_run and any(step.kind == "unlearn" for step in steps)


def _audited(recipe: Recipe, folder: RunFolder, steps: Sequence[Step], state: PartialState) -> None:
    """The audit, where the recipe wants one."""
    if not _is_audited(recipe, steps):
        return
    if state.num_processes > 1:
        log.warning("an audit takes one process, and this run has several: `hf-clmul audit %s` makes it", folder.root)
        return
    audit_after(recipe, folder)


def _record(run: Run, status: str, began: float) -> dict[str, Any]:
    stages = [stage for stage in map(run.folder.result, [None, *run.steps]) if stage is not None]
    events = ledger.verify(run.folder.ledger)
    about = run.loaded.about
    whole = record(run.recipe, run.recipe_sha256, stages, status, run.model, about, events, began, run.reference)
    now = {column.name: run.evaluated.digest(column) for column in run.evaluated.columns}
    like = [{**s, "tasks": {c: t for c, t in s["tasks"].items() if t["rows"] == now.get(c)}} for s in stages]
    stream = stream_record(like, [column.record() for column in run.evaluated.columns], run.recipe.evaluation.score)
    judged = {"judged": run.loaded.judged} if run.loaded.judged else {}
    return {
        **whole, **judged, "stream": {**stream, "metrics": stream_metrics(stream)}, "ledger": ledger.head(run.folder.ledger)
    }  # fmt: skip


def _write_record(run: Run, status: str, began: float) -> None:
    if run.main:
        _write_json(run.folder.results, _record(run, status, began))
    run.state.wait_for_everyone()


def _write_json(path: Path, content: Any) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def _wanted(recipe: Recipe, steps: Sequence[Step]) -> Wanted:
    """The shared stack, or all that is left where tasks share none; or the tasks that `export.tasks` names, with what unlearns
    from the base. Raises RecipeError for a task that is gone by then."""
    each, chosen = steps[-1].each, recipe.export.tasks
    if chosen is not None and (gone := [name for name in chosen if name not in each]):
        raise RecipeError(
            f"export.tasks: of task {gone[0]!r} no adapter is left to export; there are {', '.join(each) or 'none'}."
        )
    parts, erases = exported(recipe, steps), erasing(steps)
    named = {name: tuple(adapters.TASK + part for part in own) for name, own in each.items()}
    return Wanted(
        tuple(adapters.TASK + part for part in parts), named, bool(parts) and (recipe.export.merge or bool(erases))
    )
