"""The attack by paraphrases: other prompts for a concept than those that it was unlearned by. It knows no models."""

from collections.abc import Mapping, Sequence

from hf_clmul.errors import RecipeError

GROUP = "paraphrased"
"""The group of a results record."""


def paraphrased(axis: str, texts: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Prompt rows for the suite `concepts` of {concept: its other prompts}; they fix the concept on this axis and no other.

    Raises RecipeError for a concept without prompts, with the same one twice, or with one text instead of a list.
    """
    for name, prompts in texts.items():
        if isinstance(prompts, str) or not prompts or len(set(prompts)) < len(prompts):
            raise RecipeError(f"paraphrases of {name}: give a list of different prompts, found {prompts!r}")
    return [
        {"id": f"{name}/paraphrase-{i}", "caption": text, axis: name}
        for name, prompts in texts.items()
        for i, text in enumerate(prompts)
    ]
