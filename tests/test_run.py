"""A recipe carried out in this process: what it leaves, what it refuses, and how it goes on after trouble."""

import errno
import json
import os
import shutil
import socket
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from small_run import bytes_and_times, events, execute, files, outcome, stop, write_recipe

from hf_clmul import paths
from hf_clmul.errors import RunError
from hf_clmul.families import loaded as measuring
from hf_clmul.ledger.scan import scan
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run import runner as run
from hf_clmul.run.log import RunLog
from hf_clmul.run.measuring import measuring as measuring_of
from hf_clmul.trainer import ClmulTrainer

LEARN, UNLEARN = "00-learn-people", "01-unlearn-one"
STAGE = {"result.json", "examples.jsonl"}
REQUEST = STAGE | {"settings.json", "log.jsonl"}
FULL_STATE = {
    f"state/{name}" for name in ("model.safetensors", "config.json", "generation_config.json", "training.json")
}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ANOTHER = ("where: {person: [P02]}}", "where: {person: [P02]}}\n  - unlearn: {name: two, from: people}")


@pytest.fixture(scope="module", params=["full", "lora"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a whole run; the recipe is beside it."""
    recipe = write_recipe(tmp_path_factory.mktemp(request.param), request.param)
    return execute(recipe, recipe.parent / "out").parents[1]


def results(root: Path) -> dict[str, Any]:
    return json.loads((root / "results.json").read_text())


# ---- what a run leaves ---------------------------------------------------------------------------------------


def test_exactly_the_files_of_the_design(finished):
    is_full = not (finished / "adapters").exists()
    model = (
        {"model.safetensors", "config.json", "generation_config.json"} if is_full else ADAPTER | {"chat_template.jinja"}
    )
    # The weights of the learn request, which the unlearn request has trained further, are gone.
    states = {UNLEARN: FULL_STATE if is_full else {f"state/{file}" for file in ADAPTER | {"training.json"}}}
    assert files(finished) == {
        "recipe.yaml", "ledger.jsonl", "ledger.key", "results.json", "run.lock", "report/report.html", "receipts/one.md",
        *(f"base/{name}" for name in STAGE),
        *(f"requests/{request}/{name}" for request in (LEARN, UNLEARN) for name in REQUEST | states.get(request, set())),
        *(f"model/{name}" for name in model | TOKENIZER | {"README.md"}),
        *(() if is_full else (f"adapters/people/{name}" for name in ADAPTER)),
    }  # fmt: skip


def test_a_scan_finds_nothing_wrong_but_records_that_quote(finished):
    """The weights that the erasure left, of a model trained whole too: the next request would begin with them."""
    found = scan(finished)
    assert {one.kind for one in found if one.wrong} == {"evaluation"}
    assert {f"requests/{UNLEARN}/state", "model"} <= {one.path for one in found if one.kind == "approximate"}


def test_what_a_finished_run_has_lost_comes_back_without_training(finished, tmp_path):
    recipe, root = finished.parent / "recipe.yaml", Path(shutil.copytree(finished, tmp_path / "out"))
    resolved, before = (root / "recipe.yaml").read_bytes(), outcome(root)
    (root / "recipe.yaml").write_text("a: [")
    with patch.object(run, "_execute", None):
        execute(recipe, root)
    assert (root / "recipe.yaml").read_bytes() == resolved
    (root / "results.json").write_text(json.dumps(results(root) | {"stages": []}))
    with patch("hf_clmul.run.request._train", None):
        execute(recipe, root)
    assert outcome(root) == before


def test_the_record_has_every_key(finished):
    found = results(finished)
    assert list(found) == [
        "schema",
        "name",
        "status",
        "recipe_sha256",
        "source",
        "source_revision",
        "seed",
        "created",
        "finished",
        "command",
        "model",
        "versions",
        "hardware",
        "seconds",
        "peak_memory_bytes",
        "stages",
        "reference",
        "export",
        "stream",
        "ledger",
        *(["base_sha256_after"] if (finished / "adapters").exists() else []),
    ]
    assert found.get("base_sha256_after") in (None, found["model"]["sha256"])
    assert (found["schema"], found["status"], found["seed"], found["reference"]) == (1, "complete", 0, None)
    assert set(found["model"]) == {"family", "path", "sha256", "parameters", "trainable_parameters", "dtype"}
    assert set(found["hardware"]) == {"device", "cpu", "cores", "threads", "memory_bytes", "processes"}
    assert {"hf_clmul", "python", "torch", "transformers", "peft"} <= set(found["versions"])
    assert found["created"] <= found["finished"]
    assert found["seconds"] > sum(stage["seconds"] for stage in found["stages"]) > 0
    assert found["peak_memory_bytes"] > 10**8
    assert [(s["stage"], s["kind"], s["title"], s["steps"]) for s in found["stages"]] == [
        ("base", "base", "before learning", 0),
        (LEARN, "learn", "after learning people", 8),
        (UNLEARN, "unlearn", "after unlearning one", 4),
    ]
    assert [stage["examples"] for stage in found["stages"]] == [{}, {"learn": 16}, {"forget": 8, "retain": 8}]
    assert [stage["log"] for stage in found["stages"]] == [
        None,
        *(f"requests/{name}/log.jsonl" for name in (LEARN, UNLEARN)),
    ]
    for stage in found["stages"]:
        assert {name: group["examples"] for name, group in stage["groups"].items()} == {
            "forget": 8,
            "retain": 2,
            "held_out": 2,
        }
        for group in stage["groups"].values():
            assert {"answer_probability", "rouge_l_recall", "truth_ratio", "fluency"} <= set(group["metrics"])
            assert [set(sample) for sample in group["samples"]] == [{"question", "answer", "generated"}]
        assert {name: column["examples"] for name, column in stage["tasks"].items()} == {"people": 2, "one": 8}
        assert all("answer_probability" in column["metrics"] for column in stage["tasks"].values())
    assert len({(stage["measured"], stage["evaluated"]) for stage in found["stages"]}) == 1
    assert found["stream"]["columns"] == [
        {"name": "people", "kind": "task", "task": "people", "learned": [1], "forgotten": []},
        {"name": "one", "kind": "forgotten", "task": "people", "learned": [1], "forgotten": [2]},
    ]
    assert found["stream"]["score"] == "rouge_l_recall"
    assert found["stream"]["matrix"] == [
        [stage["tasks"][name]["metrics"]["rouge_l_recall"] for name in ("people", "one")] for stage in found["stages"]
    ]
    assert found["export"]["max_difference"] == 0.0
    assert len({stage["weights_sha256"] for stage in found["stages"]}) == 3


def test_the_ledger_tells_what_was_done(finished):
    told = events(finished)
    adapters = ["derived"] if (finished / "adapters").exists() else []
    assert [event["event"] for event in told] == [
        "run", "data", "request", "finished", "derived", "request", "finished", "derived", "erased", *adapters, "derived",
        "exported",
    ]  # fmt: skip
    learn, learned, unlearn, unlearned, erased = (told[i] for i in (2, 3, 5, 6, 8))
    shas = [stage["weights_sha256"] for stage in results(finished)["stages"]]
    assert [told[0]["base"]["weights_sha256"], learned["weights_sha256"], unlearned["weights_sha256"]] == shas
    assert told[0]["recipe_sha256"] == results(finished)["recipe_sha256"]
    assert (set(learn["examples"]), set(unlearn["examples"])) == ({"learn"}, {"forget", "retain"})
    assert (told[1]["task"], told[1]["count"], erased["task"], erased["count"]) == ("people", 16, "people", 8)
    exported = {path.name: sha256(path.read_bytes()).hexdigest() for path in (finished / "model").iterdir()}
    assert told[-1]["files"] == exported


def test_the_saved_recipe_is_the_recipe(finished):
    assert load_recipe(finished / "recipe.yaml") == load_recipe(finished.parent / "recipe.yaml")


def test_the_log_has_each_step_once(finished):
    for request, steps in ((LEARN, 8), (UNLEARN, 4)):
        lines = [json.loads(line) for line in (finished / "requests" / request / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
        assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)


def test_all_stages_are_measured_alike(tmp_path, monkeypatch):
    """bf16 scores are a little off; a difference between stages must come from training."""
    seen = []
    recipe = write_recipe(
        tmp_path,
        "full",
        ("logging_steps: 1,", "logging_steps: 1, save_strategy: 'no',"),
        ("learning_rate: 1e-3,", "learning_rate: 1e-3, bf16: true, max_length: 200,"),
    )
    measure = measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda model, tokenizer, rows, how, title: (
            seen.append(how) or measure(model, tokenizer, rows, how, title)
        ),
    )  # fmt: skip
    execute(recipe, tmp_path / "out")
    assert len(seen) == 3 and len(set(seen)) == 1
    assert seen[0].bf16 is False and seen[0].max_length == 1024
    everywhere = load_recipe(recipe, ["training.bf16=true", "training.max_length=200"])
    assert (measuring_of(everywhere).bf16, measuring_of(everywhere).max_length) == (True, 200)


def test_bf16_and_max_length_on_a_cpu(tmp_path, monkeypatch):
    lengths, types = [], set()
    train = ClmulTrainer.train
    monkeypatch.setattr(
        ClmulTrainer,
        "train",
        lambda self, **kwargs: (
            lengths.extend(len(row["input_ids"]) for rows in self.train_dataset.roles.values() for row in rows)
            or train(self, **kwargs)
        ),
    )
    recipe = write_recipe(tmp_path, "lora", ("logging_steps: 1,", "logging_steps: 1, bf16: true, max_length: 150,"))
    measure = measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda model, *args: (
            types.add(model(input_ids=torch.tensor([[1, 2]])).logits.dtype) or measure(model, *args)
        ),
    )  # fmt: skip
    execute(recipe, tmp_path / "out")
    assert max(lengths) == 150
    assert types == {torch.float32}, "the autocast of training must not stay"


# ---- the same command again ----------------------------------------------------------------------------------


def test_a_finished_run_is_not_redone(finished, monkeypatch):
    before = bytes_and_times(finished)
    monkeypatch.setattr(run, "load_of", lambda *args: pytest.fail("the model was loaded"))
    execute(finished.parent / "recipe.yaml", finished)
    assert bytes_and_times(finished) == before
    (finished / "report/report.html").unlink()
    execute(finished.parent / "recipe.yaml", finished)
    assert files(finished) == set(before)


def test_changed_settings_of_a_finished_request_are_refused(finished):
    before = bytes_and_times(finished)
    with pytest.raises(RunError) as caught:
        execute(finished.parent / "recipe.yaml", finished, "learning.training.learning_rate=0.1", "seed=7")
    message = str(caught.value)
    assert f"request {LEARN} is finished" in message
    assert "seed: was 0, is 7" in message
    assert "training.learning_rate: was 0.003, is 0.1" in message
    assert "--output" in message
    with pytest.raises(RunError, match=f"a finished request '{UNLEARN}' that this recipe does not have"):
        execute(finished.parent / "recipe.yaml", finished, "requests=[{learn: {task: people, data: people}}]")
    assert bytes_and_times(finished) == before


def test_an_unfinished_request_starts_anew_with_other_settings(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, "lora"), tmp_path / "out"
    stop(monkeypatch, UNLEARN, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out)
    learned = bytes_and_times(out / "requests" / LEARN)
    assert (out / "requests" / UNLEARN / "checkpoint-2").is_dir()
    other = ["unlearning.training.learning_rate=2e-3", "unlearning.forget={npo: {beta: 0.5}}"]
    execute(recipe, out, *other)
    left = {name: found for name, found in learned.items() if not name.startswith("state/")}
    assert bytes_and_times(out / "requests" / LEARN) == left and len(learned) == len(left) + 3
    execute(recipe, tmp_path / "fresh", *other)
    assert outcome(out) == outcome(tmp_path / "fresh")
    told = events(out)
    assert [(e["name"], e["resumed"]) for e in told if e["event"] == "request"] == [
        (LEARN, False),
        (UNLEARN, False),
    ] + [(UNLEARN, False)]
    hashes = [event["recipe_sha256"] for event in told if event["event"] in ("run", "request")]
    assert hashes[:3] == [hashes[0]] * 3 and hashes[3:] == [hashes[3]] * 2 and hashes[0] != hashes[3]
    assert json.loads((out / "requests" / UNLEARN / "settings.json").read_text())["training"]["learning_rate"] == 2e-3


def test_interrupted_by_hand_it_goes_on_from_its_checkpoint(finished, monkeypatch):
    recipe, out = finished.parent / "recipe.yaml", finished.parent / "interrupted"
    stop(monkeypatch, LEARN, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out)
    assert results(out)["status"] == "running"
    execute(recipe, out)
    assert outcome(out) == outcome(finished)
    assert [e["resumed"] for e in events(out) if e["event"] == "request"] == [False, True, False]
    lines = [json.loads(line) for line in (out / "requests" / LEARN / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))


def test_with_another_evaluation_it_goes_on_from_its_checkpoint(finished, monkeypatch):
    recipe, out = finished.parent / "recipe.yaml", finished.parent / "measured-otherwise"
    stop(monkeypatch, LEARN, 5, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        execute(recipe, out)
    execute(recipe, out, "evaluation.max_examples=1", "evaluation.max_new_tokens=3")
    assert [e["resumed"] for e in events(out) if e["event"] == "request"] == [False, True, False]
    assert outcome(out)["files"] == outcome(finished)["files"]
    assert {stage["groups"]["held_out"]["examples"] for stage in results(out)["stages"]} == {1}


def kept(root: Path, stage: str) -> tuple[dict, list]:
    """A stage's record, and the ids that were measured."""
    place = root / "base" if stage == "base" else root / "requests" / stage
    rows = [json.loads(line) for line in (place / "examples.jsonl").read_text().splitlines()]
    return json.loads((place / "result.json").read_text()), [row["id"] for row in rows]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_requests_can_be_added_to_a_finished_run(tmp_path, kind, monkeypatch):
    """What is to be forgotten becomes another group of examples. A stage whose weights are live is measured on what is
    missing there; one whose weights a later request replaced keeps what it has."""
    longer = write_recipe(tmp_path, kind, ANOTHER).read_text()
    execute(tmp_path / "recipe.yaml", tmp_path / "fresh")
    recipe, out = write_recipe(tmp_path, kind), tmp_path / "out"
    execute(recipe, out)
    before = {stage: kept(out, stage) for stage in ("base", LEARN, UNLEARN)}
    files_of_learn = bytes_and_times(out / "requests" / LEARN)
    measured, measure = [], measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda model, tokenizer, rows, how, title: (
            measured.append(len(rows["rows"])) or measure(model, tokenizer, rows, how, title)
        ),
    )  # fmt: skip
    recipe.write_text(longer)
    execute(recipe, out)
    assert outcome(out)["files"] == outcome(tmp_path / "fresh")["files"]
    assert bytes_and_times(out / "requests" / LEARN) == files_of_learn
    names = [event["name"] for event in events(out) if event["event"] == "request"]
    assert names == [LEARN, UNLEARN, "02-unlearn-two"]
    # Of 8 + 2 + 2 examples the 6 more that the new request forgets, twice; then all of the new stage.
    assert measured == [6, 6, 18]
    assert set(kept(out, "base")[1]) - set(before["base"][1]) == set(kept(out, UNLEARN)[1]) - set(before[UNLEARN][1])
    groups = [stage["groups"] for stage in results(out)["stages"]]
    assert [{name: g["examples"] for name, g in of_stage.items()} for of_stage in groups] == [
        {"forget": 16, "held_out": 2}, {"forget": 8, "retain": 2, "held_out": 2}, {"forget": 16, "held_out": 2},
        {"forget": 16, "held_out": 2},
    ]  # fmt: skip
    # Rounding may differ with the batch that an example is measured in, and nothing else does.
    fresh = {stage["stage"]: stage["groups"] for stage in results(tmp_path / "fresh")["stages"]}
    for stage, found in zip(results(out)["stages"], groups, strict=True):
        if stage["stage"] != LEARN:
            for group, of_group in found.items():
                anew = fresh[stage["stage"]][group]
                assert of_group["absent"] == anew["absent"]
                there = {name: value for name, value in of_group["metrics"].items() if value is not None}
                assert there == pytest.approx({name: anew["metrics"][name] for name in there}, rel=1e-5)
    assert [None in row for row in results(out)["stream"]["matrix"]] == [False, True, False, False]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_another_way_to_measure_needs_weights_that_are_no_longer_kept(tmp_path, kind):
    recipe, out = write_recipe(tmp_path, kind), tmp_path / "out"
    execute(recipe, out)
    before = bytes_and_times(out)
    for change in ("evaluation.max_new_tokens=5", "evaluation.batch_size=3", "training.max_length=60"):
        with pytest.raises(RunError, match=f"the weights after {LEARN} are\\s+not kept|was made with other settings"):
            execute(recipe, out, change)
        assert bytes_and_times(out) == before


def test_other_examples_of_a_finished_run_train_nothing_and_are_measured_where_weights_are_live(tmp_path, monkeypatch):
    recipe, out = write_recipe(tmp_path, "lora"), tmp_path / "out"
    execute(recipe, out)
    before, learned = outcome(out)["files"], bytes_and_times(out / "requests" / LEARN)
    monkeypatch.setattr(ClmulTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    execute(recipe, out, "evaluation.max_examples=1")
    assert outcome(out)["files"] == before
    assert [stage["groups"]["held_out"]["examples"] for stage in results(out)["stages"]] == [1, 2, 1]
    assert bytes_and_times(out / "requests" / LEARN) == learned


def test_another_export_is_made_without_training(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "lora")
    execute(recipe, tmp_path / "out")
    adapter = load_file(tmp_path / "out/adapters/people/adapter_model.safetensors")
    monkeypatch.setattr(ClmulTrainer, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    execute(recipe, tmp_path / "out", "export.merge=true")
    assert results(tmp_path / "out")["export"]["kind"] == "merged"
    assert not (tmp_path / "out/model/adapter_config.json").exists()
    assert (tmp_path / "out/model/model.safetensors").is_file()
    again = load_file(tmp_path / "out/adapters/people/adapter_model.safetensors")
    assert all(torch.equal(adapter[name], again[name]) for name in adapter)


# ---- trouble -------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused_and_spoils_nothing(finished, monkeypatch):
    recipe, out, told = finished.parent / "recipe.yaml", finished.parent / "twice", []

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not told:
            told.append(None)
            with pytest.raises(RunError) as caught:
                execute(recipe, out)
            told[0] = str(caught.value)

    monkeypatch.setattr(RunLog, "on_step_end", on_step_end)
    execute(recipe, out)
    assert told[0].startswith(f"{out} is in use by another run: process {os.getpid()} on {socket.gethostname()}. Wait")
    assert outcome(out) == outcome(finished)
    assert not (out / "run.holder").exists()


def full_disk(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, matching: str) -> None:
    """Lets the disk be full when a function is called with an argument that contains `matching`."""
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        if any(matching in str(value) for value in args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)


@pytest.mark.parametrize(("owner", "name", "matching"), [
    (torch, "save", f"{UNLEARN}/checkpoint-2"), (paths, "_sync_tree", f"{UNLEARN}/.state."),
    (os, "replace", f"{UNLEARN}/result.json"), (paths, "_sync_tree", "/.model."), (os, "replace", "results.json"),
], ids=["checkpoint", "state", "result", "model", "results"])  # fmt: skip
def test_a_full_disk_loses_nothing(finished, owner, name, matching, monkeypatch):
    recipe, out = finished.parent / "recipe.yaml", finished.parent / f"full-disk-{matching.replace('/', '-')}"
    with monkeypatch.context() as patched:
        full_disk(patched, owner, name, matching)
        with pytest.raises(RunError) as caught:
            execute(recipe, out)
    assert "The disk is full. Free some space or choose another folder" in str(caught.value)
    assert "give the same command again" in str(caught.value)
    execute(recipe, out)
    assert outcome(out) == outcome(finished)
    assert files(out) == files(finished)
