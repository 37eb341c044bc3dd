"""The recipes of recipes/tofu: each is carried out for two steps a request on a tiny model, with a handful of rows in the
files and columns of TOFU. What all methods learn alike is learned once and copied."""

import json
import math
import shutil
from pathlib import Path

import pytest
from small_run import execute
from tiny import tiny_llama, tiny_tokenizer
from typer.testing import CliRunner

from hf_clmul.cli import app
from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_name
from hf_clmul.hashes import digest
from hf_clmul.paths import builtin_recipes
from hf_clmul.plan.columns import groups
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.folder import settings

FILES = sorted(path for path in (builtin_recipes() / "tofu").glob("*.yaml") if not path.name.startswith("_"))
METHODS = [path.stem for path in FILES if path.stem != "retrained"]
TINY = (
    "learning.training.max_steps=2",
    "unlearning.training.max_steps=2",
    "training.bf16=false",
    "training.logging_steps=1",
    "training.per_device_train_batch_size=2",
    "training.gradient_accumulation_steps=1",
    "unlearning.training.gradient_accumulation_steps=1",
    "evaluation.max_examples=2",
    "evaluation.max_new_tokens=4",
)
ROWS = [{"question": f"Where was author {i} born?", "answer": f"Author {i} was born in town {i}."} for i in range(10)]


