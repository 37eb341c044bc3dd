"""Executes a recipe: its requests in order, each measured and resumable, then the export and the report.
Knows all rooms by their doors; mathematics and file formats live elsewhere."""

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_clmul import ledger
from hf_clmul.data.encoding import encode_prompt
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import Example
from hf_clmul.evaluation.suites import Measuring, fixed_sample, measure, summary
from hf_clmul.export import export, export_kind
from hf_clmul.hashes import digest, file_hashes
from hf_clmul.hub import push
from hf_clmul.model_card import model_card
from hf_clmul.models.loading import load, tokenizer_sha256, weights_sha256
from hf_clmul.paths import atomic_write
from hf_clmul.plan import Step, groups, plan_steps, texts
from hf_clmul.recipe import dump_recipe
from hf_clmul.recipe_schema import Recipe
from hf_clmul.report import write_report
from hf_clmul.results import record, reference_of, shared
from hf_clmul.run_folder import COMPLETE, RunFolder, recipe_sha256
from hf_clmul.run_log import quiet_libraries
from hf_clmul.run_request import Run, carry_out, on_main_first, prepare
from hf_clmul.training_args import ClmulConfig


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
        whole = groups(recipe, steps)
        sampled, how = _sampled(recipe, whole), _measuring(recipe)
        measured = digest([recipe.model.model_dump(), recipe.evaluation.suites, asdict(how), sampled])
        on_main_first(state, lambda: (reference_of(recipe), held.enter_context(folder.locked())))
        on_main_first(state, lambda: folder.check(recipe, steps, measured))
        sha256 = recipe_sha256(recipe)
        if folder.finished(sha256) is None:
            with state.main_process_first():  # one process converts a GGUF file, the others find it in the cache
                loaded = load(recipe.model, texts(whole), derived_seed(recipe.seed, "model"))
            model = loaded.model.to(state.device)
            _execute(Run(recipe, sha256, folder, steps, sampled, how, measured, state, loaded, model), began)
        on_main_first(state, lambda: _close(recipe, folder))
    return folder.report


def plan_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """What `run_recipe` would do, one entry a request, without training. Raises RecipeError as it would."""
    from hf_clmul.estimates import estimate

    with quiet_libraries():
        steps = plan_steps(recipe)
        return estimate(recipe, steps, texts(groups(recipe, steps)))


def _execute(run: Run, began: float) -> None:
    """All stages that are not finished yet, then the export."""
    prepare(run)
    base: dict[str, str] = {}
    if run.main:
        base = {"weights_sha256": weights_sha256(run.model), "tokenizer_sha256": tokenizer_sha256(run.loaded.tokenizer)}
    on_main_first(run.state, lambda: run.folder.begin(run.recipe, run.steps, base))
    if run.main:
        ledger.append(
            run.folder.ledger,
            "run",
            recipe_sha256=run.recipe_sha256,
            base=base,
            requests=[step.name for step in run.steps],
            processes=run.state.num_processes,
        )
    _measure(
        run,
        None,
        {
            "stage": "base",
            "kind": "base",
            "title": "before learning",
            "seconds": 0.0,
            "steps": 0,
            "examples": {},
            "how": "",
            "log": None,
            **base,
        },
        began,
    )
    for i, step in enumerate(run.steps):
        trained = carry_out(run, step)
        if trained is not None:
            log_file = (run.folder.request(step) / "log.jsonl").relative_to(run.folder.root)
            _measure(
                run,
                step,
                {
                    "stage": step.name,
                    "kind": step.kind,
                    "title": step.title,
                    "examples": {role: len(rows) for role, rows in step.roles.items()},
                    "how": step.how,
                    "log": log_file.as_posix(),
                    **trained,
                },
                began,
            )
        if run.main:
            run.folder.clear_checkpoints(step)
            if run.recipe.adapter is None:  # a few MB of an adapter may stay, to be measured again
                for before in run.steps[:i]:
                    run.folder.clear_state(before)
        run.state.wait_for_everyone()
    on_main_first(run.state, lambda: _finish(run, began))


def _measure(run: Run, step: Step | None, stage: dict[str, Any], began: float) -> None:
    """Measures all groups, if that was not done; writes the rows, then the record that marks the stage as finished."""
    before = run.folder.result(step)
    if before is not None and before["measured"] == run.measured:
        return
    rows = measure(run.model, run.loaded.tokenizer, run.groups, run.how, f"evaluating {stage['title']}")
    if run.main:
        place = run.folder.stage(step)
        lines = [json.dumps({"group": group, **row}) + "\n" for group, of_group in rows.items() for row in of_group]
        atomic_write(place / "examples.jsonl", "".join(lines))
        found = {**stage, "groups": summary(rows, run.recipe.evaluation.samples), "measured": run.measured}
        _write_json(place / "result.json", found)
        _write_json(run.folder.results, _record(run, "running", began))
    run.state.wait_for_everyone()


def _finish(run: Run, began: float) -> None:
    """The export, then the final record: from then on the run is complete."""
    kind = export_kind(run.model, run.recipe.export.merge)
    public = shared(_record(run, COMPLETE, began), run.recipe)
    card = model_card(public, dump_recipe(run.recipe, shared=True), kind, run.loaded.base)
    probe = [encode_prompt(rows[0], run.loaded.tokenizer) for rows in run.groups.values()]
    exported = export(run.loaded, run.model, run.folder, kind, card, probe)
    ledger.append(run.folder.ledger, "exported", kind=kind, files=file_hashes(run.folder.model))
    run.folder.report.unlink(missing_ok=True)  # it may show an earlier export
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    _write_json(run.folder.results, {**_record(run, COMPLETE, began), "export": exported, "finished": finished})


def _close(recipe: Recipe, folder: RunFolder) -> None:
    """What is shown of a complete run: the report, and the model on the Hub if the recipe wants it there."""
    if not folder.report.is_file():
        write_report(folder.root)
    repo_id, done = recipe.export.push_to_hub, [event["event"] for event in ledger.verify(folder.ledger)]
    if repo_id is not None and "pushed" not in done[len(done) - done[::-1].index("exported") :]:
        url = push(folder, recipe)
        ledger.append(folder.ledger, "pushed", url=url)


def _record(run: Run, status: str, began: float) -> dict[str, Any]:
    stages = [stage for stage in map(run.folder.result, [None, *run.steps]) if stage is not None]
    events = ledger.verify(run.folder.ledger)
    return record(run.recipe, run.recipe_sha256, stages, status, run.model, events, began)


def _write_json(path: Path, content: Any) -> None:
    atomic_write(path, json.dumps(content, indent=1) + "\n")


def _sampled(recipe: Recipe, whole: dict[str, list[Example]]) -> dict[str, list[Example]]:
    """The forget group is always evaluated whole; of the others fixed examples, the same for every seed."""
    size = recipe.evaluation.max_examples
    return {
        name: rows if name == "forget" else fixed_sample(rows, size, derived_seed(name)) for name, rows in whole.items()
    }


def _measuring(recipe: Recipe) -> Measuring:
    """The same for all stages, or their figures could not be compared: in bf16 only where every request trains so."""
    trainings = [recipe.request_training(i) for i in range(len(recipe.requests))]
    lengths = [training.get("max_length", ClmulConfig.max_length) for training in trainings]
    return Measuring(
        recipe.evaluation.batch_size,
        recipe.evaluation.max_new_tokens,
        all(training.get("bf16", False) for training in trainings),
        None if None in lengths else max(lengths),
    )
