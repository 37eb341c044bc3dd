"""The measuring of a stage, where several processes do it at once."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_clmul.errors import RunError
from hf_clmul.plan.columns import Evaluated
from hf_clmul.run.stages import _kept, measure_stage


def test_every_rank_has_read_what_there_is_before_the_main_one_writes(tmp_path: Path):
    """A stage that measures nothing anew, such as a deletion, is written within milliseconds: a rank that comes later would take
    it for a finished one and leave before the barrier at the end, where the main one waits for it."""
    seen: list[str] = []

    def result(step: None) -> None:
        seen.append("read")

    def wait() -> None:
        seen.append("wait, written" if (tmp_path / "result.json").exists() else "wait")

    run = SimpleNamespace(
        evaluated=Evaluated({}, {}, {}, []), measured="m", main=True, versions={}, steps=[], reference_rows=None,
        folder=SimpleNamespace(result=result, stage=lambda step: tmp_path), state=SimpleNamespace(wait_for_everyone=wait),
        recipe=SimpleNamespace(evaluation=SimpleNamespace(samples=1, suites=[])),
        loaded=SimpleNamespace(summary=lambda groups, first, samples: {}),
    )  # fmt: skip
    measure_stage(run, None, {"stage": "base", "title": "before learning"})
    assert seen == ["read", "wait", "wait, written"]
    assert json.loads((tmp_path / "result.json").read_text())["stage"] == "base"


def test_rows_of_an_earlier_stage_that_were_damaged_are_named_with_the_remedy(tmp_path: Path):
    run = SimpleNamespace(folder=SimpleNamespace(stage=lambda step: tmp_path))
    assert _kept(run, None) == {}
    (tmp_path / "examples.jsonl").write_text('{"group": "forget", "task": null, "id": "a", "logps": [-1.0]}\n')
    assert _kept(run, None) == {"forget/a": {"id": "a", "logps": [-1.0]}}
    (tmp_path / "examples.jsonl").write_text("{")
    with pytest.raises(RunError, match=r"examples.jsonl cannot be read as the rows of a stage .*Delete .*result.json"):
        _kept(run, None)
