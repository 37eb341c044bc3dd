"""Runs as users start them: by launchers, on several processes, and models loaded where this package is not."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_run import events, execute, outcome, write_recipe

from hf_clmul.run import runner as run

HALVED = ["learning.training.per_device_train_batch_size=2", "unlearning.training.per_device_train_batch_size=2"]
LOAD = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM
found = {}
for name in ("full", "merged", "lora"):
    root = Path(sys.argv[1], name)
    if name == "lora":
        base = AutoModelForCausalLM.from_pretrained(root / "base")
        model = PeftModel.from_pretrained(base, root / "out" / "model")
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "base"), root / "out/adapters/people")
    else:
        model = again = AutoModelForCausalLM.from_pretrained(root / "out" / "model")
    probe = torch.load(root / "probe.pt")["ids"]
    with torch.no_grad():
        found[name] = [[m.eval()(torch.tensor([ids])).logits[0] for ids in probe] for m in (model, again)]
assert not any(module.startswith("hf_clmul") for module in sys.modules)
torch.save(found, Path(sys.argv[1], "found.pt"))
"""


def launch(arguments: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python with these arguments in `folder`; the package is found as in the tests."""
    known = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_do_what_one_does_and_only_the_first_speaks(tmp_path):
    recipe = write_recipe(tmp_path, "full", ("per_device_train_batch_size: 3", "per_device_train_batch_size: 4"))
    execute(recipe, tmp_path / "one")
    accelerate = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--tee=3",
        "--log_dir=logs",
        "-m",
    ]
    launched = launch([*accelerate, "hf_clmul", "run", recipe, *HALVED, "--output", "two"], tmp_path)
    assert launched.returncode == 0, launched.stderr
    first, second = (
        {path.stem: path.read_text() for path in tmp_path.glob(f"logs/*/*/{rank}/*.log")} for rank in (0, 1)
    )
    assert second == {"stdout": "", "stderr": ""}
    assert first["stdout"].count("report: ") == 1 and first["stderr"].count("evaluating before learning:   0%") == 1
    one, two = outcome(tmp_path / "one"), outcome(tmp_path / "two")
    assert two["steps"] == one["steps"] == [0, 8, 4]
    there = {name: value for name, value in one["metrics"].items() if value is not None}
    assert there and {name for name, value in two["metrics"].items() if value is not None} == set(there)
    assert {name: two["metrics"][name] for name in there} == pytest.approx(there, abs=1e-4)
    told = events(tmp_path / "two")
    learned, unlearned = ["data", "request", "finished", "derived"], ["request", "finished", "derived", "erased"]
    assert [event["event"] for event in told] == ["run", *learned, *unlearned, "derived", "exported"]
    assert told[0]["processes"] == 2
    assert json.loads((tmp_path / "two/results.json").read_text())["hardware"]["processes"] == 2


def test_in_another_process_all_bytes_are_the_same(tmp_path):
    """PEFT writes sets, whose order is another one with each PYTHONHASHSEED."""
    recipe = write_recipe(tmp_path, "lora")
    execute(recipe, tmp_path / "here")
    launched = launch(["-m", "hf_clmul", "run", recipe, "--output", "there"], tmp_path, PYTHONHASHSEED="1")
    assert launched.returncode == 0, launched.stderr
    assert outcome(tmp_path / "there") == outcome(tmp_path / "here")
    assert "report: there/report/report.html" in launched.stdout


def test_the_model_loads_where_this_package_is_not(tmp_path, monkeypatch):
    """Bit-equal to the live model; a merged one within its tolerance."""
    export = run.export

    def recording(loaded, model, folder, kind, card, probe):
        with torch.no_grad():
            live = [model.eval()(torch.tensor([ids])).logits[0] for ids in probe]
        torch.save({"ids": probe, "logits": live}, folder.root.parent / "probe.pt")
        return export(loaded, model, folder, kind, card, probe)

    monkeypatch.setattr(run, "export", recording)
    for name in ("full", "lora", "merged"):
        (tmp_path / name).mkdir()
        changes = [("evaluation:", "export: {merge: true}\nevaluation:")] if name == "merged" else []
        execute(write_recipe(tmp_path / name, "full" if name == "full" else "lora", *changes), tmp_path / name / "out")
    loaded = launch(["-c", LOAD, tmp_path], tmp_path, PYTHONPATH="")
    assert loaded.returncode == 0, loaded.stderr
    found = torch.load(tmp_path / "found.pt")
    for name in ("full", "lora", "merged"):
        live = torch.load(tmp_path / name / "probe.pt")["logits"]
        tolerance = 1e-3 if name == "merged" else 0.0
        for loaded_by in found[name]:
            assert max(float((a - b).abs().max()) for a, b in zip(live, loaded_by, strict=True)) <= tolerance
        assert not list((tmp_path / name / "out/model").rglob("training_args.bin"))
