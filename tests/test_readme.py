"""The README's examples are executed, with a tiny model in the place of the one that they name."""

import re
import shlex
from pathlib import Path

import pytest
import tiny

from hf_clmul.recipe.load import load_recipe

LATER = ["evaluate", "audit", "compare", "report", "ls"]
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(repo: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (repo / "README.md").read_text("utf-8"), re.DOTALL)


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny model and tokenizer in the place of the Hub's."""
    tokenizer = tiny.tiny_tokenizer(["Question: Where is the Louvre? The Louvre is in Paris."])
    tiny.tiny_llama(vocab=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_python_example_runs(repo: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks(repo, "python")
    assert HUB_ID in example
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(example.replace(HUB_ID, str(tiny_folder)), "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 2
    assert (tmp_path / "forgotten" / "adapter_model.safetensors").is_file()


def test_recipe_runs(repo: Path, tiny_folder: Path, tmp_path: Path) -> None:
    from hf_clmul.run.runner import run_recipe

    (example,) = blocks(repo, "yaml")
    assert HUB_ID in example
    path = tmp_path / "recipe.yaml"
    path.write_text(example.replace(HUB_ID, str(tiny_folder)))
    small = [
        "adapter.layers=all",
        "learning.training.max_steps=1",
        "unlearning.training.max_steps=1",
        "training.bf16=false",
        "evaluation.max_examples=1",
        "evaluation.max_new_tokens=2",
    ]
    run_recipe(load_recipe(path, small), tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()


def test_commands_exist(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from hf_clmul.cli import app

    monkeypatch.chdir(tmp_path)
    commands = [line.partition("#")[0].strip() for block in blocks(repo, "bash") for line in block.splitlines()]
    for script in (c.removeprefix("bash ") for c in commands if c.startswith("bash ")):
        assert (repo / script).is_file()
    ours = [shlex.split(c)[1:] for c in commands if c.startswith("hf-clmul")]
    assert [words[0] for words in ours] == ["cp", "validate", "plan", "run", "reference", *LATER, "run"]
    assert load_recipe(ours[-1][1]).name == "digits-quickstart"
    for words in ours[:2]:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


def test_named_files_exist(repo: Path) -> None:
    text = (repo / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert (repo / target).exists(), target
