"""One request of a run: its starting weights, its training with checkpoints and resume, and the state it leaves.
Knows the trainer and the run folder; nothing of evaluation, export or reports."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_clmul.data.encoding import Encoded
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import GENERATED, Example
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.families import Family
from hf_clmul.families.loaded import Loaded, weights_sha256
from hf_clmul.gradients.options import OF_STEPS
from hf_clmul.models import adapters, stored
from hf_clmul.objectives import TERMS
from hf_clmul.paths import explained_writes
from hf_clmul.plan.columns import Evaluated
from hf_clmul.plan.exactness import why
from hf_clmul.plan.steps import Job, Step
from hf_clmul.recipe.schema import Images, Recipe
from hf_clmul.run import carried
from hf_clmul.run.carried import Carried
from hf_clmul.run.export import load_state, save_state
from hf_clmul.run.folder import RunFolder
from hf_clmul.run.ledger import RunLedger
from hf_clmul.run.log import RunLog
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training.averaged import put_saved
from hf_clmul.training.request_checks import understood
from hf_clmul.training_args import ClmulConfig

log = logging.getLogger(__name__)

DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 0.25,
    "save_total_limit": 2,
    "log_level": "error",
    "log_level_replica": "error",
}
"""Where a recipe is silent. Four checkpoints a request, of which the last two are kept."""


@dataclass
class Run:
    """What the functions of a run share. `measured` is a digest of how is measured. `stale` are adapters in the live model
    whose weights at this point are no longer kept, since a later request replaced them."""

    recipe: Recipe
    recipe_sha256: str
    folder: RunFolder
    steps: list[Step]
    evaluated: Evaluated
    how: Measuring | Images
    measured: str
    state: PartialState
    loaded: Loaded
    model: Any
    reference: dict[str, Any] | None = None  # what the record shows of it, of the main process
    reference_rows: Mapping[str, Sequence[Mapping[str, Any]]] | None = None  # by group, of the main process
    ledger: RunLedger | None = None  # of the main process
    encoded: dict[tuple[int, int | None], Encoded] = field(default_factory=dict)
    carried: Carried = field(default_factory=Carried)
    stale: set[str] = field(default_factory=set)
    versions: dict[str, str] = field(default_factory=dict)  # hash of each adapter, of the whole model under ""

    @property
    def main(self) -> bool:
        return self.state.is_main_process

    def has(self, adapter: str) -> bool:
        """Whether the live model has it."""
        return isinstance(self.model, PeftModel) and adapters.TASK + adapter in self.model.peft_config

    def encode(self, rows: Sequence[Example], request: int, what: str) -> list[Encoded]:
        """Rows with the `max_length` of a request; each is encoded once, however many requests meet it."""
        most = self.recipe.request_training(request).get("max_length", ClmulConfig.max_length)
        new = [row for row in rows if (id(row), most) not in self.encoded]
        found = self.loaded.family(most).encoded(new, what)
        self.encoded |= {(id(row), most): one for row, one in zip(new, found, strict=True)}
        return [self.encoded[id(row), most] for row in rows]


def try_first(run: Run) -> None:
    """What can be known before pictures are drawn: that the judge can be loaded and knows all that it is asked for, and, of requests
    whose pictures the model has yet to draw, all but these. Raises RecipeError."""
    if run.recipe.family != "diffusion":
        return
    rows = run.evaluated.rows
    run.loaded.check_judge(list(rows.values()), [rows[text] for text in run.evaluated.groups.get("forget", ())])
    if any(data.path == GENERATED for data in run.recipe.data.values()):
        with run.loaded.family(None).encoder.before_drawing():
            prepare(run)
        run.encoded.clear()  # with latents of zeros


def draw_pictures(run: Run, hashes: dict[str, str]) -> None:
    """What the unmodified model has to draw for any request. Raises RunError."""
    if run.recipe.family == "diffusion":
        from hf_clmul.families.generated import make_generated

        rows = [row for step in run.steps for job in step.jobs for rows in job.roles.values() for row in rows]
        make_generated(run.loaded, run.recipe, rows, hashes)


def prepare(run: Run) -> None:
    """Settings and data of all requests, tried before the first one trains: a mistake in the last must not cost hours.

    Raises RecipeError.
    """
    model = None
    for step in run.steps:
        for job in step.jobs:
            args = _arguments(run, step, job)
            carried.of_base(run, step, job)
            model = _stand_in(run, job, args, model)
            rows = encoded(run, step, job)
            if "memory" in rows and run.recipe.memory.top_k is not None:  # it is stored when it has been learned
                rows["memory"] = [stored.attached(row, stored.blank(row)) for row in rows["memory"]]
            try:
                understood(args, model, rows, _family(run, job))
            except ValueError as error:
                raise RecipeError(f"request {step.name}: {error}") from error


def encoded(run: Run, step: Step, job: Job) -> dict[str, list[Encoded]]:
    """The examples of a job by role, those of the memory with what is stored of them."""
    roles = {role: run.encode(rows, job.settings_of, f"{step.name}, {role}") for role, rows in job.roles.items()}
    if "memory" in roles:
        before = step.memory if step.kind == "unlearn" else run.steps[step.index - 1].memory
        roles["memory"] = carried.with_targets(run, job.roles["memory"], roles["memory"], before)
    return roles


def _stand_in(run: Run, job: Job, args: ClmulConfig, before: Any) -> Any:
    """What a job trains: the model, or its like with an adapter, without weights. The model itself is measured first and gets
    its adapters as tasks are learned."""
    if run.recipe.adapter is None:
        return run.model
    if before is None:
        before = run.loaded.blank(run.model)
    # Only a pattern may name the adapter: all else is tried on one for all.
    return adapters.stand_in(
        before, run.loaded.adapter(run.recipe.adapter), "any" if args.trainable is None else job.adapter
    )


def carry_out(run: Run, step: Step) -> dict[str, Any] | None:
    """Brings the live model to where the request leaves it, by training or from its saved state.

    Returns {"seconds", "steps", "weights_sha256"}, or None for a finished request of which some weights are no longer kept: a
    later one replaces them. Raises RunError if training collapses, RecipeError for settings that the trainer cannot honour.
    """
    present = [adapters.TASK + name for name in step.removed if run.has(name)]
    if present:
        run.model = adapters.drop(run.model, present)
    run.stale -= set(step.removed)
    run.versions = {name: sha256 for name, sha256 in run.versions.items() if name not in step.removed}
    if run.folder.result(step) is None:
        on_main_first(run.state, lambda: _begin(run, step))
        if step.kind == "unlearn" and run.recipe.memory is not None:
            carried.remember(run, step)  # what is unlearned leaves the memory before anything trains
    done = [_bring(run, step, job) for job in step.jobs]
    if run.stale.intersection(step.stack, *step.own.values()) or None in done:
        return None
    return {
        "seconds": round(sum(each["seconds"] for each in done), 3),
        "steps": sum(each["steps"] for each in done),
        **{key: each[key] for each in done for key in ("edit",) if key in each},
        "weights_sha256": done[-1]["weights_sha256"] if done else None,
    }


def _begin(run: Run, step: Step) -> None:
    """Records the settings and the data."""
    if step.retains:
        log.info("request %s: %s", step.name, step.retains)
    run.ledger.check(step)
    run.folder.start(run.recipe, run.steps, step)
    run.ledger.starting(step)
    if not step.jobs:
        run.ledger.training(step, None, run.recipe_sha256, False, why(run.recipe, run.steps, step))


def _bring(run: Run, step: Step, job: Job) -> dict[str, Any] | None:
    """One training, done now or earlier: afterwards the live model has its weights. None if they are no longer kept."""
    trained = run.folder.trained(step, job)
    over = run.folder.result(step) is not None
    if job.adapter is not None:
        _activate(run, job)
    if trained is None and over:
        if not any(_replaced(run, other, j) for other, j in _later(run, step, job)):
            raise RunError(
                f"request {step.name} is finished, but the weights that it left ({run.folder.state(step, job)}) are gone, so "
                "that nothing can start from them: run the recipe into another folder with --output."
            )
        run.stale.add(job.adapter or "")
        return None
    if trained is not None:
        load_state(run.model, run.folder.state(step, job))
        carried.load(run, step, job, run.folder.state(step, job))
    else:
        trained = _train(run, step, job)
        if run.main:
            run.ledger.trained(step, job, trained, derived_seed(run.recipe.seed, job.label))
            save_state(
                run.model, run.folder.state(step, job), trained, lambda aside: carried.save(run, step, job, aside)
            )
            run.ledger.saved(step, job)
        run.state.wait_for_everyone()
    run.stale.discard(job.adapter or "")
    (run.versions[job.adapter or ""],) = broadcast_object_list([trained["weights_sha256"]])
    return trained


def _activate(run: Run, job: Job) -> None:
    """The job's adapters and no others, its own trainable; made anew where the job begins with a new one."""
    name, revision = adapters.TASK + job.adapter, run.loaded.revision
    if job.fresh and run.has(job.adapter):
        run.model = adapters.drop(run.model, [name])
    if not run.has(job.adapter):
        seed = derived_seed(run.recipe.seed, job.label, "adapter")
        run.model = adapters.attach_task(run.model, run.loaded.adapter(run.recipe.adapter), job.adapter, seed, revision)
    adapters.activate(run.model, [adapters.TASK + each for each in job.active], name)


