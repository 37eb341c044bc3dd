"""What a run would cost, worked out without training: steps, tokens, trainable parameters, memory. Weights are not loaded;
the architecture is built on the meta device."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_clmul.data.sources import encode_dataset
from hf_clmul.errors import RecipeError
from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_name
from hf_clmul.models import adapters
from hf_clmul.models.loading import load_architecture, make
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.models.trainable import matching
from hf_clmul.objectives import TERMS
from hf_clmul.objectives.active import active_terms
from hf_clmul.plan import Step, draws, optimizer_steps
from hf_clmul.preparation import is_random
from hf_clmul.recipe_schema import Learn, Recipe
from hf_clmul.training_args import ClmulConfig


def estimate(recipe: Recipe, steps: Sequence[Step], texts: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a request, for one process. `texts` train the tokenizer of a model made from scratch.

    `tokens` are those of all roles' examples, each as often as it is seen (a last partial pass counts at mean length), also
    in training that a term asks for before its own; `memory_bytes` is weights, gradients, AdamW state, teachers and
    snapshots, before activations. Raises RecipeError for a model or an example that cannot be used.
    """
    if recipe.model.scratch is not None:
        model, tokenizer = make(recipe.model.scratch, texts, 0)
    else:
        model, tokenizer = load_architecture(recipe.model)
    if recipe.adapter is not None:
        task = next(request.task for request in recipe.requests if isinstance(request, Learn))
        model = adapters.attach_task(model, recipe.adapter, task, 0)  # `trainable` may name it
    entries = []
    for step in steps:
        training = recipe.request_training(step.index)
        length = training.get("max_length", ClmulConfig.max_length)
        means = [
            _mean([len(row["input_ids"]) for row in encode_dataset(rows, tokenizer, length, f"{step.name}, {role}")])
            for role, rows in step.roles.items()
        ]
        terms = recipe.unlearning.forget if step.kind == "unlearn" else {}
        edited = any(TERMS[name].edit for name in terms)
        tokens = 0 if edited else sum(means) * draws(step, training)
        if reinforced := _reinforced(terms):
            tokens += reinforced.epochs * len(step.roles["forget"]) * means[list(step.roles).index("forget")]
        entries.append({
            "request": step.name, "examples": {role: len(rows) for role, rows in step.roles.items()},
            "steps": 0 if edited else optimizer_steps(step, training), "tokens": round(tokens),
            "how": step.how, "why": _why(recipe, step), **_size(recipe, step, model),
        })  # fmt: skip
    return entries


def _size(recipe: Recipe, step: Step, model: Any) -> dict[str, int]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    section = recipe.learning if step.kind == "learn" else recipe.unlearning
    trained = [p for p in model.parameters() if p.requires_grad]
    if section.trainable is not None:
        try:
            trained = matching(model, section.trainable)
        except ValueError as error:
            raise RecipeError(f"request {step.name}: {error}") from error
    count, once = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    kept = _teacher_is_a_copy(recipe, step)
    kept += step.kind == "unlearn" and _reinforced(recipe.unlearning.forget) is not None
    choosing, salient = _of_saliency(recipe, step, count, once)
    unlearned = active_terms("forget", recipe.unlearning.forget) if step.kind == "unlearn" else []
    models = 1 + any(is_random(active) for active in unlearned)
    return {
        "trainable_parameters": count,
        "memory_bytes": models * weights + kept * once + max(choosing, _copies(recipe, step) * once + salient),
    }


def _copies(recipe: Recipe, step: Step) -> int:
    """Of what trains, in a step: gradient, two AdamW moments, a snapshot for each further role, the state of the
    conflict rule, what a look ahead puts back, and what measuring the change keeps."""
    rule = CONFLICT_RULES[rule_name(recipe.unlearning.conflict)]
    roles, ahead = len(step.roles), recipe.unlearning.lookahead is not None
    compares = roles > 1 and (ahead or bool(rule.needs & {"gram", "gradients"}))
    measures = recipe.request_training(step.index).get("change_steps", 0) > 0
    snapshots = roles - 1 if compares or measures else 0
    if compares:
        snapshots += ("state" in rule.needs) + ahead
    # All roles' gradients and the weights; then their change, which takes the place of a snapshot where there is one.
    return 3 + snapshots + (roles + 1 + (roles == 1) if measures else 0)


def _of_saliency(recipe: Recipe, step: Step, count: int, once: int) -> tuple[int, int]:
    """(bytes while weights are chosen, before any step; bytes in every step). A mask has a byte for each weight."""
    wanted = recipe.unlearning.saliency
    if step.kind == "learn" or wanted is None:
        return 0, 0
    masks = (wanted.train is not None) * count
    marked = (wanted.trim is not None) * count
    held = 0 if wanted.train is None else round((1 - wanted.train) * once)
    # The forget gradient, its scores, and these once more in float32, in a row.
    return 2 * once + 4 * count + masks + marked, masks + held


def _teacher_is_a_copy(recipe: Recipe, step: Step) -> bool:
    """A new adapter is its own teacher when switched off; whatever else trains is copied. A moving average always is one."""
    if teacher_choice(recipe.teacher)[1] is not None:
        return True
    wanted = {"learn": recipe.learning.learn, "forget": recipe.unlearning.forget, "retain": recipe.unlearning.retain}
    wants = any("teacher" in active.term.needs for role in step.roles for active in active_terms(role, wanted[role]))
    return wants and not (step.kind == "learn" and recipe.adapter is not None)


def _reinforced(terms: Mapping[str, Any]) -> Any:
    """The settings of the training on the forget data that a term asks for before its own, or None."""
    return next((t.preparation for t in active_terms("forget", terms) if "reinforced" in t.term.needs), None)


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers)


def _why(recipe: Recipe, step: Step) -> str:
    if step.kind == "learn":
        return "new adapter" if recipe.adapter is not None else "all weights are trained"
    if not recipe.unlearning.retain:
        return "no retain term: nothing holds the rest in place"
    if "retain" not in step.roles:
        return "nothing else was learned: there is no retain data"
    part = (
        "the task's adapter is trained further in place"
        if recipe.adapter is not None
        else "all weights are trained further"
    )
    return f"{part}; its weights have seen the forget data, so erasure is measured and not proved"
