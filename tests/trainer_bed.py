"""What the trainer's tests share: tiny data by role, quiet settings, what a run left behind, and the same window worked
out by hand: every example by itself, in float64, with autograd. It uses no loss or batch of hf_clmul, and its rules only in
`ruled`, where they get exact gradients."""

import copy
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_clmul.data.roles import EpochSampler
from hf_clmul.data.sources import refusals
from hf_clmul.gradients.active import active_rule
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training.importance import measured
from hf_clmul.training_args import ClmulConfig

TOKENIZER = tiny_tokenizer(refusals(), vocab=600)  # a refusal is a few tokens
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
QUIET: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "seed": 2,
    "dataloader_pin_memory": False, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
    "learning_rate": 0.1,
}  # fmt: skip
# Accelerate collects garbage whenever training starts; what imports left behind need not be searched each time.
gc.collect()
gc.freeze()
TRAINER_TAKES = (
    "processing_class",
    "peft_config",
    "eval_dataset",
    "conflict_rule",
    "importance",
    "compute_metrics",
    "data_collator",
    "compute_loss_func",
    "model_init",
    "teacher_state",
)
Terms = Mapping[str, Mapping[str, Any]]


# ---- a run ---------------------------------------------------------------------------------------------------------


def examples(size: int, seed: int, vocab: int = 64) -> list[dict[str, list[int]]]:
    """Encoded examples of random tokens: prompts of 1-3 tokens, answers of very different lengths (1-12)."""
    draw = random.Random(seed)
    found = []
    for _ in range(size):
        prompt, answer = draw.randrange(1, 4), draw.choice([1, 2, 3, 12])
        ids = [draw.randrange(1, vocab) for _ in range(prompt + answer)]
        found.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return found