def superseded(run: Run, step: Step) -> list[tuple[Step, Job]]:
    """Earlier trainings of what this request trained on or deleted: nothing starts from the weights that they left."""
    changed = {job.adapter or "" for job in step.jobs} | set(step.removed)
    return [(s, job) for s in run.steps[: step.index] for job in s.jobs if (job.adapter or "") in changed]


def _later(run: Run, step: Step, job: Job) -> list[tuple[Step, Job | None]]:
    """Later requests that train the same adapter, or delete it (None)."""
    found: list[tuple[Step, Job | None]] = []
    for other in run.steps[step.index + 1 :]:
        found += [(other, j) for j in other.jobs if j.adapter == job.adapter]
        found += [(other, None)] * (job.adapter in other.removed)
    return found


def _replaced(run: Run, step: Step, job: Job | None) -> bool:
    return run.folder.result(step) is not None or (job is not None and run.folder.trained(step, job) is not None)


def _train(run: Run, step: Step, job: Job) -> dict[str, Any]:
    checkpoint = run.folder.checkpoint(step, job, run.state.num_processes)
    run.state.wait_for_everyone()
    if run.main:
        run.folder.clear_checkpoints(step, job, keep=checkpoint)
        run.ledger.training(step, job, run.recipe_sha256, checkpoint is not None, why(run.recipe, run.steps, step))
    run.state.wait_for_everyone()
    shown = RunLog(run.folder.place(step, job) / "log.jsonl", step.title.removeprefix("after "))
    rows = encoded(run, step, job)
    trainer = _trainer(run, step, job, rows, shown)
    done = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if checkpoint is not None and done.global_step >= done.max_steps:  # Trainer would take one step more
        load_state(run.model, checkpoint)
        put_saved(run.model, checkpoint)
        if run.main:
            shown.read(done.global_step)
    else:
        try:
            with explained_writes(run.folder.request(step)):
                done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except RunError as error:
            raise RunError(
                f"request {step.name}: {error}\nWith changed settings the same command starts this request anew and keeps "
                f"the finished ones. The run folder: {run.folder.root}"
            ) from error
        except (ValueError, ImportError) as error:  # found only at the start, such as a scheduler's arguments
            raise RecipeError(f"request {step.name}, training: {error}") from error
        finally:
            shown.close()
        # Accelerate wraps forward in autocast for good; evaluation and later requests start from the bare model.
        run.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    carried.trained(run, step, job, trainer, rows)
    # The record says of an edit why there were no steps.
    edit = next((t.name for terms in trainer.terms.values() for t in terms if t.term.edit), None)
    return {
        "seconds": round(shown.seconds, 3),
        "steps": done.global_step,
        **({} if edit is None else {"edit": edit}),
        "weights_sha256": _sha256(run) if run.main else None,
    }


