"""What a run would cost, worked out without training: steps, data seen, trainable parameters, memory. Weights are not loaded; of
the model it knows a sketch."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_clmul.errors import RecipeError
from hf_clmul.families.sketches import Sketch, sketch_of
from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_name
from hf_clmul.models import adapters
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.models.trainable import matching
from hf_clmul.objectives import TERMS
from hf_clmul.objectives.active import active_terms
from hf_clmul.objectives.penalties import PENALTIES
from hf_clmul.plan.exactness import exact_instead, why
from hf_clmul.plan.job_steps import draws, optimizer_steps
from hf_clmul.plan.steps import Job, Step
from hf_clmul.recipe.schema import Recipe
from hf_clmul.recipe.streams import BASE
from hf_clmul.report.claims import APPROXIMATE
from hf_clmul.training.importance import measured
from hf_clmul.training.preparation import incompetent_weights
from hf_clmul.training_args import ClmulConfig


def estimate(recipe: Recipe, steps: Sequence[Step], texts: Sequence[str]) -> list[dict[str, Any]]:
    """One entry a request, for one process. `texts` train the tokenizer of a model made from scratch.

    `tokens` (of a diffusion model `samples`: `unit` says which) are those of all roles' examples, each as often as it is seen
    (a last partial pass counts at mean length), also in training that a term asks for before its own; `memory_bytes` is weights
    (of a whole pipeline), gradients, AdamW state, teachers and snapshots, before activations. Raises RecipeError for a model or
    an example that cannot be used.
    """
    sketch = sketch_of(recipe, texts)
    model = sketch.model
    lengths: dict[tuple[int, int | None], int] = {}
    entries = []
    for step in steps:
        jobs = [_job(recipe, step, job, sketch, lengths) for job in step.jobs]
        model = _stand_in(recipe, step, model, sketch)
        shown = {} if not step.jobs else _size(recipe, step, step.jobs[0], model, sketch)
        entries.append({
            "request": step.name, "examples": {role: len(rows) for role, rows in step.roles.items()},
            "steps": sum(steps for steps, _ in jobs), "unit": sketch.unit, sketch.unit: round(sum(seen for _, seen in jobs)),
            "how": step.how, "why": why(recipe, steps, step), "parts": [job.part for job in step.jobs if job.part],
            "remembered": sum(map(len, step.memory.values())), "instead": _instead(recipe, steps, step),
            **{"trainable_parameters": 0, "memory_bytes": None, **shown},
        })  # fmt: skip
    return entries


def _stand_in(recipe: Recipe, step: Step, model: Any, sketch: Sketch) -> Any:
    """What a request trains. Only a pattern may name the adapter: all else is worked out on one for all."""
    if recipe.adapter is None or not step.jobs:
        return model
    section = recipe.learning if "learn" in step.jobs[0].roles else recipe.unlearning
    return adapters.stand_in(
        model, sketch.adapter(recipe.adapter), "any" if section.trainable is None else step.jobs[0].adapter
    )


def _instead(recipe: Recipe, steps: Sequence[Step], step: Step) -> dict[str, Any] | None:
    """What an approximate request would have to train again to be exact, {"trainings", "steps"}; None for any other."""
    if step.how != APPROXIMATE or step.request.from_task == BASE:
        return None
    trainings, count = exact_instead(recipe, steps, step)
    return {"trainings": trainings, "steps": count}


def _job(
    recipe: Recipe, step: Step, job: Job, sketch: Sketch, lengths: dict[tuple[int, int | None], int]
) -> tuple[int, float]:
    """Optimizer steps of one training, and tokens or samples that it sees."""
    training = recipe.request_training(job.settings_of)
    most = training.get("max_length", ClmulConfig.max_length)
    means = {role: _mean_size(rows, sketch, most, lengths, f"{step.name}, {role}") for role, rows in job.roles.items()}
    terms = recipe.unlearning.forget if "forget" in job.roles else {}
    edited = any(TERMS[name].edit for name in terms)
    seen = 0 if edited else sum(means.values()) * draws(job, training)
    if reinforced := _reinforced(terms, recipe.family):
        seen += reinforced.epochs * len(job.roles["forget"]) * means["forget"]
    return 0 if edited else optimizer_steps(job, training), seen


def _mean_size(
    rows: Sequence[Any], sketch: Sketch, most: int | None, lengths: dict[tuple[int, int | None], int], what: str
) -> float:
    """Of an example, such as its number of tokens; a row that many requests meet is encoded once."""
    new = [row for row in rows if (id(row), most) not in lengths]
    lengths |= {(id(row), most): size for row, size in zip(new, sketch.sizes(new, most, what), strict=True)}
    return sum(lengths[id(row), most] for row in rows) / len(rows)


def _size(recipe: Recipe, step: Step, job: Job, model: Any, sketch: Sketch) -> dict[str, int]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    section = recipe.learning if "learn" in job.roles else recipe.unlearning
    trained = [p for p in model.parameters() if p.requires_grad]
    if section.trainable is not None:
        try:
            trained = matching(model, sketch.pattern(section.trainable))
        except (RecipeError, ValueError) as error:
            raise RecipeError(f"request {step.name}: {error}") from error
    count, once = sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
    kept = _teacher_is_a_copy(recipe, job)
    kept += "forget" in job.roles and _reinforced(recipe.unlearning.forget, recipe.family) is not None
    choosing, salient = _of_saliency(recipe, job, count, once)
    importance = _of_importance(recipe, job, model)
    unlearned = active_terms("forget", recipe.unlearning.forget, recipe.family) if "forget" in job.roles else []
    averages = recipe.diffusion.ema is not None and not any(active.term.edit for active in unlearned)
    models = 1 + any(incompetent_weights(active) == "random" for active in unlearned)
    return {
        "trainable_parameters": count,
        "memory_bytes": sketch.beside
        + models * weights
        + kept * once
        + importance
        + averages * 4 * count  # in float32
        + max(choosing, _copies(recipe, job) * once + salient),
    }


def _copies(recipe: Recipe, job: Job) -> int:
    """Of what trains, in a step: gradient, two AdamW moments, a snapshot for each further role, the state of the
    conflict rule, what a displacement puts back, and what measuring the change keeps."""
    learns = "learn" in job.roles
    rule = CONFLICT_RULES[rule_name((recipe.learning if learns else recipe.unlearning).conflict)]
    roles, ahead = len(job.roles), not learns and recipe.unlearning.lookahead is not None
    sharp = not learns and recipe.unlearning.sharpness is not None
    compares = roles > 1 and (ahead or sharp or bool(rule.needs & {"gram", "gradients"}))
    measures = recipe.request_training(job.settings_of).get("change_steps", 0) > 0
    snapshots = roles - 1 if compares or measures else 0
    if compares:
        snapshots += ("state" in rule.needs) + ahead
    if sharp:  # beside the forget gradient that is worked out, the first of all: the weights to put back
        snapshots = max(snapshots, 1)
    # All roles' gradients and the weights; then their change, which takes the place of a snapshot where there is one.
    return 3 + snapshots + (roles + 1 + (roles == 1) if measures else 0)


def _of_saliency(recipe: Recipe, job: Job, count: int, once: int) -> tuple[int, int]:
    """(bytes while weights are chosen, before any step; bytes in every step). A mask has a byte for each weight."""
    wanted = recipe.unlearning.saliency
    if "learn" in job.roles or wanted is None:
        return 0, 0
    masks = (wanted.train is not None) * count
    marked = (wanted.trim is not None) * count
    held = 0 if wanted.train is None else round((1 - wanted.train) * once)
    # The forget gradient, its scores, and these once more in float32, in a row.
    return 2 * once + 4 * count + masks + marked, masks + held


def _of_importance(recipe: Recipe, job: Job, model: Any) -> int:
    """Bytes of what older tasks need of each weight, in float32, where a penalty asks for it."""
    learning = recipe.learning.penalties if "learn" in job.roles else {}
    asks = any("importance" in PENALTIES[name].needs for name in (*learning, *recipe.unlearning.penalties))
    return 4 * sum(p.numel() for p in measured(model).values()) if asks else 0


def _teacher_is_a_copy(recipe: Recipe, job: Job) -> bool:
    """A new adapter is its own teacher when switched off; whatever else trains is copied. A moving average always is one."""
    if teacher_choice(recipe.teacher)[1] is not None:
        return True
    learns = "learn" in job.roles
    wanted = {
        "learn": recipe.learning.learn, "forget": recipe.unlearning.forget, "retain": recipe.unlearning.retain,
        "memory": recipe.learning.memory if learns else recipe.unlearning.memory,
    }  # fmt: skip
    wants = any(
        "teacher" in active.term.needs
        for role in job.roles
        for active in active_terms(role, wanted[role], recipe.family)
    )
    return wants and not (learns and recipe.adapter is not None)


def _reinforced(terms: Mapping[str, Any], family: str) -> Any:
    """The settings of the training on the forget data that a term asks for before its own, or None."""
    return next((t.preparation for t in active_terms("forget", terms, family) if "reinforced" in t.term.needs), None)