def two_roles(forget: int = 8, retain: int = 8) -> dict[str, list]:
    """Half of what is retained is also to be forgotten, so that the gradients conflict."""
    rows = examples(forget, 1)
    return {"forget": rows, "retain": [*rows[: retain // 2], *examples(retain - retain // 2, 2)]}


def llama(**options: Any) -> LlamaForCausalLM:
    """A tiny Llama with its matrices halved, which halves the rounding errors of its gradients in float32."""
    model = tiny_llama(**{"vocab": len(TOKENIZER), **options})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(0.5)
    return model


def adapted(seed: int = 0, **options: Any) -> PeftModel:
    """A tiny Llama with a LoRA that is no identity any more, as after learning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(llama(), LoraConfig(**{**LORA.to_dict(), **options}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def make(model: Any, roles: Any, folder: Path | str, callbacks: Sequence = (), **options: Any) -> ClmulTrainer:
    """A quiet trainer; what `ClmulTrainer` itself takes goes there, other options are training arguments."""
    own = {name: options.pop(name) for name in TRAINER_TAKES if name in options}
    args = ClmulConfig(output_dir=str(folder), **{**QUIET, "max_steps": 1, "per_device_train_batch_size": 8, **options})
    own = {"processing_class": TOKENIZER, **own}
    return ClmulTrainer(model, args, train_dataset=roles, callbacks=list(callbacks), **own)


class Ordered(Trainer):
    """The stock trainer, fed in our order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochSampler:
        return EpochSampler(len(self.train_dataset), self.train_dataset.seed)


def stock(
    model: nn.Module,
    dataset: Any,
    folder: Path,
    collate: Callable,
    kind: type[Trainer] = Trainer,
    callbacks: Sequence = (),
    **options: Any,
) -> Trainer:
    args = TrainingArguments(str(folder), remove_unused_columns=False, **{**QUIET, **options})
    return kind(model, args, collate, dataset, processing_class=TOKENIZER, callbacks=list(callbacks))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Norm of the difference over the norm of `other`, all tensors as one vector."""
    assert one.keys() == other.keys()
    off = torch.cat([(one[name].double() - other[name].double()).flatten() for name in one])
    return float(off.norm() / torch.cat([other[name].double().flatten() for name in one]).norm())


class Gradients(TrainerCallback):
    """Keeps what the optimizer is given at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class Nudge(TrainerCallback):
    """Moves the trained weights once the teacher is taken, so that student and teacher differ from the first step on."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        nudge(model)


class Stop(TrainerCallback):
    """As if killed once the checkpoint of a step is written: nothing is done any more, not even the end of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def assert_resume_is_exact(start: nn.Module, folder: Path, steps: Sequence[int], **options: Any) -> ClmulTrainer:
    """Kills a run after each of the steps and resumes it, in folder/STEP: it ends as the one that went through, which is
    returned."""
    options = {
        "save_strategy": "steps",
        "save_steps": 1,
        "optim": "adamw_torch",
        "per_device_train_batch_size": 2,
        **options,
    }
    through = make(copy.deepcopy(start), two_roles(7, 9), folder / "through", **options)
    through.train()
    for step in steps:
        with pytest.raises(KeyboardInterrupt):
            make(copy.deepcopy(start), two_roles(7, 9), folder / str(step), [Stop(step)], **options).train()
        again = resumed(start, folder / str(step) / f"checkpoint-{step}", **options)
        assert same(weights(again.model), weights(through.model)) and lines(again) == lines(through)
    return through


def resumed(start: nn.Module, checkpoint: Path, **options: Any) -> ClmulTrainer:
    """A run as in `assert_resume_is_exact`, from a checkpoint to its end."""
    options = {"optim": "adamw_torch", "per_device_train_batch_size": 2, **options}
    trainer = make(copy.deepcopy(start), two_roles(7, 9), checkpoint.parent, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


class Poison(TrainerCallback):
    """Puts a value into a trained weight before a step; keeps what the weights were then."""

    def __init__(self, value: float, step: int) -> None:
        self.value, self.step = value, step
        self.before: dict[str, Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = self.value
            self.before = trained(model)


def nudge(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                step = 0.05 * torch.randn(p.shape, generator=generator)
                split = isinstance(p, DTensor)  # the same on every rank, of which each keeps its part
                p.add_(distribute_tensor(step, p.device_mesh, p.placements, src_data_rank=None) if split else step)


def nudged(model: nn.Module) -> nn.Module:
    moved = copy.deepcopy(model)
    nudge(moved)
    return moved


def importances(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Something drawn for every weight whose importance is asked for, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(p.shape, generator=generator, dtype=torch.float64) for n, p in measured(model).items()}


def lines(trainer: ClmulTrainer, key: str = "loss") -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if key in line]


def windows(trainer: ClmulTrainer, size: int, epoch: int = 0) -> list[list[dict[str, Any]]]:
    """The examples {role: encoded} of each window of an epoch, `size` of each role in a window."""
    sampler = EpochSampler(len(trainer.train_dataset), trainer.train_dataset.seed)
    sampler.set_epoch(epoch)
    draws = [trainer.train_dataset[draw] for draw in sampler]
    return [draws[i:j] for i, j in pairwise([*range(0, len(draws), size), len(draws)])]


# ---- the same by hand ----------------------------------------------------------------------------------------------


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64 throughout: Llama's own norm would go back to float32."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon)
            norm.weight = module.weight
            found.set_submodule(name, norm)
    return found.double().eval()


def answer(model: nn.Module, example: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probabilities over the vocabulary [n, V] and of the right tokens [n], where one is supervised."""
    ids, labels = torch.tensor(example["input_ids"]), torch.tensor(example["labels"][1:])
    logps = model(ids[None]).logits[0, :-1].log_softmax(-1)[labels != -100]
    return logps, logps.gather(1, labels[labels != -100][:, None]).squeeze(1)


def by_hand(
    model: nn.Module, teacher: nn.Module | None, rows: Sequence[Mapping[str, Any]], terms: Terms
) -> dict[str, Tensor]:
    """{term: its mean over the rows}, from the formulas in the papers."""
    sums: dict[str, list[Tensor]] = {name: [] for name in terms}
    tokens = 0
    for row in rows:
        whole, right = answer(model, row)
        tokens += right.numel()
        for name, options in terms.items():
            if name in ("kl", "npo", "idk"):
                with torch.no_grad():
                    old, old_right = answer(teacher, row)
            if name in ("nll", "grad_ascent"):
                sums[name].append(-right.sum() if name == "nll" else right.sum())
            elif name == "kl":
                sums[name].append((old.exp() * (old - whole)).sum())
            elif name == "npo":
                beta = options.get("beta", 0.1)
                sums[name].append(-2 / beta * F.logsigmoid(-beta * (right.sum() - old_right.sum())))
            elif name == "idk":
                beta = options.get("beta", 0.1)
                refusal = answer(model, row["alternative"])[1].sum()
                with torch.no_grad():
                    old_refusal = answer(teacher, row["alternative"])[1].sum()
                gain = (refusal - old_refusal) - (right.sum() - old_right.sum())
                sums[name].append(-2 / beta * F.logsigmoid(beta * gain))
    by_sequence = ("npo", "idk")
    return {
        name: torch.stack(parts).sum() / (len(rows) if name in by_sequence else tokens) for name, parts in sums.items()
    }


def role_gradients(
    model: nn.Module, teacher: nn.Module | None, window: Sequence[Mapping[str, Any]], terms: Mapping[str, Terms]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """({role: {parameter: gradient}}, {"role/term": mean loss}) of a window, in float64."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients, losses = {}, {}
    for role, wanted in terms.items():
        means = by_hand(model, teacher, [row[role] for row in window], wanted)
        losses |= {f"{role}/{name}": float(value.detach()) for name, value in means.items()}
        total = sum(wanted[name].get("weight", 1.0) * value for name, value in means.items())
        found = torch.autograd.grad(total, list(parameters.values()))
        gradients[role] = dict(zip(parameters, found, strict=True))
    return gradients, losses


def inner(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in one)


def pcgrad(f: dict[str, Tensor], r: dict[str, Tensor]) -> tuple[float, float]:
    """Weights of two gradients: PCGrad's algorithm written out for two tasks."""
    b = min(inner(f, r), 0.0)
    return 1 - b / inner(f, f), 1 - b / inner(r, r)


def pcgrad_retain_first(f: dict[str, Tensor], r: dict[str, Tensor]) -> tuple[float, float]:
    return 1.0, 1 - min(inner(f, r), 0.0) / inner(r, r)


RULES: dict[str, Callable] = {
    "sum": lambda f, r: (1.0, 1.0), "pcgrad": pcgrad, "pcgrad_retain_first": pcgrad_retain_first,
}  # fmt: skip


def ruled(wanted: Any, of_role: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a rule of hf_clmul makes of exact gradients, in its first window."""
    gradients = [[t.clone() for t in gradient.values()] for gradient in of_role.values()]
    gram = [[inner(f, r) for r in of_role.values()] for f in of_role.values()]
    rule = active_rule(wanted)
    rule.start(len(gradients))
    if "gradients" in rule.needs:
        update = rule.combined(gradients, gram)
    else:
        chosen = rule.weights(gram)
        update = [sum(w * t for w, t in zip(chosen, parts, strict=True)) for parts in zip(*gradients, strict=True)]
    return dict(zip(next(iter(of_role.values())), update, strict=True))


def combined(gradients: Mapping[str, dict[str, Tensor]], rule: str) -> dict[str, Tensor]:
    f, r = gradients.values()
    w_f, w_r = RULES[rule](f, r)
    return {name: w_f * f[name] + w_r * r[name] for name in f}