def _sha256(run: Run) -> str:
    """Of all weights, or of the adapter that trained: its base does not change."""
    if isinstance(run.model, PeftModel):
        return adapters.sha256(run.model, adapters.trained(run.model))
    return weights_sha256(run.model)


def _arguments(run: Run, step: Step, job: Job) -> ClmulConfig:
    recipe, unlearning = run.recipe, run.recipe.unlearning
    learns = "learn" in job.roles
    terms: dict[str, Any] = {"learn": recipe.learning.learn} if learns else {"forget": unlearning.forget}
    if "retain" in job.roles:
        terms["retain"] = unlearning.retain
    if "memory" in job.roles:
        request = recipe.requests[job.settings_of]
        own = request.memory if learns and request.memory is not None else recipe.learning.memory
        terms["memory"] = own if learns else unlearning.memory
    own = {
        "seed": derived_seed(recipe.seed, job.label),
        "use_cpu": run.state.device.type == "cpu",
        **run.loaded.arguments(run.model),
    }
    try:
        return ClmulConfig(
            **{**DEFAULTS, **own, **recipe.request_training(job.settings_of)},
            **terms,
            output_dir=str(run.folder.place(step, job)),
            conflict=recipe.learning.conflict if learns else unlearning.conflict,
            **_parts(recipe, learns),
            teacher=recipe.teacher,
            ema=None if not learns and any(TERMS[name].edit for name in unlearning.forget) else recipe.diffusion.ema,
            gamma=None if learns else unlearning.gamma,
            penalties=recipe.learning.penalties if learns else unlearning.penalties,
        )
    except ValueError as error:
        raise RecipeError(f"request {step.name}: {error}") from error


