"""Why a deletion is exact or not: what descends from the examples of an unlearn request, and what making their erasure exact
would take. Knows the plan; nothing of models or files."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hf_clmul.data.shards import cost
from hf_clmul.data.sources import content
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.objectives import TERMS
from hf_clmul.plan.job_steps import optimizer_steps
from hf_clmul.plan.lineage import Lineage, Node
from hf_clmul.plan.steps import Job, Step
from hf_clmul.recipe.schema import Learn, Recipe
from hf_clmul.recipe.streams import BASE
from hf_clmul.report.claims import EXACT_BY_DELETION, EXACT_BY_RETRAINING, FILTER

ERASED = "the examples"
WHOLE_MODEL = "the model"


@dataclass(frozen=True)
class Closure:
    """What descends from a set of examples: artefacts by name, parents first, and the trainings that made them."""

    artefacts: list[str]
    trainings: list[tuple[Step, Job]]


def closure(recipe: Recipe, steps: Sequence[Step], texts: Iterable[str]) -> Closure:
    """What descends from examples, given by content, once `steps` are carried out: data, memory, teachers, adapters, caches
    and exports, through every training that has met the examples, or stood on, or begun with, what had."""
    gone = set(texts)
    nodes, made = [Node(ERASED, "data")], {}
    newest: dict[str, str] = {}  # of each adapter, or of the model
    teacher: list[str] = []  # the moving average, which goes from request to request
    averages = teacher_choice(recipe.teacher)[1] is not None
    for step in steps:
        for removed in step.removed:
            newest.pop(removed, None)
        for job in step.jobs:
            own = job.adapter or WHOLE_MODEL
            name = _version(own, step, job)
            below = [newest[each] for each in job.active if each in newest and (each != own or not job.fresh)]
            before = below if job.active else [newest[own]] if own in newest else []
            met = [ERASED] if any(content(row) in gone for rows in job.roles.values() for row in rows) else []
            shared = teacher if own in step.stack or job.adapter is None else []
            nodes.append(Node(name, "adapter", (*met, *before, *shared)))
            made[name] = (step, job)
            newest[own] = name
            if averages and shared is teacher:
                nodes.append(Node(f"moving average after {step.name}", "teacher", (*teacher, name)))
                teacher = [nodes[-1].name]
            if _writes_alternatives(recipe, job):
                nodes.append(Node(f"alternatives written for {step.name}", "cache", (*met, *before)))
        kept = [ERASED] if any(content(row) in gone for rows in step.memory.values() for row in rows) else []
        nodes.append(Node(f"memory after {step.name}", "memory", tuple(kept)))
    nodes += _exports(recipe, steps, newest)
    found = [node.name for node in Lineage(nodes).closure([ERASED])]
    return Closure(found, [made[name] for name in found if name in made])


def exact_instead(recipe: Recipe, steps: Sequence[Step], step: Step) -> tuple[list[str], int]:
    """What would have to be trained again without the examples for an approximate request to be exact: the trainings that
    descend from them, and their optimizer steps. What is lost by it is not counted."""
    before = [each for each in steps if each.index < step.index]
    found = closure(recipe, before, (content(row) for row in step.roles["forget"])).trainings
    total = sum(optimizer_steps(job, recipe.request_training(job.settings_of)) for _, job in found)
    return [_version(job.adapter or WHOLE_MODEL, each, job) for each, job in found], total


def why(recipe: Recipe, steps: Sequence[Step], step: Step) -> str:
    """One sentence on what a request does to the model and, of an unlearn request, why it is exact or is not."""
    if isinstance(step.request, Learn):
        return _why_learn(recipe, steps, step)
    if step.how == EXACT_BY_DELETION:
        return (
            f"{step.request.from_task} is isolated: what learned these rows is deleted, and nothing else has met them"
        )
    if step.how == EXACT_BY_RETRAINING:
        return _why_retraining(recipe, step)
    if step.how == FILTER:
        return "an adapter hides what the base still knows; whoever switches it off has it back"
    if all(job.fresh for job in step.jobs):  # of an isolated task, whose rows a shared one has learned too
        return (
            f"{step.request.from_task}'s own adapter goes, or is trained again without these rows, but other weights have met "
            "them too, so erasure is measured and not proved"
        )
    if not recipe.unlearning.retain and "memory" not in step.roles:
        return "no retain term: nothing holds the rest in place"
    if not {"retain", "memory"} & set(step.roles):
        return "nothing else was learned: there is no retain data"
    part = "all weights are trained further"
    if step.request.from_task == BASE and recipe.adapter is not None:
        part = "a new adapter is trained, and merged when exported"
    elif recipe.adapter is not None:
        part = "the task's adapter is trained further in place"
    return f"{part}; its weights have seen the forget data, so erasure is measured and not proved"


def _why_learn(recipe: Recipe, steps: Sequence[Step], step: Step) -> str:
    if recipe.adapter is None:
        return "all weights are trained"
    request, below = step.request, len(step.jobs[0].active) - 1
    if request.isolated and len(step.jobs) > 1:
        part = cost(request.shards, request.slices).retrained
        return (
            f"isolated, {len(step.jobs)} adapters ({request.shards} shards of {request.slices} slices): to delete one row "
            f"later trains {part:.0%} of it again, on average"
        )
    if request.isolated:
        return "isolated: a new adapter that meets no other task, so that to delete it is exact"
    if recipe.adapter.strategy != "stacked":
        first = all(not isinstance(each.request, Learn) or each.request.isolated for each in steps[: step.index])
        return "new adapter, which all tasks share" if first else "the adapter that all tasks share is trained further"
    if "#" in step.jobs[0].label:
        return "the task's adapter is trained further in place"
    return "new adapter" if below < 1 else f"new adapter on {below} frozen"


def _why_retraining(recipe: Recipe, step: Step) -> str:
    jobs, all_parts = step.jobs, len(step.own.get(step.request.from_task, ()))
    parts = ", ".join(job.part or job.adapter for job in jobs)
    return (
        f"{step.request.from_task} is isolated: {len(jobs)} of its {all_parts} parts met these rows or an adapter that did, and are "
        f"trained again without them ({parts})"
    )


def _version(adapter: str, step: Step, job: Job) -> str:
    return f"{adapter} after {step.name}" + (f"/{job.part}" if job.part else "")


def _exports(recipe: Recipe, steps: Sequence[Step], newest: dict[str, str]) -> list[Node]:
    if not steps:
        return []
    last, each = steps[-1], steps[-1].each
    nodes = [
        Node(f"adapters/{task}", "export", tuple(newest[part] for part in parts if part in newest))
        for task, parts in each.items()
    ]
    chosen = [name for name in recipe.export.tasks or last.stack or each if name in each]
    main = [part for name in chosen for part in each[name]] or [WHOLE_MODEL]
    return [*nodes, Node("model/", "merge", tuple(newest[part] for part in main if part in newest))]


def _writes_alternatives(recipe: Recipe, job: Job) -> bool:
    return "forget" in job.roles and any("generated" in TERMS[name].needs for name in recipe.unlearning.forget)
