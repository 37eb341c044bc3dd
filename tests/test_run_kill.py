"""A run killed and continued ends like one that never was. The processes here are real, and SIGKILL is what kills them."""

import signal
from pathlib import Path
from typing import Any

import pytest
from small_run import (
    at_step,
    before,
    events,
    execute,
    in_checkpoint,
    in_ledger,
    in_process,
    outcome,
    write_recipe,
)

LEARN, UNLEARN = "00-learn-people", "01-unlearn-one"

# In the order in which a run comes by; at each it dies, and the next process goes on until the next point. In
# brackets: how often the request was begun or resumed by then, and from which checkpoint the next one goes on.
POINTS: list[tuple[str, Any, tuple]] = [
    ("in the first write", before, ("os", "replace", "recipe.yaml")),
    ("in the evaluation before learning", before, ("hf_clmul.families.loaded", "measure", "before learning")),
    ("after some steps", at_step, (LEARN, 3)),
    ("in a checkpoint", in_checkpoint, (LEARN, 4)),
    ("before a checkpoint counts", before, ("hf_clmul.run.log", "mark_complete", "checkpoint-6")),
    ("after the last step", before, ("hf_clmul.run.request", "save_state", "state")),
    ("in a line of the ledger", in_ledger, ("finished",)),
    ("in a state", before, ("hf_clmul.paths", "_sync_tree", ".state.")),
    ("before the evaluation of a request", before, ("hf_clmul.families.loaded", "measure", "after learning people")),
    ("in a result", before, ("os", "replace", f"{LEARN}/result.json")),
    ("between requests", before, ("hf_clmul.run.request", "_train", UNLEARN)),
    ("in the unlearn request", at_step, (UNLEARN, 3)),
    ("in a checkpoint of the unlearn request", in_checkpoint, (UNLEARN, 3)),
    ("after the unlearn request", before, ("hf_clmul.run.request", "save_state", "state")),
    ("in the export", before, ("hf_clmul.run.export", "_check", "model")),
    ("when the model is put in place", before, ("os", "rename", ".model.")),
    ("in the record", before, ("os", "replace", "results.json")),
    ("before the report", before, ("hf_clmul.run.runner", "close")),
]


@pytest.fixture(scope="module", params=["full", "lora"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def recipe(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp(kind), kind)


@pytest.fixture(scope="module")
def never_killed(recipe: Path) -> Path:
    execute(recipe, recipe.parent / "whole")
    return recipe.parent / "whole"


def test_killed_at_every_point_of_one_run(recipe, never_killed, tmp_path):
    out = tmp_path / "out"
    for name, point, args in POINTS:
        assert in_process(point, args, recipe, out) == -signal.SIGKILL, name
    assert in_process(None, (), recipe, out) == 0
    assert outcome(out) == outcome(never_killed)
    assert not list(out.rglob(".*")), "leftovers of killed writes"
    assert {path.name for path in out.iterdir()} == {path.name for path in never_killed.iterdir()}
    requests = [(event["name"], event["resumed"]) for event in events(out) if event["event"] == "request"]
    assert requests == [(LEARN, False), *[(LEARN, True)] * 6, (UNLEARN, False), *[(UNLEARN, True)] * 3]
