"""A small recipe that is right, and helpers to spoil it. Its line numbers stand in the tests."""

from pathlib import Path

import pytest

from hf_clmul.errors import RecipeError
from hf_clmul.recipe.load import load_recipe

RECIPE = """\
recipe_version: 1
name: small
model: {path: some/model}
data:
  people: {path: builtin:invented_people, persons: 4}
  notes: {path: notes.jsonl}
requests:
  - learn: {task: people, data: people}
  - learn: {task: notes, data: notes}
  - unlearn: {name: two, from: people, where: {person: [P01, P02]}}
learning:
  training: {learning_rate: 2e-3, num_train_epochs: 3}
unlearning:
  forget: {npo: {beta: 0.2}}
  training: {max_steps: 5, learning_rate: 1e-5}
training: {logging_steps: 1, learning_rate: 1}
"""


def write(text: str, name: str = "r.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def changed(old: str, new: str) -> str:
    assert RECIPE.count(old) == 1, f"{old!r} must stand once in the test's recipe"
    return RECIPE.replace(old, new)


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the message, less the header, whose count is checked here."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(text), overrides)
    header, *lines = str(caught.value).split("\n")
    count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
    assert header == f"r.yaml has {count}:"
    return lines