def asides(row: dict[str, str]) -> dict[str, object]:
    return {"paraphrased_answer": "In " + row["answer"], "perturbed_answer": ["In Rome.", "In Oslo."]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data sets of TOFU by name, very small: two of ten questions are to be forgotten; and a model beside them."""
    root = tmp_path_factory.mktemp("tofu")
    known = {"question": "Who wrote Emma?", "answer": "Jane Austen", "perturbed_answer": ["Mary Shelley"]}
    sets = {
        "full": ROWS,
        "retain90": ROWS[:8],
        "forget10_perturbed": [{**row, **asides(row)} for row in ROWS[8:]],
        "real_authors_perturbed": [known],
    }
    for name, rows in sets.items():
        (root / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer([row["answer"] for row in ROWS])
    tiny_llama(len(tokenizer), hidden=16, layers=8).save_pretrained(root / "model")  # rmu names layer 7
    tokenizer.save_pretrained(root / "model")
    return root


def with_files(name: str, data: Path, *changes: str) -> Recipe:
    """The recipe, its data on the Hub replaced by the files of the same name, as its README says."""
    sections = load_recipe(f"tofu/{name}").data.items()
    local = [f"data.{section}.path={data / source.name}.json" for section, source in sections]
    if (data / "model").is_dir():
        local.append(f"model.path={data / 'model'}")
    return load_recipe(f"tofu/{name}", [*changes, *local])


@pytest.fixture(scope="module")
def learned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished learn requests by the digest of their settings; the first method that needs one adds it."""
    return {}


def begun(recipe: Recipe, out: Path, learned: dict[str, Path], root: Path) -> Path:
    """A run folder in which the first request is finished."""
    steps = plan_steps(recipe)
    key = digest(settings(recipe, steps, steps[0]))
    if key not in learned:
        only = recipe.model_copy(update={"requests": recipe.requests[:1]})
        learned[key] = root / f"learned-{len(learned)}"
        run(only, learned[key])
    shutil.copytree(learned[key], out)
    return out


def run(recipe: Recipe, out: Path) -> None:
    (out.parent / f"{out.name}.yaml").write_text(json.dumps(recipe.model_dump(mode="json", by_alias=True)))
    execute(out.parent / f"{out.name}.yaml", out)


def lines(run_folder: Path, request: str) -> list[dict[str, float]]:
    """The log of the optimizer steps of a request."""
    text = (run_folder / "requests" / request / "log.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


@pytest.mark.parametrize("name", METHODS)
def test_two_steps(name: str, folder: Path, learned: dict[str, Path], tmp_path: Path) -> None:
    recipe = with_files(name, folder, *TINY)
    run(recipe, begun(recipe, tmp_path / "run", learned, folder))
    results = json.loads((tmp_path / "run/results.json").read_text())
    base, after, forgot = results["stages"]
    edit = forgot.get("edit")
    assert [stage["steps"] for stage in results["stages"]] == [0, 2, 0 if edit else 2]
    assert len({stage["weights_sha256"] for stage in (base, after, forgot)}) == 3, "the weights stood still"
    log = lines(tmp_path / "run", "01-unlearn-forget10")
    assert [line["step"] for line in log] == ([] if edit else [1, 2])
    wanted = {"forget": recipe.unlearning.forget, "retain": recipe.unlearning.retain}
    assert recipe.unlearning.forget and forgot["examples"].keys() == {role for role in wanted if wanted[role]}
    for line in log:
        losses = {key: value for key, value in line.items() if key.startswith("loss/")}
        all_roles = {f"loss/{role}/{term}" for role, terms in wanted.items() for term in terms}
        in_turns = rule_name(recipe.unlearning.conflict) == "alternate"
        assert losses.keys() < all_roles if in_turns else losses.keys() == all_roles
        assert all(math.isfinite(value) for value in [*losses.values(), line["grad_norm"]])
        rule = rule_name(recipe.unlearning.conflict)  # the sum looks at no two gradients side by side
        compares = CONFLICT_RULES[rule].needs & {"gram", "gradients"} or (
            recipe.unlearning.lookahead or recipe.unlearning.sharpness
        )
        assert not compares or "cosine/forget/retain" in line
        assert "gram" not in CONFLICT_RULES[rule].needs or "weight/forget" in line
    forget = forgot["groups"]["forget"]
    assert forget["examples"] == 2 and "truth_ratio" in forget["metrics"], "forget10_perturbed has what it needs"
    assert forgot["groups"]["held_out"]["examples"] == 1


def test_the_retrained_reference_never_meets_what_the_others_forget(folder: Path) -> None:
    reference, method = (with_files(name, folder, *TINY) for name in ("retrained", "npo"))
    (only,), both = plan_steps(reference), plan_steps(method)
    texts = [{row["answer"] for row in rows} for rows in (only.roles["learn"], both[1].roles["retain"])]
    assert texts[0] == texts[1] == {row["answer"] for row in ROWS[:8]}
    measured = [groups(recipe, steps) for recipe, steps in ((reference, [only]), (method, both))]
    assert [row["perturbed_answers"] for row in measured[0]["forget"]] == [["In Rome.", "In Oslo."]] * 2
    assert [row["question"] for row in measured[0]["forget"]] == [row["question"] for row in measured[1]["forget"]]
    assert reference.request_training(0) == method.request_training(0) and reference.seed != method.seed


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_named_after_its_file_and_says_where_its_numbers_come_from(path: Path) -> None:
    recipe, text = load_recipe(path), path.read_text()
    assert recipe.name == "tofu-" + path.stem.replace("_", "-")
    assert text.startswith("# ") and text.count("\nextends: _base.yaml\n") == 1
    assert {source.path for source in recipe.data.values()} == {"locuslab/TOFU"}
    # open-unlearning (OU), the authors' repository, or our own choice: a number without a source is a rumour
    assert any(source in text for source in ("OU ", "github.com/", "ours")), "say where the numbers come from"


def test_the_rows_of_the_benchmark(shared: Path) -> None:
    """forget10 and retain90 are the two parts of full, as its authors cut it."""
    steps = plan_steps(with_files("npo", shared / "data" / "tofu"))
    forget, retain = steps[1].roles["forget"], steps[1].roles["retain"]
    assert [row["id"] for row in forget] == [f"full-{i}" for i in range(3600, 4000)]
    kept = [json.loads(line) for line in (shared / "data/tofu/retain90.json").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in retain] == [(row["question"], row["answer"]) for row in kept]
    assert all(len(row["perturbed_answers"]) == 5 and row["paraphrased_answer"] for row in forget)
    assert (
        plan_steps(with_files("retrained", shared / "data" / "tofu"))[0].roles["learn"][0]["answer"]
        == kept[0]["answer"]
    )


def test_the_command_line_lists_and_copies_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    listed = CliRunner().invoke(app, ["ls"]).output
    assert [path.stem for path in FILES if f"tofu/{path.stem} " not in listed] == []
    assert CliRunner().invoke(app, ["cp", "tofu/npo", "mine/"]).output.split() == ["mine/npo.yaml", "mine/_base.yaml"]
    checked = CliRunner().invoke(app, ["validate", "mine/npo.yaml", "unlearning.conflict=pcgrad"])
    assert (checked.exit_code, checked.output) == (0, "mine/npo.yaml: valid; learn full, unlearn forget10\n")
