"""What the trainer cannot honour, refused before training with the reason and the remedy. It trains nothing."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from torch.distributed.fsdp import FSDPModule
from transformers.training_args import OptimizerNames, ParallelMode

from hf_clmul.errors import RunError
from hf_clmul.gradients.active import ActiveRule
from hf_clmul.gradients.options import Lookahead, Sharpness
from hf_clmul.models import adapters
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.objectives.active import ActiveTerm

if TYPE_CHECKING:
    from hf_clmul.training_args import ClmulConfig

INSIDE_BACKWARD = (OptimizerNames.LOMO, OptimizerNames.ADALOMO)


def refuse(
    args: "ClmulConfig",
    model: Any,
    peft_config: Any,
    rule: ActiveRule,
    lookahead: Lookahead | None,
    sharpness: Sharpness | None,
    terms: Mapping[str, Sequence[ActiveTerm]],
    given: dict[str, Any],
) -> None:
    """Raises ValueError, one line for each thing that cannot be honoured. `given` holds the arguments of
    `Trainer` that `ClmulTrainer` does not name."""
    sharded = bool(args.fsdp) or any(isinstance(module, FSDPModule) for module in model.modules())
    problems = [*_of_arguments(args, rule, sharded), *_of_trainer(given), *_of_model(model, peft_config)]
    problems += _of_coupled(args, terms) + _of_attention(args, terms)
    if lookahead is not None:
        problems += _of_lookahead(args, model, peft_config, lookahead, rule, list(terms))
    if sharpness is not None:
        problems += _of_sharpness(args, model, peft_config, sharpness, list(terms))
    if problems:
        raise ValueError("ClmulTrainer cannot do what was asked:\n" + "\n".join(f"- {text}" for text in problems))


def _of_arguments(args: "ClmulConfig", rule: ActiveRule, sharded: bool) -> list[str]:
    optimizer = OptimizerNames(args.optim)
    reentrant = (args.activation_checkpointing_kwargs or {}).get("use_reentrant", False)
    return [text for wrong, text in (
        (args.deepspeed is not None and rule.compares,
         "a conflict rule needs each role's gradient, which DeepSpeed does not hand out: use conflict='sum' or 'pdu', or FSDP2."),
        (args.deepspeed is not None and args.change_steps > 0,
         "change_steps needs each role's gradient, which DeepSpeed does not hand out: leave it 0, or use FSDP2."),
        (sharded and "gradients" in rule.needs,
         f"conflict={rule.name!r} works on whole gradients, and FSDP leaves each rank a part: use DDP, or a "
         "rule that needs inner products only, such as 'pcgrad_retain_first' or 'agem'."),
        ((sharded or args.deepspeed is not None) and args.saliency is not None,
         "saliency looks at whole parameters, and FSDP and DeepSpeed leave each rank a part: use DDP."),
        ((sharded or args.deepspeed is not None) and bool(args.penalties),
         "penalties look at whole weights, and FSDP and DeepSpeed leave each rank a part: use DDP."),
        (bool(args.fsdp or args.deepspeed) and args.trainable is not None,
         "trainable chooses parameters by the names of the whole model, which FSDP and DeepSpeed replace: use DDP, or "
         "an "
         "adapter with target_modules."),
        ((sharded or args.deepspeed is not None) and teacher_choice(args.teacher)[1] is not None,
         "teacher='ema' keeps whole parameters, and FSDP and DeepSpeed leave each rank a part: use DDP, or 'before_request'."),
        (optimizer in INSIDE_BACKWARD or "layerwise" in optimizer.value,
         f"optim={optimizer.value!r} updates weights inside the backward pass, before gradients can be combined: "
         "use 'adamw_torch' or another ordinary optimizer."),
        (args.parallel_mode == ParallelMode.NOT_DISTRIBUTED,
         "several GPUs in one process (nn.DataParallel) mix the roles' gradients: start with `accelerate launch` or "
         "`torchrun`, "
         "or show one GPU with CUDA_VISIBLE_DEVICES=0."),
        (args.activation_checkpointing and reentrant,
         "re-entrant checkpointing diverges when a model is called several times in a step: drop `use_reentrant`."),
        (args.label_smoothing_factor != 0, "label_smoothing_factor has no meaning for terms other than nll: set it to 0."),
        (not args.average_tokens_across_devices,
         "average_tokens_across_devices=False gives a mean of means, while terms are averaged over all ranks: leave it on."),
        (args.train_sampling_strategy != "random",
         "train_sampling_strategy: the order of examples is fixed by (seed, epoch), so that a resume is exact: leave it 'random'."),
        (bool(args.accelerator_config.split_batches or args.accelerator_config.dispatch_batches),
         "accelerator_config: split_batches and dispatch_batches cut a batch of roles apart: leave them out and set "
         "per_device_train_batch_size instead."),
    ) if wrong]  # fmt: skip


def _of_attention(args: "ClmulConfig", terms: Mapping[str, Sequence[ActiveTerm]]) -> list[str]:
    names = [
        f"{role}/{active.name}"
        for role, of_role in terms.items()
        for active in of_role
        if "attention" in active.term.needs
    ]
    if not (names and args.activation_checkpointing):
        return []
    return [
        f"{names[0]} measures attention while the model runs, and activation_checkpointing runs it again in the "
        "backward pass: "
        "leave it off, with smaller batches and more gradient_accumulation_steps."
    ]


def _of_lookahead(
    args: "ClmulConfig", model: Any, peft_config: Any, lookahead: Lookahead, rule: ActiveRule, roles: Sequence[str]
) -> list[str]:
    exact = lookahead.mode == "exact"
    # Denoisers ask torch for attention, which is then told to take its own.
    attention = model.config._attn_implementation if hasattr(model.config, "_attn_implementation") else "sdpa"
    return [text for wrong, text in (
        *_of_displacement("lookahead", args, model, peft_config),
        (lookahead.inner not in roles, f"lookahead.inner is {lookahead.inner!r}, but the roles are {', '.join(roles)}: leave "
         "lookahead out, or give data of that role."),
        (rule.name == "alternate", "conflict='alternate' steps on one role at a time, so that there is no other to look ahead "
         "to: use another rule, or leave lookahead out."),
        (exact and args.world_size > 1, "lookahead mode 'exact' takes a second derivative, which DDP and FSDP do not pass "
         "on between ranks: use mode='cross'."),
        (exact and (args.fp16 or args.activation_checkpointing), "lookahead mode 'exact' takes a second derivative, which "
         "neither a loss scaler (fp16) nor activation checkpointing allows: use mode='cross'."),
        (exact and attention not in ("eager", "sdpa"),
         f"lookahead mode 'exact' needs attention with a second derivative, which {attention!r} "
         "has not: load the model with attn_implementation='eager', or use mode='cross'."),
    ) if wrong]  # fmt: skip


def _of_sharpness(
    args: "ClmulConfig", model: Any, peft_config: Any, sharpness: Sharpness, roles: Sequence[str]
) -> list[str]:
    return [text for wrong, text in (
        *_of_displacement("sharpness", args, model, peft_config),
        (sharpness.role not in roles, f"sharpness is of the forget role, but the roles are {', '.join(roles)}: leave sharpness out."),
        (args.lookahead is not None, "sharpness and lookahead both choose where a gradient is taken: leave one of them out."),
    ) if wrong]  # fmt: skip


def _of_displacement(option: str, args: "ClmulConfig", model: Any, peft_config: Any) -> list[tuple[bool, str]]:
    """Whether weights cannot be moved a little and back, and the reason."""
    # A new adapter is made in float32.
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad} if peft_config is None else set()
    half = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes - {torch.float32, torch.float64})
    return [
        (bool(half), f"{option} moves the weights a little and back, which {', '.join(half)} weights round away: load the model "
         "in float32 and set bf16=True (mixed precision), or train a LoRA adapter, whose weights are float32."),
        (args.deepspeed is not None, f"{option} needs each role's gradient, which DeepSpeed does not hand out: use FSDP2."),
    ]  # fmt: skip


def _of_coupled(args: "ClmulConfig", terms: Mapping[str, Sequence[ActiveTerm]]) -> list[str]:
    names = [f"{role}/{active.name}" for role, of_role in terms.items() for active in of_role if active.term.coupled]
    accumulated, size = args.gradient_accumulation_steps, args.per_device_train_batch_size
    return [f"{names[0]} compares the examples of a batch with each other, {text}" for wrong, text in (
        (accumulated > 1, f"and gradient_accumulation_steps={accumulated} cuts the batch apart: set it to 1 and raise "
         "per_device_train_batch_size, with activation_checkpointing where memory is short, or leave the term out."),
        (args.world_size > 1, f"and {args.world_size} ranks each see a part of it: train with one process, or leave the term "
         "out."),
        (size < 2, "and per_device_train_batch_size=1 leaves nothing to compare: set it to 2 or more."),
    ) if names and wrong]  # fmt: skip


def _of_trainer(given: dict[str, Any]) -> list[str]:
    return [text for name, text in (
        ("data_collator", "data_collator: batches of roles are collated by the trainer; give data sets with "
         "question/answer, prompt/completion, messages or text columns, or with input_ids and labels."),
        ("compute_loss_func", "compute_loss_func sees neither roles nor teacher: write a term (see CONTRIBUTING.md)."),
        ("model_init", "model_init makes a new model when training starts, after adapter and teacher were prepared: give `model`."),
    ) if given.get(name) is not None]  # fmt: skip


def _of_model(model: Any, peft_config: Any) -> list[str]:
    if peft_config is not None:
        return [text for wrong, text in (
            (hasattr(model, "peft_config"), "peft_config is given, but the model has an adapter already: give one of them."),
            (not isinstance(peft_config, LoraConfig),
             f"peft_config is a {type(peft_config).__name__}: only LoRA adapters can be trained, give a LoraConfig."),
        ) if wrong]  # fmt: skip
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return [
            "nothing is trainable: load the adapter with PeftModel.from_pretrained(..., is_trainable=True), or give "
            "peft_config for a new one."
        ]
    if not isinstance(model, PeftModel):
        return []
    try:
        name = adapters.trained(model)
    except RunError as error:
        return [str(error)]
    if not isinstance(model.peft_config[name], LoraConfig):
        return [f"adapter {name!r} is a {model.peft_config[name].peft_type.value}: only LoRA adapters can be trained."]
    if not adapters.trains_alone(model, name):
        return [
            f"parameters outside adapter {name!r} are trainable, but only the adapter is saved: freeze them, or train "
            "a model without adapters."
        ]
    return []
