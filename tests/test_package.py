"""The wheel holds all that a user needs outside the repository, and importing the package stays cheap."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

import hf_clmul


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves files in the folder it builds in."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("hf_clmul", "recipes"):
        shutil.copytree(repo / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, cwd=source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    target = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "install", wheel, "--no-deps", "--no-index", "--target", target, cwd=wheel.parent)
    return target


def files_below(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


def test_wheel_holds_every_file_of_the_package_and_every_recipe(wheel, repo):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {f"hf_clmul/{name}" for name in files_below(repo / "hf_clmul")}
    expected |= {f"hf_clmul/recipes/{name}" for name in files_below(repo / "recipes")}
    assert {name for name in names if not re.match(r"hf_clmul-[^/]*\.dist-info/", name)} == expected
    assert {
        "hf_clmul/py.typed",
        "hf_clmul/recipes/quickstart.yaml",
        "hf_clmul/data/invented_people.jsonl",
    } <= expected
    assert any(name.endswith(".j2") for name in expected)
    version = hf_clmul.__version__
    assert {f"hf_clmul-{version}.dist-info/{name}" for name in ("licenses/LICENSE", "METADATA")} <= names


def test_installed_package_finds_its_own_recipes_and_data(installed, tmp_path):
    code = (
        "from hf_clmul import paths\nprint(paths.builtin_recipes(), paths.builtin_data('invented_people'), sep='\\n')"
    )
    recipes, people = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(recipes) == installed / "hf_clmul" / "recipes"
    assert Path(people) == installed / "hf_clmul" / "data" / "invented_people.jsonl"


# As small as a run can be: a random model, one step a request.
SMALL = """
recipe_version: 1
name: small
model: {scratch: {vocab_size: 300, layers: 1, hidden: 16, heads: 2}}
data: {people: {path: builtin:invented_people, persons: 2}}
requests:
  - learn: {task: people, data: people}
  - unlearn: {name: one, from: people, where: {person: [P01]}}
training: {max_steps: 1, per_device_train_batch_size: 2, learning_rate: 1e-3}
evaluation: {max_examples: 2, max_new_tokens: 2}
"""


def command(installed: Path, *arguments: str, cwd: Path) -> str:
    """Runs the installed package, not the repository's, with a cache of its own."""
    environment = {"PYTHONPATH": str(installed), "HF_CLMUL_CACHE": str(cwd / "cache"), "COLUMNS": "200"}
    return run(sys.executable, "-m", "hf_clmul", *arguments, cwd=cwd, **environment)


def test_outside_the_repository_recipes_are_listed_and_copied(installed, tmp_path, repo):
    listed = command(installed, "ls", cwd=tmp_path)
    for name in ("quickstart", "npo", "pcgrad_retain_first"):
        assert name in listed
    command(installed, "cp", "quickstart", cwd=tmp_path)
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_bytes() == (repo / "recipes" / "quickstart.yaml").read_bytes()
    command(installed, "validate", "quickstart.yaml", cwd=tmp_path)


def test_outside_the_repository_a_recipe_runs(installed, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    command(installed, "run", "small.yaml", cwd=tmp_path)
    results = json.loads((tmp_path / "runs" / "small" / "results.json").read_text())
    assert results["status"] == "complete"
    assert [stage["kind"] for stage in results["stages"]] == ["base", "learn", "unlearn"]
    assert (tmp_path / "runs" / "small" / "report" / "report.html").is_file()


HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "diffusers", "matplotlib", "numpy"}


def test_importing_the_package_imports_nothing_heavy(repo):
    code = f"import sys, hf_clmul, hf_clmul.paths; print(sorted({HEAVY} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=repo).strip() == "[]"


def test_evaluation_knows_nothing_of_runs_and_reports(repo):
    """Data flow from run to evaluation by its arguments alone."""
    found = {
        f"{path.relative_to(repo)}: {name}"
        for path in (repo / "hf_clmul" / "evaluation").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
        if name.split(".")[:2] in (["hf_clmul", "run"], ["hf_clmul", "report"])
    }
    assert found == set()


def _names(node: ast.AST) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def test_public_names_are_the_objects_of_their_modules():
    from hf_clmul import trainer, training_args
    from hf_clmul.recipe import load as recipe
    from hf_clmul.run import runner as run

    expected = {
        "ClmulConfig": training_args.ClmulConfig,
        "ClmulTrainer": trainer.ClmulTrainer,
        "Recipe": recipe.Recipe,
        "load_recipe": recipe.load_recipe,
        "run_recipe": run.run_recipe,
    }
    assert {name: getattr(hf_clmul, name) for name in expected} == expected
    assert set(hf_clmul.__all__) == {*expected, "__version__"}
    assert set(hf_clmul.__all__) <= set(dir(hf_clmul))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'hf_clmul' has no attribute 'ClmulTrayner'"):
        _ = hf_clmul.ClmulTrayner


def imported_by(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_imported_package_is_required(repo):
    """A package that only comes along with another one may go away with the next release of that one."""
    # pydantic_core is pydantic's other half, pinned by it to the release.
    named_otherwise = {"PIL": "pillow", "sklearn": "scikit-learn", "ruamel": "ruamel.yaml", "pydantic_core": "pydantic"}
    imported = set().union(*map(imported_by, (repo / "hf_clmul").rglob("*.py")))
    imported -= {*sys.stdlib_module_names, "hf_clmul", "lm_eval"}  # lm_eval: an extra, which its suite asks for
    run_time = (repo / "setup.py").read_text(encoding="utf-8").split("TEST = [")[0]
    required = {plain(name) for name in re.findall(r'^    "([\w.-]+)>=', run_time, re.MULTILINE)}
    assert {plain(named_otherwise.get(name, name)) for name in imported} - required == set()


def test_constraints_pin_every_requirement_within_its_bound(repo):
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", (repo / "constraints.txt").read_text(), re.MULTILINE)
    pins = {plain(name): Version(version) for name, version in pinned}
    setup_py = (repo / "setup.py").read_text(encoding="utf-8")
    bounds = re.findall(r'^    "([\w.-]+)(?:\[.+\])?>=([\d.]+)"', setup_py, re.MULTILINE)
    assert {"torch", "pytest", "ruff"} <= {name for name, _ in bounds}
    assert [name for name, bound in bounds if pins[plain(name)] < Version(bound)] == []
