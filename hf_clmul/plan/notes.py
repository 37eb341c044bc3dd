"""What a plan says of choices that the recipe leaves open: near neighbours, and what is retained. Knows recipes and their rows;
nothing of models."""

from collections.abc import Sequence

from hf_clmul.evaluation.images.neighbours import COUNT, candidates
from hf_clmul.plan.columns import Evaluated
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Recipe

_SHOWN = 12


def notes(recipe: Recipe, step: Step, chosen: Evaluated) -> list[str]:
    """Sentences on a request, for a reader of the plan."""
    found = [step.retains] if step.retains else []
    images = recipe.evaluation.images
    chooses = recipe.family == "diffusion" and images.classifier is not None and images.axis is not None
    if step.kind == "unlearn" and chooses and images.near is None:
        rows = [chosen.rows[text] for text in chosen.groups.get("forget", ())]
        gone, others = candidates(list(chosen.rows.values()), rows, images.axis)
        if gone and others:
            found.append(
                f"near neighbours: up to {COUNT} of {_listed(others)}, whose text is most like that of {_listed(gone)} to the "
                "model; a run chooses them when it has loaded it"
            )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
