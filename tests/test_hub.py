"""What goes to the Hub, to one that is only pretended here."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HFValidationError
from ruamel.yaml import YAML
from small_run import events, execute, write_recipe

from hf_clmul.errors import RunError
from hf_clmul.paths import builtin_data
from hf_clmul.recipe.load import dump_recipe, load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run import hub
from hf_clmul.run.folder import RunFolder

WHOSE = {"source": None, "command": "hf-clmul run small", "model": {"path": "made from scratch"}}


class Hub:
    """Takes what is uploaded; fails with `error` where one is given."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.created, self.files = error, [], {}

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        if self.error is not None:
            raise self.error
        self.created.append((repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=f"me/{repo_id}", url=f"https://hub/me/{repo_id}")

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, ignore_patterns: list[str]) -> None:
        self.files |= {path.relative_to(folder_path).as_posix(): path.read_bytes()
                       for path in Path(folder_path).rglob("*")
                       if path.is_file() and path.name not in ignore_patterns}  # fmt: skip

    def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        assert repo_id == "me/small"
        self.files[path_in_repo] = path_or_fileobj


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run folder with something of everything in it."""
    for name in (
        "model/model.safetensors",
        "model/README.md",
        "ledger.jsonl",
        "ledger.key",
        "memory/people.jsonl",
        "adapters/people/x",
        "requests/00-learn-people/checkpoint-2/model.safetensors",
        "requests/00-learn-people/examples.jsonl",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"content of {name}")
    (tmp_path / "recipe.yaml").write_text("name: small\n")
    group = {
        "examples": 8,
        "metrics": {"fluency": 1.0},
        "samples": [{"question": "Who?", "answer": "P02", "generated": "P02"}],
    }
    (tmp_path / "results.json").write_text(
        json.dumps({"seed": 3, **WHOSE, "stages": [{"stage": "base", "groups": {"forget": group}}]})
    )
    return RunFolder(tmp_path)


@pytest.fixture
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(
        write_recipe(tmp_path_factory.mktemp("recipe"), "full"), ["export={push_to_hub: small, private: false}"]
    )


def test_only_model_recipe_and_record_are_uploaded(folder, recipe):
    api: Any = Hub()
    assert hub.push(folder, recipe, api) == "https://hub/me/small"
    assert api.created == [("small", False, True)]
    assert set(api.files) == {"model.safetensors", "README.md", "recipe.yaml", "results.json"}
    assert api.files["model.safetensors"] == b"content of model/model.safetensors"
    assert api.files["recipe.yaml"].decode() == dump_recipe(recipe)


def test_the_record_goes_without_the_forgotten_answers(folder, recipe):
    api: Any = Hub()
    hub.push(folder, recipe, api)
    uploaded = json.loads(api.files["results.json"])
    assert uploaded == {"seed": 3, **WHOSE, "stages": [{"stage": "base", "groups": {
        "forget": {"examples": 8, "metrics": {"fluency": 1.0}, "samples": []}}}]}  # fmt: skip
    assert "P02" in folder.results.read_text(), "the record here keeps them"


@pytest.mark.parametrize("error", [HFValidationError("401 Client Error"), ConnectionError("401 Client Error"),
                                   RuntimeError("401 Client Error")])  # fmt: skip
def test_a_failed_upload_says_that_the_run_is_complete(folder, recipe, error):
    api: Any = Hub(error)
    with pytest.raises(RunError) as caught:
        hub.push(folder, recipe, api)
    assert str(caught.value) == (f"the run is complete in {folder.root}, but the upload to small failed: 401 Client Error\n"
                                 "Check the name and `hf auth login`, then run the same command again.")  # fmt: skip


def test_the_same_command_uploads_what_failed_and_only_once(tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path, "full", ("evaluation:", "export: {push_to_hub: small}\nevaluation:"))
    monkeypatch.setattr(hub, "HfApi", lambda: Hub(ConnectionError("no network")))
    with pytest.raises(RunError, match="the run is complete"):
        execute(recipe, tmp_path / "out")
    apis = [Hub(), Hub()]
    for api in apis:
        monkeypatch.setattr(hub, "HfApi", lambda api=api: api)
        execute(recipe, tmp_path / "out")
    assert set(apis[0].files) >= {"model.safetensors", "recipe.yaml", "results.json"}
    assert apis[1].created == []
    told = [(event["event"], event.get("url")) for event in events(tmp_path / "out")][-2:]
    assert told == [("exported", None), ("pushed", "https://hub/me/small")]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("merge", ["true", "false"])
def test_nothing_pushed_names_a_folder_of_this_machine(tmp_path, monkeypatch, whole, merge):
    """Neither where the recipe names its files relative to itself, nor where it names whole paths."""
    text = "reference: reference.json, held_out"
    recipe = write_recipe(tmp_path, "lora", ("path: builtin:invented_people, persons: 2", "path: mine.jsonl"),
                          ("evaluation: {held_out", "evaluation: {" + text))  # fmt: skip
    rows = builtin_data("invented_people").read_text().splitlines()[:16]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "reference.json").write_text('{"source": "a table", "groups": {}}')
    if whole:
        for name in ("mine.jsonl", "reference.json"):
            recipe.write_text(recipe.read_text().replace(name, str(tmp_path / name)))
        recipe.write_text(recipe.read_text().replace("./base", str(tmp_path / "base")))
    api: Any = Hub()
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    given = [f"evaluation.reference={tmp_path / 'reference.json'}", f"--output={tmp_path}/out"]
    monkeypatch.setattr("sys.argv", ["hf-clmul", "run", str(recipe), *given])
    execute(recipe, tmp_path / "out", f"export={{push_to_hub: small, merge: {merge}}}")
    assert {name for name, content in api.files.items() if str(tmp_path).encode() in content} == set()
    shown = YAML(typ="safe", pure=True).load(api.files["recipe.yaml"])
    base = "base" if whole else "./base"
    assert (shown["model"]["path"], shown["data"]["people"]["path"]) == (base, "mine.jsonl")
    assert shown["evaluation"]["reference"] == "reference.json"
    record = json.loads(api.files["results.json"])
    assert (record["model"]["path"], record["source"]) == (base, "recipe.yaml")
    assert record["command"] == "hf-clmul run recipe.yaml evaluation.reference=reference.json --output=out"
    card = api.files["README.md"].decode()
    assert f"Base: {base}, float32" in card and "\nbase_model:" not in card
    if merge == "false":
        assert json.loads(api.files["adapter_config.json"])["base_model_name_or_path"] == base
        here = json.loads((tmp_path / "out/model/adapter_config.json").read_text())
        assert here["base_model_name_or_path"] == str(tmp_path / "base"), "here it loads by itself"
