"""What terms need made from the live model before the first step: alternatives that it writes itself, a reinforced model; and
edits, which need no step at all. It sees the weights as they were before the request, and leaves them so unless it edits."""

import copy
import math
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PrinterCallback, ProgressCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType, TrainOutput

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.gradients.options import OF_STEPS
from hf_clmul.models import adapters
from hf_clmul.models.alternatives import encoded_alternatives, own_alternatives
from hf_clmul.models.teachers import Nobody, Reinforced
from hf_clmul.objectives import FORGET
from hf_clmul.objectives import preparation as settings
from hf_clmul.objectives.active import ActiveTerm, is_sampled

if TYPE_CHECKING:
    from hf_clmul.trainer import ClmulTrainer
    from hf_clmul.training_args import ClmulConfig


def check_preparations(args: "ClmulConfig", model: nn.Module, terms: Mapping[str, list[ActiveTerm]]) -> None:
    """Raises ValueError for what cannot be prepared: an edit beside other roles' terms, of an adapter or with options
    of training; and whole models where weights are sharded."""
    for active in terms.get(FORGET, ()):
        name = f"{FORGET}/{active.name}"
        others = [role for role in terms if role != FORGET]
        if active.term.edit and others:
            raise ValueError(
                f"{name} is an edit, which takes no step, so that no {others[0]} term can act: give {others[0]}={{}}."
            )
        options = {}
        if active.term.edit:
            options = {name: getattr(args, name) for name in OF_STEPS}
            options["penalties"] = args.penalties or None
        for option in (option for option, value in options.items() if value is not None):
            raise ValueError(f"{name} is an edit, which takes no step, so that {option} cannot act: leave it out.")
        if active.term.edit and isinstance(model, PeftModel):
            why = "an adapter has none" if "keys_values" in active.term.needs else settings.NEGATED
            raise ValueError(
                f"{name} works on whole weights, and {why}: train all weights, or take another forget term."
            )
        if "keys_values" in active.term.needs and (args.fsdp or args.deepspeed is not None):
            raise ValueError(f"{name} works on whole weights, and FSDP and DeepSpeed keep them in parts: use DDP.")
        if is_sampled(active):
            if args.saliency is not None:
                raise ValueError(
                    f"{name}: `sampled` leaves no images, by whose likelihood saliency is measured: leave one of the "
                    "two out."
                )
            if args.fsdp or args.deepspeed is not None:
                raise ValueError(
                    f"{name}: `sampled` needs the whole model before training, and it is in parts: use DDP."
                )
        if active.term.needs & {"reinforced", "generated"} and args.deepspeed is not None:
            raise ValueError(f"{name} needs the whole model before training, and DeepSpeed keeps it in parts: use DDP.")
        if "reinforced" in active.term.needs and args.fsdp:
            raise ValueError(f"{name} trains the model twice, and FSDP cannot shard it again in between: use DDP.")
        sharded = (
            bool(args.fsdp) or args.deepspeed is not None or any(isinstance(m, FSDPModule) for m in model.modules())
        )
        if incompetent_weights(active) == "base" and not isinstance(model, PeftModel):
            raise ValueError(f"{name}: {settings.NO_BASE}")
        if incompetent_weights(active) == "random" and sharded:
            raise ValueError(
                f"{name} makes a whole model with random weights on each rank, where FSDP and DeepSpeed keep models in "
                f"parts: give it `weights: {settings.WITHOUT_A_MODEL[active.term.family]}`, or use DDP."
            )


def prepare(trainer: "ClmulTrainer") -> tuple[Reinforced | None, Nobody | None]:
    """Writes the alternatives that terms ask for, on every rank alike, and returns the reinforced model and the one that knows
    nothing, each if a term asks for it."""
    reinforced = incompetent = None
    for role, terms in trainer.terms.items():
        for active in terms:
            if "generated" in active.term.needs:
                _write_alternatives(trainer, role, active)
            if "reinforced" in active.term.needs:
                with reinforcing(trainer, active.preparation) as model:
                    reinforced = Reinforced(model)
            if is_sampled(active):
                _sample(trainer, role, active.preparation)
            if incompetent_weights(active) in ("random", "base"):
                model = trainer.accelerator.unwrap_model(trainer.model)
                drawn = incompetent_weights(active) == "random"
                seed = derived_seed(trainer.args.seed, "incompetent")
                incompetent = Nobody(model, trainer.family.random_like(model, seed) if drawn else None)
    return reinforced, incompetent


def incompetent_weights(active: ActiveTerm) -> str | None:
    """The weights of the incompetent teacher that the term asks for, if it asks for one."""
    return active.preparation.weights if "incompetent" in active.term.needs else None


