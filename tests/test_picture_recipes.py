"""Recipes with pictures: what their data sections may say, and whole runs on folders and on pictures that the model draws."""

import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny_pipelines import stable_diffusion
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_clmul.errors import RecipeError
from hf_clmul.families import generated, pipeline
from hf_clmul.hashes import file_hashes
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.runner import plan_recipe, run_recipe

RECIPE = """\
recipe_version: 1
name: drawn
family: diffusion
model: {path: ./pipeline}
data:
  things: {path: generated, prompts: [{caption: a cat, kind: cat}], images_per_prompt: 2, steps: 2}
  others: {path: generated, prompts: [{caption: a dog, kind: dog}, a bird], images_per_prompt: 2, steps: 2}
requests:
  - unlearn: {name: cats, from: base, data: things, retain: others}
unlearning:
  forget: {relabel: {anchor: {cat: dog}}}
  retain: {denoising: {}}
  conflict: sum
  training: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}
evaluation: {images: {per_prompt: 1, steps: 2}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (tmp_path / "pipeline").mkdir()
    return tmp_path


def recipe(old: str = "", new: str = "", text: str = RECIPE):
    assert old in text
    Path("r.yaml").write_text(text.replace(old, new, 1))
    return load_recipe("r.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("prompts: [{caption: a cat, kind: cat}], ", "",
         "6: data.things: names no prompts to draw; expected prompts: a text, or a list of texts or rows"),
        ("path: generated, prompts: [{c", "path: ./pipeline, prompts: [{c",
         "6: data.things.prompts: is for `path: generated` only: pictures that the model draws; remove it, or set "
         "`path: generated`"),
        ("images_per_prompt: 2", "images_per_prompt: 0",
         "6: data.things.images_per_prompt: expected a number of at least 1; found 0"),
        ("images_per_prompt: 2", "split: train",
         "6: data.things.split: says nothing of pictures that the model draws; remove it"),
        ("[{caption: a cat, kind: cat}]", "3",
         "6: data.things.prompts: expected a prompt, or a list of prompts, each a text or {caption: PROMPT, COLUMN: VALUE}; "
         "found 3"),
        ("[{caption: a cat, kind: cat}]", "[]", "6: data.things.prompts: expected"),
    ],
)  # fmt: skip
def test_what_a_section_may_not_say(old, new, line):
    with pytest.raises(RecipeError) as caught:
        recipe(old, new)
    found = [problem for problem in str(caught.value).splitlines() if "data.things" in problem]
    assert any(problem.removeprefix("r.yaml:").startswith(line) for problem in found), found


def test_a_language_model_draws_nothing():
    text = RECIPE.replace("family: diffusion\n", "")
    with pytest.raises(RecipeError, match="data.things.path: a language model draws no pictures"):
        recipe(text=text[: text.index("unlearning:")])


def test_a_folder_beside_the_recipe_is_data(folder):
    (folder / "cats").mkdir()
    found = recipe(
        "{path: generated, prompts: [{caption: a cat, kind: cat}], images_per_prompt: 2, steps: 2}", "{path: cats}"
    )
    assert found.data["things"].path == str(folder / "cats")
    with pytest.raises(RecipeError, match="data.things.path: no such file or folder; found './dogs'"):
        recipe(
            "path: generated, prompts: [{caption: a cat, kind: cat}], images_per_prompt: 2, steps: 2", "path: ./dogs"
        )


def test_a_recipe_with_prompts_is_the_same_when_it_is_read_again(folder):
    from hf_clmul.recipe.load import dump_recipe

    found = recipe()
    (folder / "again.yaml").write_text(dump_recipe(found))
    assert load_recipe("again.yaml") == found and found.data["things"].images_per_prompt == 2


@pytest.mark.parametrize("adapter", ["", "adapter: {r: 2, alpha: 2}\n"])
def test_a_run_draws_first_and_a_second_one_finds_it(folder, monkeypatch, adapter):
    stable_diffusion().save_pretrained(folder / "pipeline")
    chosen = recipe("data:\n", adapter + "data:\n")
    run_recipe(chosen, folder / "out")
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["status"] == "complete" and results["stages"][1]["examples"] == {"forget": 2, "retain": 4}
    drawn = file_hashes(folder / "cache" / "generated")
    assert len(set(drawn.values())) == 6
    monkeypatch.setattr(generated, "draw", lambda *args: pytest.fail("drawn again"))
    run_recipe(chosen, folder / "again")
    again = json.loads((folder / "again" / "results.json").read_text())
    assert again["stages"][1]["weights_sha256"] == results["stages"][1]["weights_sha256"]
    assert file_hashes(folder / "cache" / "generated") == drawn


REFUSED = {
    "cut": ("a bird]", f"{'bird ' * 8}]", "would be cut before"),
    "collision": ("a bird]", "A CAT]", "'a cat' (forget) and 'A CAT' (retain) are the same to the model"),
    "anchor": ("{cat: dog}", "A Cat", "the anchor 'A Cat' is the same to the model as the caption 'a cat'"),
    "same prompt": ("a bird]", "a cat]", "forget and retain share 2 examples"),
}


JUDGE = "{classifier: ./judge, axis: kind, per_prompt: 1, steps: 2}"
BEFORE_DRAWING = {
    "cut": REFUSED["cut"],
    "collision": REFUSED["collision"],
    "anchor": REFUSED["anchor"],
    "a missing anchor": ("{anchor: {cat: dog}}", "{anchor: {cow: dog}}", "none of the words to replace (cow) stands in"),
    "cut paraphrase": ("{per_prompt: 1, steps: 2}", JUDGE.replace("}", f", paraphrases: {{cat: [{'kitten ' * 4}]}}}}"),
                       "evaluation: the prompt 'kitten kitten kitten kitten' has 26 tokens"),
    "resolution": ("unlearning:", "diffusion: {resolution: 20}\nunlearning:",
                   "diffusion.resolution: 20 is no multiple of 8, as this pipeline needs; such as 16."),
    "misspelt": ("unlearning:", "unlearning:\n  trainable: cross_atention_kv", "did you mean 'cross_attention_kv'?"),
    "unmatched": ("unlearning:", "unlearning:\n  trainable: nothing", "nothing"),
    "no judge": ("{per_prompt: 1, steps: 2}", "{classifier: ./nowhere, axis: kind}", "evaluation.images.classifier: "),
    "no axis": ("{per_prompt: 1, steps: 2}", "{classifier: ./judge}", "evaluation.images.axis: give the column"),
    "axis of a built-in": ("{per_prompt: 1, steps: 2}", "{classifier: builtin:coloured_digits, axis: kind}",
                           "evaluation.images.axis: builtin:coloured_digits judges digit and colour, not 'kind'"),
    "a column that is not there": ("{per_prompt: 1, steps: 2}", JUDGE.replace("kind", "sort"),
                                   "it has none of the columns that the classifier knows, sort"),
    "no class of the judge": ("{caption: a cat, kind: cat}", "{caption: a cat, kind: catt}", "the classifier knows no kind 'catt'"),
    "near": ("{per_prompt: 1, steps: 2}", JUDGE.replace("}", ", near: [dogg]}"),
             "evaluation.images.near: the classifier knows no kind 'dogg'; did you mean 'dog'? It knows cat, dog"),
}  # fmt: skip


@pytest.fixture
def judge(folder):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], id2label={0: "cat, tabby", 1: "dog"})
    ResNetForImageClassification(config).save_pretrained(folder / "judge")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "judge")


@pytest.mark.parametrize("case", BEFORE_DRAWING)
def test_refused_before_anything_is_drawn(folder, case, judge, monkeypatch):
    old, new, message = BEFORE_DRAWING[case]
    stable_diffusion().save_pretrained(folder / "pipeline")
    monkeypatch.setattr(generated, "draw", lambda *args: pytest.fail("drawn"))
    text = RECIPE.replace("a bird]", "{caption: a bird, kind: dog}]")
    if case == "no class of the judge":
        text = text.replace("{per_prompt: 1, steps: 2}", JUDGE)
    old = old.replace("a bird]", "{caption: a bird, kind: dog}]")
    with pytest.raises(RecipeError) as caught:
        run_recipe(recipe(old, new, text), folder / "out")
    assert message in str(caught.value), caught.value


def logged(file: Path, name: str) -> list[float]:
    return [line[name] for line in map(json.loads, file.read_text().splitlines()) if name in line]


def test_ewc_holds_what_older_tasks_need_and_else_what_is_retained(folder):
    stable_diffusion().save_pretrained(folder / "pipeline")
    text = RECIPE.replace("  retain: {denoising: {}}", "  retain: {denoising: {}}\n  penalties: {ewc: {}}")
    text = text.replace("training: {max", "training: {logging_steps: 1, max")
    run_recipe(recipe(text=text), folder / "base")
    (file,) = (folder / "base").glob("requests/*/log.jsonl")
    assert logged(file, "loss/penalty/ewc")[1] > 0
    learns = "- learn: {task: cats, data: things, training: {max_steps: 1, use_cpu: true}}"
    tasks = text.replace("- unlearn: {name: cats, from: base, data: things, retain: others}", learns + "\n  " + learns.replace(
        "cats", "dogs").replace("things", "others").replace("steps: 1", "steps: 2, logging_steps: 1"))  # fmt: skip
    tasks = (
        tasks[: tasks.index("unlearning:")]
        + "learning:\n  penalties: {ewc: {}}\n"
        + tasks[tasks.index("evaluation:") :]
    )
    run_recipe(recipe(text=tasks), folder / "tasks")
    file = sorted((folder / "tasks").glob("requests/*/log.jsonl"))[1]
    assert logged(file, "loss/penalty/ewc")[1] > 0
    alone = text.replace(", retain: others", "").replace("  retain: {denoising: {}}\n", "  retain: {}\n")
    with pytest.raises(
        RecipeError, match="request 00-unlearn-cats: ewc holds what older tasks need, and there is neither"
    ):
        run_recipe(recipe(text=alone), folder / "alone")


def test_a_judge_is_loaded_once_for_all_stages(folder, judge, monkeypatch):
    stable_diffusion().save_pretrained(folder / "pipeline")
    made, text = [], RECIPE.replace(", a bird]", "]")
    loader = pipeline.judge_of
    monkeypatch.setattr(pipeline, "judge_of", lambda how: made.append(loader(how)) or made[-1])
    run_recipe(recipe("{per_prompt: 1, steps: 2}", JUDGE, text), folder / "out")
    results = json.loads((folder / "out" / "results.json").read_text())
    assert len(made) == 1 and len(results["stages"]) == 2
    assert results["stages"][1]["groups"]["forget"]["metrics"]["unlearning_accuracy"] in (0.0, 1.0)


@pytest.mark.parametrize("case", ["cut", "collision", "anchor", "same prompt"])
def test_refused_before_anything_is_measured_or_trained(folder, case):
    old, new, message = REFUSED[case]
    stable_diffusion().save_pretrained(folder / "pipeline")
    before = file_hashes(folder / "pipeline")
    with pytest.raises(RecipeError) as caught:
        run_recipe(recipe(old, new), folder / "out")
    assert message in str(caught.value)
    assert not (folder / "out" / "base").exists() and not (folder / "out" / "results.json").exists()
    assert file_hashes(folder / "pipeline") == before


def test_a_run_on_a_folder_and_its_refusals(folder):
    stable_diffusion().save_pretrained(folder / "pipeline")
    for kind, colour in (("cat", "red"), ("dog", "blue")):
        (folder / "pictures" / kind).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(folder / "pictures" / kind / "0.png")
    lines = RECIPE.splitlines()
    lines[5:7] = ["  things: {path: pictures, where: {class: cat}, caption: 'a {class}'}",
                  "  others: {path: pictures, where: {class: dog}}"]  # fmt: skip
    with pytest.raises(RecipeError, match="pictures have no captions, and prompts are what is measured"):
        run_recipe(recipe(text="\n".join(lines)), folder / "out")
    lines[6] = lines[5].replace("things", "others").replace("cat}", "dog}")
    chosen = recipe(text="\n".join(lines))
    Image.new("RGB", (20, 16)).save(folder / "pictures" / "dog" / "0.png")
    with pytest.raises(RecipeError, match="example others-1: the image has 16 x 20 pixels .* takes 16 x 16"):
        run_recipe(chosen, folder / "out")
    (folder / "pictures" / "dog" / "0.png").write_text("no picture")
    with pytest.raises(RecipeError, match="0.png cannot be read as an image"):
        run_recipe(chosen, folder / "out")
    assert not (folder / "out" / "base").exists()
    Image.new("RGB", (16, 16)).save(folder / "pictures" / "dog" / "0.png")
    run_recipe(chosen, folder / "out")
    (folder / "pictures").rename(folder / "moved")
    Path("r.yaml").write_text("\n".join(lines).replace("pictures", "moved"))
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "requests").rglob("*.safetensors")}
    run_recipe(load_recipe("r.yaml"), folder / "out")  # where pictures lie is no setting: nothing is trained again
    assert before and all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_pictures_are_learned_remembered_and_replayed(folder):
    """Prior preservation: what the model draws itself is learned first, and replayed beside a new concept."""
    stable_diffusion().save_pretrained(folder / "pipeline")
    (folder / "toys").mkdir()
    for i, colour in enumerate(("red", "blue")):
        Image.new("RGB", (16, 16), colour).save(folder / "toys" / f"{i}.png")
    head = RECIPE[: RECIPE.index("requests:")].replace("  others:", "  toys: {path: toys, caption: a toy}\n  others:")
    text = head + (
        "adapter: {r: 2, alpha: 2}\n"
        "memory: {size: 2}\n"
        "requests:\n"
        "  - learn: {task: prior, data: others}\n"
        "  - learn: {task: toys, data: toys}\n"
        "  - unlearn: {name: dogs, from: prior, where: {kind: dog}}\n"
        "learning: {memory: {denoising: {}}, conflict: sum}\n"
        "unlearning: {forget: {ascent: {}}, conflict: sum}\n"
        "training: {max_steps: 2, per_device_train_batch_size: 2, use_cpu: true}\n"
        "evaluation: {images: {per_prompt: 1, steps: 2}}\n"
    )
    text = text.replace(", a bird]", ", {caption: a bird, kind: bird}]")
    run_recipe(recipe(text=text), folder / "out")
    results = json.loads((folder / "out" / "results.json").read_text())
    examples = [stage["examples"] for stage in results["stages"][1:]]
    assert results["status"] == "complete"
    assert examples == [{"learn": 4}, {"learn": 2, "memory": 2}, {"forget": 2, "retain": 4}]
    assert (
        len(list((folder / "cache" / "generated").rglob("*.png"))) == 4
    )  # of `things`, which no request names, nothing


WORDS = ", paraphrases: {cat: [the cat, one cat]}}"


def test_a_run_reports_ua_under_paraphrases(folder, judge):
    stable_diffusion().save_pretrained(folder / "pipeline")
    asked = JUDGE.replace("per_prompt: 1", "per_prompt: 4").replace("}", WORDS)
    text = RECIPE.replace(", a bird]", "]").replace("{per_prompt: 1, steps: 2}", asked)
    run_recipe(recipe(text=text), folder / "out")
    results = json.loads((folder / "out" / "results.json").read_text())
    for stage, place in zip(results["stages"], ("base", "requests/00-unlearn-cats"), strict=True):
        rows = [json.loads(line) for line in (folder / "out" / place / "examples.jsonl").read_text().splitlines()]
        other = [row for row in rows if row["group"] == "paraphrased"]
        assert [row["caption"] for row in other] == ["the cat", "one cat"]
        shares = [sum(seen["kind"] != "cat" for seen in row["predicted"]) / 4 for row in other]
        found = stage["groups"]["paraphrased"]["metrics"]
        assert found["unlearning_accuracy"] == sum(shares) / 2
        assert found["worst_unlearning_accuracy"] == min(shares)
        assert not [name for name in found if "retain" in name]
        assert stage["groups"]["paraphrased"]["examples"] == 2
    assert results["stages"][1]["examples"] == {"forget": 2, "retain": 2}  # nothing is trained on them
    page = (folder / "out" / "report" / "report.html").read_text()
    assert "Paraphrased" in page and "UA, worst prompt" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "{classifier: ./judge, axis: kind, paraphrases: {dog: [the dog]}}",
            "'dog' is no kind that is to be forgotten; cat.",
        ),
        ("{classifier: ./judge, axis: kind, paraphrases: {cat: [the cat, a cat]}}", "'a cat' is a prompt of the data"),
        (
            "{classifier: ./judge, axis: kind, paraphrases: {cat: [the cat, the cat]}}",
            "give a list of different prompts",
        ),
        ("{paraphrases: {cat: [the cat]}}", "name the `classifier` that judges them and the `axis`"),
    ],
)
def test_paraphrases_that_are_none_are_refused_by_the_plan_too(folder, judge, given, message):
    stable_diffusion().save_pretrained(folder / "pipeline")
    with pytest.raises(RecipeError, match=message):
        plan_recipe(recipe("{per_prompt: 1, steps: 2}", given))
