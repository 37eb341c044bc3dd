"""What is deleted exactly leaves files as if it had never been there: both histories are carried out and compared byte by byte."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import LORA, execute, save_base

SETTINGS = """\
adapter: {r: 2, alpha: 4, dropout: 0.2}
memory: {size: 6}
"""


def run(folder: Path, requests: str, name: str) -> Path:
    """Carries out a stream of three tasks of eight rows each."""
    start, end = LORA.index("requests:"), LORA.index("learning:")
    text = LORA[:start] + f"requests:\n{requests}" + LORA[end:]
    text = text.replace("persons: 2", "persons: 4").replace("adapter: {r: 2, alpha: 4, dropout: 0.2}\n", SETTINGS)
    text = text.replace("learning: {training", "learning: {memory: {nll: {}}, training", 1)
    (folder / f"{name}.yaml").write_text(text)
    return execute(folder / f"{name}.yaml", folder / name).parents[1]


def learn(task: str, person: str, more: str = "") -> str:
    return f"  - learn: {{task: {task}, data: people, where: {{person: {person}}}{more}}}\n"


def deployed(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for part in ("model", "adapters", "memory")
            for path in sorted((root / part).rglob("*")) if path.is_file() and path.name != "README.md"}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path


def states(root: Path) -> set[str]:
    return {path.parent.relative_to(root).as_posix() for path in root.glob("requests/**/state/training.json")}


def test_deleting_an_isolated_task_is_as_if_it_had_never_been_learned(folder):
    iso, gone = learn("secret", "P02", ", isolated: true"), "  - unlearn: {name: gone, from: secret}\n"
    part = "  - unlearn: {name: one, from: a, ids: [P01-1, P01-3]}\n"
    with_it = run(folder, learn("a", "P01") + iso + learn("b", "P03") + gone + part + learn("c", "P04"), "with")
    never = run(folder, learn("a", "P01") + learn("b", "P03") + part + learn("c", "P04"), "never")
    assert deployed(with_it) == deployed(never)
    assert {name.partition("/")[0] for name in deployed(never)} == {"model", "adapters", "memory"}
    assert not (with_it / "adapters" / "secret").exists() and "requests/01-learn-secret/state" not in states(with_it)
    stages = {stage["stage"]: stage for stage in json.loads((with_it / "results.json").read_text())["stages"]}
    assert (stages["03-unlearn-gone"]["how"], stages["03-unlearn-gone"]["steps"]) == ("exact by deletion", 0)


def test_a_stream_without_isolation_is_not(folder):
    """The comparison can fail: a shared task leaves traces in those learned after it."""
    gone = "  - unlearn: {name: gone, from: b}\n"
    approximate = run(folder, learn("a", "P01") + learn("b", "P02") + learn("c", "P03") + gone, "with")
    never = run(folder, learn("a", "P01") + learn("c", "P03"), "never")
    one, other = (deployed(root)["adapters/c/adapter_model.safetensors"] for root in (approximate, never))
    assert one != other


@pytest.mark.parametrize("cut", ["", ", shards: 2, slices: 2"], ids=["whole", "sharded"])
def test_partial_retraining_is_as_if_the_rows_had_never_been_learned(folder, cut):
    ids = "  - unlearn: {name: two, from: secret, ids: [P02-2, P02-5]}\n"
    with_them = run(folder, learn("a", "P01") + learn("secret", "P02", f", isolated: true{cut}") + ids, "with")
    without = learn("secret", "P02", f", isolated: true{cut}").replace(
        "person: P02", "id: [P02-1, P02-3, P02-4, P02-6, P02-7, P02-8]"
    )
    never = run(folder, learn("a", "P01") + without, "never")
    assert deployed(with_them) == deployed(never)
    stage = json.loads((with_them / "results.json").read_text())["stages"][-1]
    assert stage["how"] == "exact by partial retraining" and stage["steps"] > 0


def test_parts_that_never_met_the_rows_are_not_trained_again(folder):
    from hf_clmul.plan.steps import plan_steps
    from hf_clmul.recipe.load import load_recipe

    ids = "  - unlearn: {name: two, from: secret, ids: [P02-2]}\n"
    root = run(folder, learn("secret", "P02", ", isolated: true, shards: 2, slices: 2") + ids, "with")
    first, second = plan_steps(load_recipe(folder / "with.yaml"))
    held = next(job.part for job in first.jobs if any(row["id"] == "P02-2" for row in job.roles["learn"]))
    again = {job.part for job in second.jobs}
    assert 0 < len(again) < len(first.jobs) and all(part[: len("shard0")] == held[: len("shard0")] for part in again)
    kept = {name for name in states(root) if name.startswith("requests/00")}
    assert kept == {f"requests/00-learn-secret/{job.part}/state" for job in first.jobs if job.part not in again}


def test_the_base_never_changes(folder):
    root = run(folder, learn("a", "P01") + learn("b", "P02", ", isolated: true") + learn("c", "P03"), "out")
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    assert found["base_sha256_after"] == found["model"]["sha256"]
