"""What the tests of the trainer on pipelines share: tiny data by role, quiet settings, and the same window worked out by hand in
float64: every sample by itself, noise by diffusers' own schedulers, losses from the papers' formulas.

Run as a script it is one of two ranks, for test_trainer_diffusion.py.
"""

import copy
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import tiny_pipelines
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch import Tensor, nn
from trainer_bed import QUIET, Gradients, Nudge, lines, weights

from hf_clmul.families.diffusion import DiffusionFamily
from hf_clmul.families.options import Diffusion
from hf_clmul.models.diffusion.architectures import architecture_of
from hf_clmul.models.diffusion.encoding import image_size
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

FORGET, RETAIN = ("a red seven", "a blue seven"), ("a red one", "a green nine", "a blue eight")
TRAINER_TAKES = ("peft_config", "eval_dataset", "conflict_rule", "callbacks")
FAMILY_TAKES = ("prompt_drop", "min_snr_gamma")
ANCHOR = {"anchor": {"seven": "eight"}}
RANKS_CASE = {
    "forget": {"relabel": ANCHOR, "ascent": {}}, "retain": {"distill": {}, "denoising": {"weight": 0.5}},
    "conflict": "pcgrad", "learning_rate": 0.02, "max_steps": 3, "per_device_train_batch_size": 1,
}  # fmt: skip
RANKS_CASES: dict[str, dict[str, Any]] = {
    "whole": {}, "adapter": {"adapter": True}, "text encoder": {"trainable": "text_encoder"}, "average": {"ema": 0.5},
}  # fmt: skip


def rows(pipeline: Any, captions: Sequence[str], size: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """Random images of the size that the pipeline takes, with the captions in turn."""
    generator, shape = torch.Generator().manual_seed(seed), (3, *image_size(pipeline, architecture_of(pipeline)))
    return [
        {"image": torch.rand(shape, generator=generator) * 2 - 1, "caption": captions[i % len(captions)]}
        for i in range(size)
    ]


def two_roles(pipeline: Any, forget: int = 4, retain: int = 4, captions: Sequence[Sequence[str]] = (FORGET, RETAIN)):
    """{role: rows}."""
    return {
        "forget": rows(pipeline, captions[0], forget, seed=1),
        "retain": rows(pipeline, captions[1], retain, seed=2),
    }


def lora(pipeline: Any, **options: Any) -> LoraConfig:
    """Alpha differs from the rank."""
    targets = list(architecture_of(pipeline).adapter_targets)
    return LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": targets, **options})


def make(pipeline: Any, roles: Any, folder: Path | str, **options: Any) -> ClmulTrainer:
    """A quiet trainer; options are the family's, the trainer's or training arguments."""
    own = {name: options.pop(name) for name in TRAINER_TAKES if name in options}
    chosen = {name: options.pop(name) for name in FAMILY_TAKES if name in options}
    args = ClmulConfig(output_dir=str(folder), **{**QUIET, "max_steps": 1, "per_device_train_batch_size": 4, **options})
    if chosen:
        family = DiffusionFamily(pipeline, Diffusion(**chosen), args.trainable)
        return ClmulTrainer(family.trained, args, train_dataset=roles, family=family, **own)
    return ClmulTrainer(pipeline, args, train_dataset=roles, **own)


# ---- the same by hand ----------------------------------------------------------------------------------------------


class Draw:
    """One sample of a training set, noisy as diffusers' own training loops make it, in float64."""

    def __init__(self, pipeline: Any, example: Mapping[str, Any]) -> None:
        generator = torch.Generator().manual_seed(example["noise_seed"])
        u, self.coin = torch.rand(2, generator=generator)
        noise = torch.randn(example["mean"].shape, generator=generator)
        clean = example["mean"] + example["std"] * torch.randn(example["mean"].shape, generator=generator)
        noise, clean = noise.double()[None], clean.double()[None]
        if pipeline.scheduler.config.get("prediction_type") is None:  # flow matching of Stable Diffusion 3
            sigma = torch.sigmoid(torch.special.ndtri(u.double()))
            sigma = 3 * sigma / (1 + 2 * sigma)
            self.time = (1000 * sigma)[None]
            self.noisy, self.target, self.weight = (1 - sigma) * clean + sigma * noise, noise - clean, 1.0
            return
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.time = (u * 1000).long()[None]
        self.noisy, self.target = scheduler.add_noise(clean, noise, self.time), noise
        if scheduler.config.prediction_type == "v_prediction":
            self.target = scheduler.get_velocity(clean, noise, self.time)
        self.snr = compute_snr(scheduler, self.time).double()
        self.weight = 1.0

    def output(self, model: nn.Module, prompt: Mapping[str, Tensor]) -> Tensor:
        given = {name: value.double()[None] for name, value in prompt.items()}
        name = "hidden_states" if "pooled_projections" in given else "sample"
        return model(**{name: self.noisy}, timestep=self.time, return_dict=False, **given)[0]


def exact(trainer: ClmulTrainer) -> nn.Module:
    return copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model)).double().eval()