def forget_gradient(trainer: "ClmulTrainer", model: nn.Module) -> dict[str, Tensor]:
    """Gradient {parameter: tensor} of the forget answers' mean log-probability, at the model as it is, over all
    examples. Every rank works it out; rank 0's counts."""
    rows, size = trainer.train_dataset.roles[FORGET], trainer.args.per_device_train_batch_size
    batches = [trainer.data_collator.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    model.zero_grad()
    tokens = sum(sum(batch["lengths"]) for batch in batches)
    with adapters.untouched(model):
        model.eval()
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            with trainer.accelerator.autocast():
                value = trainer.family.likelihood(model, inputs)
            (value / tokens).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return broadcast(found)  # rounding must not give ranks other masks


def edit(trainer: "ClmulTrainer", resume_from_checkpoint: Any = None) -> TrainOutput:
    """Carries out the forget term that is an edit. Logs how far the weights moved, relative to their norm.

    Raises ValueError if it is to be resumed, RunError if the weights would not be finite; they are as before then. The
    term's function is of one parameter and its values after more training, or of all that read prompts.
    """
    if resume_from_checkpoint:
        raise ValueError("an edit takes no step and leaves no checkpoint to resume from: call train() without one.")
    began = time.monotonic()
    (active,) = trainer.terms[FORGET]
    model = trainer.accelerator.unwrap_model(trainer.model)
    if "reinforced" in active.term.needs:
        moved, remedy = _without_what_is_learned(trainer, active), "Lower its `learning_rate` or its `scale`."
    else:
        moved, remedy = trainer.family.edited(model, active, trainer.train_dataset), "Raise its `lamb`."
    before = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    distance = _norm({name: value - before[name] for name, value in moved.items()})
    if not math.isfinite(distance):
        raise RunError(f"{active.name}: the edited weights are not finite. {remedy}")
    relative = distance / _norm(before)
    _set(model, moved)
    trainer.log({f"edit/{active.name}": relative})
    return TrainOutput(0, 0.0, {"train_runtime": round(time.monotonic() - began, 3)})


def _without_what_is_learned(trainer: "ClmulTrainer", active: ActiveTerm) -> dict[str, Tensor]:
    with reinforcing(trainer, active.preparation) as model:
        after = _values(model)
    return {name: _edited(active, value, after.pop(name)) for name, value in _values(model).items()}


@contextmanager
def reinforcing(trainer: "ClmulTrainer", how: settings.Reinforced) -> Iterator[nn.Module]:
    """Trains the model further on the forget data; hands it out with these weights, and gives those before back bit for bit.

    The training is seeded by itself and starts from the weights before the request, so that a resumed request, which loads
    its checkpoint later, comes to the same. The global random state stays as it was.
    """
    from hf_clmul.trainer import ClmulTrainer  # it is being prepared for one

    model = trainer.accelerator.unwrap_model(trainer.model)
    before = _values(model)
    rows = trainer.train_dataset.roles[FORGET]
    with adapters.untouched(model):
        try:
            with _random_state_kept():
                learning = ClmulTrainer(
                    model, _arguments(trainer.args, how), train_dataset={"learn": rows},
                    processing_class=trainer.processing_class, family=trainer.family,
                )  # fmt: skip
                learning.remove_callback(PrinterCallback)
                learning.remove_callback(ProgressCallback)
                try:
                    learning.train()
                except RunError as error:
                    raise RunError(
                        f"in the training on the forget data alone, at the term's `learning_rate`: {error}"
                    ) from error
                # Accelerate wraps forward for good, and the trainer to come wraps it itself.
                learning.accelerator.unwrap_model(learning.model, keep_fp32_wrapper=False)
                learning.accelerator.free_memory()
            yield model
        finally:
            _set(model, before)
            model.zero_grad(set_to_none=True)


def _arguments(args: "ClmulConfig", how: settings.Reinforced) -> "ClmulConfig":
    """The request's own, but for one plain role, the term's rate and epochs, and nothing written or shown."""
    own = copy.copy(args)
    inherited = {field.name for field in fields(TrainingArguments)} | {"max_length"}
    for field in fields(args):
        if field.name not in inherited:  # whatever makes an unlearning request of it
            setattr(own, field.name, field.default)
    own.learn = {"nll": {}}
    own.num_train_epochs, own.max_steps, own.learning_rate = how.epochs, -1, how.learning_rate
    own.lr_scheduler_type, own.lr_scheduler_kwargs, own.warmup_steps = SchedulerType.CONSTANT, None, 0
    own.seed, own.data_seed = derived_seed(args.seed, "reinforced"), None
    own.save_strategy, own.load_best_model_at_end, own.push_to_hub = SaveStrategy.NO, False, False
    own.eval_strategy = own.logging_strategy = IntervalStrategy.NO
    own.eval_on_start, own.report_to, own.disable_tqdm = False, [], True
    return own


def _sample(trainer: "ClmulTrainer", role: str, how: settings.Sampled) -> None:
    """Noisy samples for the examples of a role, by the model as it is. Every rank makes them all."""
    model, data = trainer.accelerator.unwrap_model(trainer.model), trainer.train_dataset
    with adapters.untouched(model), torch.no_grad(), trainer.accelerator.autocast():
        data.roles[role] = trainer.family.sampled(model.eval(), data.roles[role], how, data.seed)


def _write_alternatives(trainer: "ClmulTrainer", role: str, active: ActiveTerm) -> None:
    """The main process writes them, or finds them in its cache; the others are told."""
    data, tokenizer = trainer.train_dataset, trainer.processing_class
    texts = [None]
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        texts = [own_alternatives(model, tokenizer, data.roles[role], active.preparation.alternatives, data.seed)]
    (found,) = broadcast_object_list(texts)
    data.own_alternatives[role] = encoded_alternatives(found, data.roles[role], tokenizer, trainer.args.max_length)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _edited(active: ActiveTerm, before: Tensor, after: Tensor) -> Tensor:
    """Worked out in float32 or better."""
    wide = torch.promote_types(before.dtype, torch.float32)
    return active.term.function(before.to(wide), after.to(wide), **active.parameters).to(before.dtype)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.hypot(*(float(tensor.float().norm()) for tensor in tensors.values()))