def _family(run: Run, job: Job) -> Family:
    return run.loaded.family(run.recipe.request_training(job.settings_of).get("max_length", ClmulConfig.max_length))


def _parts(recipe: Recipe, learns: bool) -> dict[str, Any]:
    """What is trained, and how an unlearn request's window is resolved beyond its conflict rule."""
    if learns:
        return {"trainable": recipe.learning.trainable}
    unlearning = recipe.unlearning
    chosen = {name: getattr(unlearning, name) for name in OF_STEPS}
    plain = {name: value.model_dump() for name, value in chosen.items() if value is not None}
    return {"trainable": unlearning.trainable, **plain}


def _trainer(run: Run, step: Step, job: Job, rows: dict[str, list[Encoded]], shown: RunLog) -> ClmulTrainer:
    if "forget" in job.roles and "retain" not in job.roles and run.recipe.unlearning.retain:
        log.warning("request %s forgets everything that was learned: there is nothing to retain", step.name)
    try:
        trainer = ClmulTrainer(
            run.model, _arguments(run, step, job), train_dataset=rows, family=_family(run, job),
            processing_class=run.loaded.tokenizer, **carried.for_trainer(run, step, job, rows),
        )  # fmt: skip
    except ValueError as error:
        raise RecipeError(f"request {step.name}: {error}") from error
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(shown)
    return trainer


def on_main_first(state: PartialState, work: Callable[[], Any]) -> None:
    """Does something once; the other processes wait, and stop too if it fails."""
    failure: list[str | None] = [None]
    try:
        if state.is_main_process:
            work()
    except Exception as error:
        failure = [str(error)]
        raise
    finally:
        if state.num_processes > 1:
            torch.distributed.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise RunError(failure[0])
