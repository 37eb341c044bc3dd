"""What one request hands to the next beside weights survives a kill, also over an isolated task between the two: the stream ends
as if nothing had happened."""

import json
from pathlib import Path

import pytest
from small_run import LORA, at_step, execute, in_process, outcome, save_base

from hf_clmul.models import stored
from hf_clmul.models.ema import FILE as EMA
from hf_clmul.run.carried import IMPORTANCE, TARGETS, TUNED

REQUESTS = """\
requests:
  - learn: {task: a, data: people, where: {person: P01}}
  - learn: {task: b, data: people, where: {person: P02}}
  - unlearn: {name: some, from: a, ids: [P01-1, P01-2]}
  - learn: {task: apart, data: people, where: {person: P04}, isolated: true}
  - learn: {task: c, data: people, where: {person: P03}}
"""
CASES = {
    "average": ("memory: {nll: {}, confident_mse: {weight: 0.1}}", "teacher: {ema: {probability: 0.6}}", EMA),
    "targets": ("memory: {der: {}, nll: {}}", "", TARGETS),
    "importance": ("penalties: {ewc: {weight: 1.0, examples: 4}}", "", IMPORTANCE),
    "merged": ("memory: {nll: {}}", "", TUNED),
}


def write(folder: Path, name: str) -> Path:
    terms, more, _ = CASES[name]
    start, end = LORA.index("requests:"), LORA.index("learning:")
    text = (LORA[:start] + REQUESTS + LORA[end:]).replace("persons: 2", "persons: 4")
    text = (
        text.replace("learning: {training", f"learning: {{{terms}, training", 1)
        + f"memory: {{size: 4, top_k: 3}}\n{more}\n"
    )
    if name == "merged":
        text = text.replace("dropout: 0.2", "dropout: 0.2, strategy: slao")
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def kept(root: Path) -> dict[str, bytes]:
    """What is carried on, wherever it lies at the end."""
    names = {EMA, IMPORTANCE, TUNED, TARGETS, "rows.jsonl"}
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.name in names}


@pytest.mark.parametrize("name", CASES)
def test_a_stream_killed_in_its_last_request_ends_as_one_that_was_not(name, tmp_path):
    save_base(tmp_path / "base")
    recipe = write(tmp_path, name)
    whole, killed = (tmp_path / folder for folder in ("whole", "killed"))
    execute(recipe, whole)
    assert in_process(at_step, ("04-learn-c", 3), recipe, killed) != 0
    execute(recipe, killed)
    assert outcome(killed) == outcome(whole)
    assert kept(killed) == kept(whole)
    places = [path for path in kept(whole) if path.endswith(CASES[name][2])]
    assert places == [f"memory/{TARGETS}" if name == "targets" else f"requests/04-learn-c/state/{CASES[name][2]}"]


def test_the_memory_holds_targets_of_its_rows_and_no_others(tmp_path):
    save_base(tmp_path / "base")
    root = execute(write(tmp_path, "targets"), tmp_path / "out").parents[1]
    found = stored.load(root / "memory" / TARGETS)
    rows = [json.loads(line) for line in (root / "memory/rows.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(f"{row['task']}/{row['id']}" for row in rows) and len(rows) == 4
    assert not {"a/P01-1", "a/P01-2"} & set(found)
    assert {targets.ids.shape[1] for targets in found.values()} == {3}
