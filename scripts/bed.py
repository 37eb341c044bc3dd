"""A test bed for comparisons: a model that has learned a recipe's data once, and every way to unlearn from there, in one
process. Shared by the bench_* scripts; it holds no library logic.

A bed is made from a recipe with a learn and an unlearn request (`mini/_base`, `quickstart`); its reference from the
recipe that trains without the forget data (`mini/retrained`, `quickstart-retrained`).
"""

import tempfile
import time
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback

from hf_clmul import load_recipe
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import encode_dataset
from hf_clmul.evaluation.metrics import aggregate, forget_quality, model_utility
from hf_clmul.evaluation.suites import Measuring, fixed_sample, measure
from hf_clmul.models import adapters
from hf_clmul.models.loading import load
from hf_clmul.plan.columns import groups, texts
from hf_clmul.plan.steps import plan_steps
from hf_clmul.run.comparison import UTILITY, truth_ratios
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

COMPARED = ("answer_probability", "rouge_l_recall", "truth_ratio", "extraction_strength", "fluency")
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "log_level": "error", "use_cpu": True,
         "logging_steps": 1, "dataloader_pin_memory": False}  # fmt: skip
Groups = dict[str, dict[str, Any]]


class Bed:
    """A recipe's model after its learn request. `unlearn` starts from there each time."""

    def __init__(self, name: str, seed: int, *overrides: str) -> None:
        self.recipe = load_recipe(name, [f"seed={seed}", *overrides])
        self.steps = plan_steps(self.recipe)
        whole = groups(self.recipe, self.steps)
        size = self.recipe.evaluation.max_examples
        self.groups = {
            group: rows if group == "forget" else fixed_sample(rows, size, derived_seed(group))
            for group, rows in whole.items()
            if group != "held_out"
        }
        loaded = load(self.recipe.model, texts(whole), derived_seed(seed, "model"))
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        chosen = self.recipe.adapter
        if chosen is not None:
            config = adapters.lora_config(
                self.model, chosen.r, chosen.alpha, chosen.dropout, chosen.target_modules, chosen.layers
            )
            self.model = adapters.attach(self.model, config, "bed", derived_seed(seed, "adapter"))
        self._train(0, learn=self.recipe.learning.learn)
        self._learned = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def restore(self) -> None:
        """The model is again as after learning."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self._learned:
                    p.copy_(self._learned[name])

    def unlearn(self, **options: Any) -> tuple[list[dict[str, float]], float]:
        """Unlearns from the learned model with arguments of ClmulConfig; returns the log and the CPU seconds of training."""
        self.restore()
        return self._train(1, **options)

    def measured(self) -> Groups:
        """Rows and metrics of each group, of the model as it is."""
        evaluation = self.recipe.evaluation
        bf16 = self.recipe.request_training(0).get("bf16", False)
        how = Measuring(evaluation.batch_size, evaluation.max_new_tokens, bf16)
        rows = measure(self.model, self.tokenizer, self.groups, how)
        return {group: {"rows": found, **aggregate(found, group)} for group, found in rows.items()}

    def _train(self, index: int, **options: Any) -> tuple[list[dict[str, float]], float]:
        step, training = self.steps[index], self.recipe.request_training(index)
        roles = {role: rows for role, rows in step.roles.items() if options.get(role, {}) != {} or role == "learn"}
        data = {role: encode_dataset(rows, self.tokenizer, 1024, role) for role, rows in roles.items()}
        given = {**training, "seed": derived_seed(self.recipe.seed, step.name), **QUIET, **options}
        given = {name: value for name, value in given.items() if name not in ("forget", "retain") or name in roles}
        with tempfile.TemporaryDirectory() as folder:
            trainer = ClmulTrainer(
                self.model, ClmulConfig(output_dir=folder, **given), train_dataset=data, processing_class=self.tokenizer
            )
            for callback in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(callback)
            began = time.process_time()
            trainer.train()
            seconds = time.process_time() - began
        self.model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return [line for line in trainer.state.log_history if "loss" in line], seconds


def gap(found: Groups, references: list[Groups]) -> float:
    """Mean distance to the retrained models: over the forget and retain groups and COMPARED, |metric - mean of references|."""
    parts = [
        abs(found[group][name] - sum(reference[group][name] for reference in references) / len(references))
        for group in ("forget", "retain")
        for name in COMPARED
    ]
    return sum(parts) / len(parts)


def figures(found: Groups, references: list[Groups]) -> dict[str, float | None]:
    """One line of a comparison."""
    forget, retain = found["forget"], found["retain"]
    return {
        "gap": gap(found, references),
        "forget_quality": _forget_quality(forget, references[0]["forget"]),
        "forget_probability": forget["answer_probability"],
        "forget_rouge": forget["rouge_l_recall"],
        "forget_truth_ratio": forget["truth_ratio"],
        "forget_extraction": forget["extraction_strength"],
        "forget_fluency": forget["fluency"],
        "retain_probability": retain["answer_probability"],
        "retain_rouge": retain["rouge_l_recall"],
        "utility": model_utility(retain[name] for name in UTILITY),
    }


def _forget_quality(found: dict[str, Any], reference: dict[str, Any]) -> float | None:
    """None against a reference of which only figures are known."""
    if "rows" not in reference:
        return None
    return forget_quality(truth_ratios(found["rows"]), truth_ratios(reference["rows"]))