def prompt(trainer: ClmulTrainer, text: str) -> dict[str, Tensor]:
    return trainer.family.encoder.prompt(text)


def by_hand(
    trainer: ClmulTrainer, model: nn.Module, teacher: nn.Module, examples: Sequence[Any], terms: Mapping[str, Any]
) -> dict[str, Tensor]:
    """{term: its mean over the examples}, from the formulas in the papers."""
    sums: dict[str, list[Tensor]] = {name: [] for name in terms}
    for example in examples:
        draw = Draw(trainer.family.pipeline, example)
        said = draw.output(model, example["conditioning"])
        for name in terms:
            with torch.no_grad():
                if name in ("denoising", "ascent"):
                    target = draw.target
                elif name == "relabel":
                    target = draw.output(model, example["anchor"])
                elif name == "concept_ablation":
                    target = draw.output(teacher, example["anchor"])
                else:
                    target = draw.output(teacher, example["conditioning"])
                if name == "esd":
                    target = target - 2.0 * (target - draw.output(teacher, prompt(trainer, "")))
            loss = draw.weight * ((said - target) ** 2).mean()
            sums[name].append(-loss if name == "ascent" else loss)
    return {name: torch.stack(found).mean() for name, found in sums.items()}


def role_gradients(
    trainer: ClmulTrainer, model: nn.Module, teacher: nn.Module, window: Sequence[Any], terms: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """({role: {parameter: gradient}}, {"role/term": mean loss}) of a window."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients, losses = {}, {}
    for role, wanted in terms.items():
        means = by_hand(trainer, model, teacher, [row[role] for row in window], wanted)
        losses |= {f"{role}/{name}": float(value.detach()) for name, value in means.items()}
        total = sum((wanted[name] or {}).get("weight", 1.0) * value for name, value in means.items())
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        gradients[role] = {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }
    return gradients, losses


# ---- two ranks -----------------------------------------------------------------------------------------------------


def run(folder: Path, ranks: int, accumulate: int = 4, adapter: bool = False, **more: Any) -> dict[str, Any]:
    """Three windows of four pairs each, of two epochs; what the optimizer was given, and what came of it."""
    pipeline, saw = tiny_pipelines.stable_diffusion(), Gradients()
    options = {**RANKS_CASE, "gradient_accumulation_steps": accumulate // ranks, **more}
    if adapter:
        options["peft_config"] = lora(pipeline)
    trainer = make(
        pipeline, two_roles(pipeline, 8, 9), folder, callbacks=[Nudge(), saw], eval_dataset=rows(pipeline, RETAIN), **options
    )  # fmt: skip
    trainer.train()
    found = {"steps": saw.steps, "weights": weights(trainer.model), "lines": lines(trainer)}
    return {**found, "eval_loss": trainer.evaluate()["eval_loss"]}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    found = {name: run(folder / name, ranks=2, **more) for name, more in RANKS_CASES.items()}
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
