"""One request of a run: its starting weights, its training with checkpoints and resume, and the state it leaves.
Knows the trainer and the run folder; nothing of evaluation, export or reports."""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_clmul import ledger
from hf_clmul.data.encoding import Encoded
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import Example, encode_dataset
from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.export import load_state, save_state
from hf_clmul.models import adapters
from hf_clmul.models.loading import Loaded, weights_sha256
from hf_clmul.paths import explained_writes
from hf_clmul.plan import Step
from hf_clmul.recipe_schema import Learn, Recipe
from hf_clmul.request_checks import understood
from hf_clmul.run_folder import RunFolder, settings
from hf_clmul.run_log import RunLog
from hf_clmul.trainer import ClmulTrainer
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
    """What the functions of a run share. `measured` is a digest of the groups and of how they are measured."""

    recipe: Recipe
    recipe_sha256: str
    folder: RunFolder
    steps: list[Step]
    groups: dict[str, list[Example]]
    how: Measuring
    measured: str
    state: PartialState
    loaded: Loaded
    model: Any
    encoded: dict[str, dict[str, list[Encoded]]] = field(default_factory=dict)

    @property
    def main(self) -> bool:
        return self.state.is_main_process


def prepare(run: Run) -> None:
    """Settings and data of all requests, tried before the first one trains: a mistake in the last must not cost hours.

    Raises RecipeError.
    """
    model = _stand_in(run)
    for step in run.steps:
        args = _arguments(run, step)
        run.encoded[step.name] = {
            role: encode_dataset(rows, run.loaded.tokenizer, args.max_length, f"{step.name}, {role}")
            for role, rows in step.roles.items()
        }
        try:
            understood(args, model, run.encoded[step.name], run.loaded.tokenizer)
        except ValueError as error:
            raise RecipeError(f"request {step.name}: {error}") from error


def _stand_in(run: Run) -> Any:
    """What the requests train: the model, or its like with the adapter, without weights. The model itself is measured first
    and gets its adapter when the task is learned."""
    if run.recipe.adapter is None:
        return run.model
    task = next(request.task for request in run.recipe.requests if isinstance(request, Learn))
    with torch.device("meta"):
        model = type(run.model)(deepcopy(run.model.config))
    return adapters.attach_task(model, run.recipe.adapter, task, 0)


def carry_out(run: Run, step: Step) -> dict[str, Any] | None:
    """Brings the live model to where the request leaves it, by training or from its saved state.

    Returns {"seconds", "steps", "weights_sha256"}, or None for a finished request whose state is no longer kept: a later one
    replaces it. Raises RunError if training collapses, RecipeError for settings that the trainer cannot honour.
    """
    if isinstance(step.request, Learn) and run.recipe.adapter is not None:
        task, revision = step.request.task, run.loaded.options["revision"]
        seed = derived_seed(run.recipe.seed, task, "adapter")
        run.model = adapters.attach_task(run.model, run.recipe.adapter, task, seed, revision)
    trained = run.folder.trained(step)
    later = run.steps[step.index + 1 :]
    if trained is None and run.folder.result(step) is not None and not any(map(run.folder.trained, later)):
        raise RunError(
            f"request {step.name} is finished, but the weights that it left ({run.folder.state(step)}) are gone, so that "
            "nothing can start from them: run the recipe into another folder with --output."
        )
    if trained is not None:
        load_state(run.model, run.folder.state(step))
    elif run.folder.result(step) is None:
        trained = _train(run, step)
        if run.main:
            ledger.append(run.folder.ledger, "finished", name=step.name, weights_sha256=trained["weights_sha256"])
            save_state(run.model, run.folder.state(step), trained)
        run.state.wait_for_everyone()
    return trained


def _train(run: Run, step: Step) -> dict[str, Any]:
    on_main_first(run.state, lambda: run.folder.start(run.recipe, run.steps, step))
    checkpoint = run.folder.checkpoint(step, run.state.num_processes)
    run.state.wait_for_everyone()
    if run.main:
        run.folder.clear_checkpoints(step, keep=checkpoint)
        ledger.append(
            run.folder.ledger,
            "request",
            name=step.name,
            resumed=checkpoint is not None,
            recipe_sha256=run.recipe_sha256,
            examples=settings(run.recipe, run.steps, step)["examples"],
        )
    run.state.wait_for_everyone()
    shown = RunLog(run.folder.request(step) / "log.jsonl", step.title.removeprefix("after "))
    trainer = _trainer(run, step, shown)
    done = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    if checkpoint is not None and done.global_step >= done.max_steps:  # Trainer would take one step more
        load_state(run.model, checkpoint)
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
    # The record says of an edit why there were no steps.
    edit = next((t.name for terms in trainer.terms.values() for t in terms if t.term.edit), None)
    return {
        "seconds": round(shown.seconds, 3),
        "steps": done.global_step,
        **({} if edit is None else {"edit": edit}),
        "weights_sha256": weights_sha256(run.model) if run.main else None,
    }


def _arguments(run: Run, step: Step) -> ClmulConfig:
    recipe, unlearning = run.recipe, run.recipe.unlearning
    terms: dict[str, Any] = {"learn": recipe.learning.learn} if step.kind == "learn" else {"forget": unlearning.forget}
    if "retain" in step.roles:
        terms["retain"] = unlearning.retain
    own = {
        "seed": derived_seed(recipe.seed, step.name),
        "use_cpu": run.state.device.type == "cpu",
        # Trainer writes its own, false, into the model's config, and so into what is exported.
        "use_cache": run.model.config.to_dict().get("use_cache", False),
    }
    try:
        return ClmulConfig(
            **{**DEFAULTS, **own, **recipe.request_training(step.index)},
            **terms,
            output_dir=str(run.folder.request(step)),
            conflict=unlearning.conflict,
            **_parts(recipe, step),
            teacher=recipe.teacher,
        )
    except ValueError as error:
        raise RecipeError(f"request {step.name}: {error}") from error


def _parts(recipe: Recipe, step: Step) -> dict[str, Any]:
    """What is trained, and how an unlearn request's window is resolved beyond its conflict rule."""
    if step.kind == "learn":
        return {"trainable": recipe.learning.trainable}
    unlearning = recipe.unlearning
    chosen = {"lookahead": unlearning.lookahead, "saliency": unlearning.saliency}
    plain = {name: value.model_dump() for name, value in chosen.items() if value is not None}
    return {"trainable": unlearning.trainable, **plain}


def _trainer(run: Run, step: Step, shown: RunLog) -> ClmulTrainer:
    if step.kind == "unlearn" and "retain" not in step.roles and run.recipe.unlearning.retain:
        log.warning("request %s forgets everything that was learned: there is nothing to retain", step.name)
    try:
        trainer = ClmulTrainer(
            run.model,
            _arguments(run, step),
            train_dataset=run.encoded[step.name],
            processing_class=run.loaded.tokenizer,
        )
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
