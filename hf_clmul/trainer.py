"""The one trainer of all methods: roles in, one gradient out, inside a `transformers.Trainer`. It knows terms, teachers and
conflict rules by their contracts only, and nothing of recipes, run folders or evaluation suites."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from hf_clmul.data.roles import EpochSampler
from hf_clmul.errors import RunError
from hf_clmul.families import Family, is_text, of_pipeline
from hf_clmul.families.text import TextFamily
from hf_clmul.gradients.options import Protect, Saliency, options
from hf_clmul.gradients.resolve import Change, resolve
from hf_clmul.gradients.window import GradientWindow
from hf_clmul.models import adapters
from hf_clmul.models.ema import Ema, EmaState
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.models.teachers import Nobody, Reinforced, Teacher
from hf_clmul.models.trainable import only_trainable
from hf_clmul.objectives import ROLES
from hf_clmul.objectives.active import ActiveTerm, layers, needs
from hf_clmul.training.averaged import Averaged
from hf_clmul.training.callbacks import AfterStep
from hf_clmul.training.log import WindowLog
from hf_clmul.training.penalised import Penalties
from hf_clmul.training.preparation import edit, forget_gradient, prepare
from hf_clmul.training.protected import Protected
from hf_clmul.training.request_checks import understood
from hf_clmul.training.salient import SalientPart
from hf_clmul.training.targets import new_teacher, of_teacher, said_of
from hf_clmul.training.window_passes import WindowPasses
from hf_clmul.training_args import ClmulConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)
Batch = dict[str, Any]


class ClmulTrainer(Trainer):
    """Learns and unlearns: a `Trainer` whose batches hold a micro-batch of each role.

    `train_dataset` maps roles to data sets: `{"learn": ...}`, or `{"forget": ..., "retain": ...}`; an epoch is one pass over
    `forget` (or `learn`). Where several ranks cannot share it evenly, its first examples come again at its end, and count
    again, until each rank has a whole micro-batch; `dataloader_drop_last` leaves the rest out instead. Formats:
    question/answer, prompt/completion, messages, text; for a diffusers pipeline as `model`, of which the denoiser trains,
    image/caption (`docs/diffusion.md`). Terms, conflict rule and teacher are fields of `ClmulConfig`; `conflict_rule` takes
    any callable Gram [m][m] -> weights [m] instead. `peft_config` adds a new adapter (named `default`). With the teacher
    `ema`, `teacher_state` is what the last request's trainer had under this name when its training was over; each leaves its
    own there. `importance` is for the penalty `ewc`, see `penalised.Penalties`. Raises ValueError for what cannot be
    honoured, RecipeError for data that cannot be used, RunError if training collapses.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel | DiffusionPipeline",
        args: ClmulConfig | None = None,
        data_collator: Callable[[list], Batch] | None = None,
        train_dataset: Mapping[str, Any] | Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        peft_config: LoraConfig | None = None,
        family: Family | None = None,
        conflict_rule: Callable[[list[list[float]]], list[float]] | None = None,
        teacher_state: EmaState | None = None,
        importance: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        args = args if args is not None else ClmulConfig(output_dir="clmul_output")
        if not isinstance(args, ClmulConfig):
            raise ValueError(
                f"args is a {type(args).__name__}, which knows no terms, conflict rule or teacher: "
                "give a ClmulConfig, which takes the same arguments."
            )
        if family is None and not is_text(model):
            model, family = of_pipeline(model, args.trainable)
        if isinstance(model, str):
            processing_class = processing_class or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if teacher_state is not None and teacher_choice(args.teacher)[1] is None:
            raise ValueError(
                f"teacher_state is the state of the teacher 'ema', and teacher={args.teacher!r}: leave it out."
            )
        given = {**kwargs, "data_collator": data_collator}
        self.family = family if family is not None else TextFamily(processing_class, args.max_length)
        asked = understood(args, model, train_dataset, self.family, conflict_rule, peft_config, given)
        model, self.terms, self.rule, self.lookahead = asked.model, asked.terms, asked.rule, asked.lookahead
        self.sharpness = asked.sharpness
        if args.lookahead is not None and self.lookahead is None:
            log.warning("train_dataset has one role, with no other to look ahead to: lookahead is left out")
        self.family.bind(model, args.activation_checkpointing, args.autocast_dtype)
        self.teacher: Teacher | None = None
        self.teacher_state = teacher_state
        self.incompetent: Nobody | None = None
        self.penalties = Penalties(args.penalties, importance)
        self.salient = SalientPart(options(Saliency, "saliency", args.saliency))
        self.averaged = Averaged(args.ema)
        self.protected = Protected(options(Protect, "protect", args.protect))
        self.reinforced: Reinforced | None = None
        self._window: GradientWindow | None = None
        self._change: Change | None = None
        self._means: list[float] = []
        self._pending: list[Batch] = []
        self._sampler: EpochSampler | None = None
        super().__init__(
            model, args, self.family.collator(), asked.data, self._encoded(eval_dataset), processing_class,
            **{**kwargs, "callbacks": [AfterStep(self._after_step, self._next_weights), *(kwargs.get("callbacks") or [])]},
        )  # fmt: skip
        self._log = WindowLog(self.accelerator)

    # ---- data ----------------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As `Trainer.get_eval_dataloader`, for every format that the constructor takes."""
        data = eval_dataset if isinstance(eval_dataset, str) else self._encoded(eval_dataset)
        return super().get_eval_dataloader(data)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return super().get_test_dataloader(self._encoded(test_dataset))

    def _encoded(self, data: Any) -> Any:
        """A data set, or a mapping of several, as the collator takes it; None stays None."""
        if isinstance(data, Mapping):
            return {name: self.family.encoded(one, name) for name, one in data.items()}
        return None if data is None else self.family.encoded(data, "evaluation data")

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        dataset = self.train_dataset
        self._sampler = EpochSampler(len(dataset), dataset.seed)
        return self._sampler

    def _run_epoch(self, *, model: nn.Module, epoch: int, **kwargs: Any) -> None:
        # Accelerate does not reach a sampler below several wrappers (resumed epoch, several ranks): tell it ourselves.
        self._sampler.set_epoch(epoch)
        # The last epoch, or an attempt that ran out of memory, may have stopped in the middle of a window.
        self._pending.clear()
        self._log.drop_window()
        model.zero_grad()
        super()._run_epoch(model=model, epoch=epoch, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """The count of each term in the window, over all ranks: {role: {term: count}}.

        The stock count looks for a top-level `labels` and would leave a mean of means.
        """
        if not batch_samples or _is_flat(batch_samples[0]):
            return super()._get_num_items_in_batch(batch_samples, device)
        counts = {
            (role, active.name): sum(_count(active, batch[role]) for batch in batch_samples)
            for role, terms in self.terms.items()
            for active in terms
        }
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(torch.tensor(list(counts.values()), device=device), "sum").tolist()
            counts = dict(zip(counts, summed, strict=True))
        return {
            role: {active.name: counts[role, active.name] for active in terms} for role, terms in self.terms.items()
        }

    # ---- one window ----------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. `sum` adds its gradients to `.grad`; other rules collect micro-batches until the window is whole."""
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()  # schedule-free optimizers have two modes
        inputs = self._prepare_inputs(inputs)
        if self._window is None:
            self._window = self._new_window()
        measure = bool(self.args.change_steps) and self.state.global_step % self.args.change_steps == 0
        if not (self.rule.compares or self.lookahead or self.sharpness or measure):
            loss = self._accumulate(model, inputs, num_items_in_batch)
        else:
            self._pending.append(inputs)
            if not self.accelerator.sync_gradients:
                return torch.zeros((), device=self.args.device)
            batches, self._pending = self._pending, []
            passes = WindowPasses(self, model, batches, num_items_in_batch)
            logged, self._change = resolve(
                self._window, list(self.terms), self.rule, self.lookahead, self.sharpness, passes,
                self._loss_scale(), measure,
            )  # fmt: skip
            self._log.add_statistics(logged)
            loss = passes.loss
        if self.accelerator.sync_gradients:
            self.protected.project()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return loss

    def _accumulate(self, model: nn.Module, batch: Batch, counts: dict) -> Tensor:
        """Forward and backward role by role into `.grad`; gradients travel between ranks with the last role only."""
        total = torch.zeros((), device=self.args.device)
        weights = dict(zip(self.terms, self.rule.weights([[]] * len(self.terms)), strict=True))
        active = [role for role, weight in weights.items() if weight]
        idle = [role for role, weight in weights.items() if not weight]
        for role in idle if "losses" in self.rule.needs else ():
            with torch.no_grad():  # a weight of zero has to find its way back
                total += self.role_loss(model, role, batch[role], counts[role])
        for i, role in enumerate(active):
            with nullcontext() if i == len(active) - 1 else self.deferred(model):
                loss = self.role_loss(model, role, batch[role], counts[role])
                self.accelerator.backward(loss if weights[role] == 1.0 else weights[role] * loss)
                total += loss.detach()
        if self.accelerator.sync_gradients:
            total += self.penalties.add(self._log.add_loss, next(iter(weights.values())), self._loss_scale())
            self._window.apply_masks()
            if self.rule.scheduled is not None:
                self._log.add_statistics({f"weight/{role}": weight for role, weight in weights.items()})
        return total

    def _new_window(self) -> GradientWindow:
        parameters = self._trained()
        views = self.accelerator.ddp_handler is not None and self.accelerator.ddp_handler.gradient_as_bucket_view
        masks = self.salient.hold(self.accelerator.unwrap_model(self.model), parameters)
        return GradientWindow(parameters, clone=views, masks=masks, model=self.model)

    def _trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _after_step(self) -> None:
        self.salient.restore()
        self.protected.restore()
        if not self.accelerator.optimizer_step_was_skipped:
            self.averaged.follow()
            if self.teacher is not None:
                self.teacher.follow(self.state.global_step + 1)
        if self._change is not None:
            self._log.add_statistics(self._change.measured())
            self._change = None

    def role_loss(
        self, model: nn.Module, role: str, batch: Batch, counts: dict[str, int], again: bool = False
    ) -> Tensor:
        """Weighted sum of the role's terms, each divided by its count over the whole window and all ranks. `again`: it is
        logged already."""
        terms = self.terms[role]
        targets = of_teacher(self, terms, batch)
        prediction = self.family.predict(model, batch, needs(terms), layers(terms))
        total = None
        for active in terms:
            said = said_of(self, active, prediction, batch, targets)
            value, count = active.term.function(prediction, said, **active.parameters)
            if count != (declared := _count(active, batch)):
                raise RuntimeError(
                    f"{role}/{active.name} counted {count} {active.term.unit}, the batch has {declared}: "
                    "the term breaks its contract."
                )
            # Ranks average their gradients, while the count already spans all of them. A window may hold nothing to count:
            # answers that are all shorter than what a term leaves out.
            loss = value / max(counts[active.name], 1) * self.accelerator.num_processes
            if not again:
                self._log.add_loss(f"loss/{role}/{active.name}", loss)
            weighted = loss if active.weight == 1.0 else active.weight * loss
            total = weighted if total is None else total + weighted
        return total

    @contextmanager
    def deferred(self, model: nn.Module) -> Iterator[None]:
        """Gradients stay on this rank."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def _loss_scale(self) -> float:
        return self.accelerator.scaler.get_scale() if self.accelerator.scaler is not None else 1.0

    # ---- what surrounds a step -----------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `Trainer.train`. The teacher is taken from the live weights first, before a checkpoint is loaded into them.

        Raises ValueError if these are no longer the weights before the request that is to be resumed.
        """
        wanted = any("teacher" in active.term.needs for terms in self.terms.values() for active in terms)
        wanted = wanted and teacher_choice(self.args.teacher)[1] is None  # an average is in the checkpoint
        if (wanted or self.penalties.anchored) and resume_from_checkpoint and self.state.global_step > 0:
            raise ValueError(
                "this trainer has trained its model already, so its weights can no longer serve as the teacher "
                "or anchor of the request to be resumed: make a new ClmulTrainer from the model as it was before the request, "
                "then call train(resume_from_checkpoint=...)."
            )
        if self.train_dataset is not None:
            self._tell_repeats()
        model = self.accelerator.unwrap_model(self.model)
        self._window = self._change = None
        self.rule.start(len(self.terms))
        self._log = WindowLog(self.accelerator)
        with only_trainable(model, self.family.pattern(self.args.trainable)):
            if any(active.term.edit for terms in self.terms.values() for active in terms):
                return edit(self, resume_from_checkpoint)
            self.protected.start(model, self.family, self.train_dataset)
            self.penalties.start(model)
            if self.salient.wanted and not resume_from_checkpoint:
                self.salient.check(model)
            self.reinforced, self.incompetent = prepare(self)
            self.teacher = new_teacher(self, model)
            self.averaged.start(model)
            if self.salient.wanted and not resume_from_checkpoint:
                self.salient.choose(model, forget_gradient(self, model), self.args.seed)
            try:
                done = super().train(resume_from_checkpoint, **kwargs)
                self.averaged.put()
                if isinstance(self.teacher, Ema):
                    self.teacher_state = self.teacher.state()
                return done
            finally:
                self._pending.clear()
                self.incompetent = None
                for held in filter(None, (self.averaged, self.teacher, self.reinforced)):
                    held.release()

    def _tell_repeats(self) -> None:
        ranks, size = self.accelerator.num_processes, len(self.train_dataset)
        again = -size % (ranks * self.args.per_device_train_batch_size)
        if ranks > 1 and again and not self.args.dataloader_drop_last and self.is_world_process_zero():
            log.info("%d examples cannot be shared evenly by %d ranks: each epoch sees %d again", size, ranks, again)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The collapse guard: called before each optimizer step, with the norm that is logged anyway."""
        norm = super()._get_grad_norm(model, grad_norm)
        losses = self._log.window_losses()
        # A loss scaler handles overflowing gradients itself, by skipping the step.
        guarded = norm if self.accelerator.scaler is None else None
        self._log.stop_if_collapsed(self.state.global_step + 1, losses, guarded)
        self._log.end_window()
        self._means = [
            sum(active.weight * losses.get(f"loss/{role}/{active.name}", 0.0) for active in terms)
            for role, terms in self.terms.items()
        ]
        return norm

    def _next_weights(self) -> None:
        """Of a scheduled rule, once the window that is over counts in the epoch."""
        self.rule.advance(self._means, self.state.epoch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line about training steps, not of an evaluation or the closing summary
            logs.update(self._log.drain())
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self.averaged.shown():
            return super().evaluation_loop(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Evaluation only (training goes through `training_step`): the stock token-mean loss of one flat batch."""
        loss = self.family.loss(model, inputs)
        if loss is not None:
            return (loss, {}) if return_outputs else loss
        known = {name: value for name, value in inputs.items() if name in self.family.accepted}
        return super().compute_loss(model, known, return_outputs, num_items_in_batch)

    def prediction_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if not self.family.own_files:
            return super().prediction_step(model, inputs, *args, **kwargs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.family.loss(model, self._prepare_inputs(inputs))
        return loss.detach().float(), None, None

    def floating_point_ops(self, inputs: Batch) -> int:
        batches = [inputs] if _is_flat(inputs) else inputs.values()
        return sum(super(ClmulTrainer, self).floating_point_ops(batch) for batch in batches)

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        for batch in [inputs] if _is_flat(inputs) else inputs.values():
            super()._track_num_input_tokens(batch)

    # ---- checkpoints: the adapter that trains, what the rule keeps, the masks ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            for part in filter(None, (self.rule, self.salient, self.averaged, self.teacher)):
                part.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.rule.load(Path(checkpoint), self._trained())
            for part in filter(None, (self.salient, self.averaged, self.teacher)):
                part.load(Path(checkpoint))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel) and not self.family.own_files:
            return super()._save(output_dir, state_dict)
        if not self.args.should_save:  # called on every rank
            return
        folder = Path(output_dir or self.args.output_dir)
        if isinstance(model, PeftModel):
            adapters.save(model, adapters.trained(model), folder)
        if self.family.own_files:
            self.family.save(model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model if model is not None else self.accelerator.unwrap_model(self.model)
        if not isinstance(target, PeftModel):
            if self.family.own_files:
                return self.family.load(target, Path(resume_from_checkpoint))
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not (Path(resume_from_checkpoint) / adapters.WEIGHTS).is_file():
            raise RunError(
                f"{resume_from_checkpoint} holds no {adapters.WEIGHTS}: it is not a checkpoint of this trainer."
            )
        adapters.load(target, adapters.trained(target), Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if not (isinstance(self.accelerator.unwrap_model(self.model), PeftModel) or self.family.own_files):
            return super()._load_best_model()
        self._load_from_checkpoint(self.state.best_model_checkpoint)
        self.averaged.load(Path(self.state.best_model_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs.pop("tags", None) or []
        tags = [given] if isinstance(given, str) else list(given)
        super().create_model_card(*args, tags=[*tags, "hf_clmul", "unlearning", "continual-learning"], **kwargs)
        if self.is_world_process_zero():
            self.family.label(Path(self.args.output_dir) / "README.md")


def _is_flat(batch: Batch) -> bool:
    """Whether it is one batch, as of evaluation data, and not one of each role."""
    return not any(role in batch for role in ROLES)


def _count(active: ActiveTerm, batch: Batch) -> int:
    return active.count(batch["lengths"], batch["alternatives"])
