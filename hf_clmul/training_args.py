"""Training arguments: transformers' own, plus which terms act on which role. It knows no model and no data."""

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from annotated_types import Ge, Le
from transformers import TrainingArguments

from hf_clmul.families.options import Decay
from hf_clmul.gradients.active import active_rule
from hf_clmul.gradients.conflict import DEFAULT_RULE
from hf_clmul.gradients.options import Lookahead, Protect, Saliency, Sharpness, options
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.objectives.penalties import active_penalties
from hf_clmul.recipe.problems import value_problem

ROLE_TERMS = "terms of the {} role: {{name: {{parameter: value, 'weight': 1.0}}}}. Default: {}."


@dataclass
class ClmulConfig(TrainingArguments):
    """`TrainingArguments` for `ClmulTrainer`.

    Differing defaults: `logging_nan_inf_filter` and `remove_unused_columns` are off and stay off (the first hides a
    collapse, the second would drop the roles' columns); `logging_steps` is 10. `per_device_train_batch_size` counts
    examples of each role. Terms are those of `hf-clmul ls`.
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS, "learn", "forget", "retain", "memory", "conflict",
        "lookahead", "sharpness", "saliency", "protect", "teacher", "penalties",
    ]  # fmt: skip

    learn: dict[str, Any] | str | None = field(default=None, metadata={"help": ROLE_TERMS.format("learn", "nll")})
    forget: dict[str, Any] | str | None = field(default=None, metadata={"help": ROLE_TERMS.format("forget", "npo")})
    retain: dict[str, Any] | str | None = field(default=None, metadata={"help": ROLE_TERMS.format("retain", "kl")})
    memory: dict[str, Any] | str | None = field(default=None, metadata={"help": ROLE_TERMS.format("memory", "nll")})
    penalties: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "Penalties on the weights, in the anchor role's gradient: {name: {'weight': 1.0}}: ewc, o_lora, n_lora."})  # fmt: skip
    conflict: dict[str, Any] | str | None = field(default=DEFAULT_RULE, metadata={
        "help": "How the roles' gradients become one update: a rule, or {rule: {parameter: value}}."})  # fmt: skip
    lookahead: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "LUR: {inner: retain, mode: cross, alpha: 0.1}, any of them; null: no look ahead."})  # fmt: skip
    sharpness: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "SAM: {rho: 0.01}: the forget gradient is taken where the forget loss is highest nearby."})  # fmt: skip
    saliency: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "{train: 0.5} trains the most salient part only; {trim: 0.03} draws it anew first."})  # fmt: skip
    protect: dict[str, Any] | str | None = field(default=None, metadata={
        "help": "Diffusion: {prompts: [...]}: what keys and values put out for these stays; {}: for all kept."})  # fmt: skip
    trainable: str | None = field(default=None, metadata={
        "help": "Regular expression: only parameters whose whole name matches are trained. Of diffusion models also a "
        "name: cross_attention_kv, cross_attention, all_but_cross_attention, added_kv, full, text_encoder."})  # fmt: skip
    change_steps: int = field(default=0, metadata={
        "help": "Every so many steps, log what the step changes of each role's loss to first order; 0: never."})  # fmt: skip
    gamma: float | None = field(default=None, metadata={
        "help": "Of an unlearning request: 1 - gamma weighs the forget role's terms, gamma those of all others (UniCLUN)."})  # fmt: skip
    teacher: dict[str, Any] | str | None = field(default="before_request", metadata={
        "help": "Where targets come from: a teacher, or {teacher: {parameter: value}}."})  # fmt: skip
    ema: float | None = field(default=None, metadata={
        "help": "Diffusion: decay, such as 0.9999, of the moving average of what trains, which training leaves behind."})  # fmt: skip
    max_length: int | None = field(default=1024, metadata={"help": "Tokens kept of an example; null keeps all."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Off: it would hide a collapse."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Off: roles are not model inputs."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})

    def __post_init__(self) -> None:
        super().__post_init__()
        active_rule(self.conflict)
        active_penalties(self.penalties)
        options(Lookahead, "lookahead", self.lookahead)
        options(Sharpness, "sharpness", self.sharpness)
        options(Saliency, "saliency", self.saliency)
        options(Protect, "protect", self.protect)
        if self.change_steps < 0:
            raise ValueError(f"change_steps={self.change_steps} is negative: give a number of steps, or 0 for never.")
        teacher_choice(self.teacher)
        if problem := value_problem(Annotated[float, Ge(0), Le(1)] | None, self.gamma):
            raise ValueError(f"gamma: expected {problem['expected']}, found {problem['found']}.")
        if problem := value_problem(Decay | None, self.ema):
            raise ValueError(f"ema: expected {problem['expected']}, found {problem['found']}.")
        if self.logging_nan_inf_filter or self.remove_unused_columns:
            raise ValueError(
                "`logging_nan_inf_filter` and `remove_unused_columns` must stay off in ClmulConfig: the first "
                "hides a collapse of the model, the second drops the roles' columns. Remove them."
            )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of mixed precision, if it is on."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None
