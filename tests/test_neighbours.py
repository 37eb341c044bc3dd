"""Near neighbours that nobody named: the choice by hand, what a plan and a run say of it, and what a data-free request retains."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tiny_pipelines import stable_diffusion
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.neighbours import candidates, nearest, similarities
from hf_clmul.plan.retained import known_prompts
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.runner import plan_recipe, run_recipe

KINDS = ("cat", "dog", "bird", "fox", "cow")
RECIPE = """\
recipe_version: 1
name: near
family: diffusion
model: {path: ./pipeline}
data:
  things: {path: generated, prompts: [{caption: a red cat, kind: cat}], images_per_prompt: 2, steps: 2}
  others:
    path: generated
    prompts: [{caption: a dog, kind: dog}, {caption: a bird, kind: bird}, {caption: a fox, kind: fox}, {caption: a cow, kind: cow}]
    images_per_prompt: 1
    steps: 2
requests:
  - unlearn: {name: cats, from: base, data: things}
unlearning:
  forget: {relabel: {anchor: {cat: dog}}}
  retain: {denoising: {}}
  conflict: sum
  training: {max_steps: 1, per_device_train_batch_size: 2, use_cpu: true}
evaluation: {images: {classifier: ./judge, axis: kind, per_prompt: 1, steps: 2}}
"""


def test_the_names_of_what_goes_and_of_what_stays():
    rows = [{"kind": "dog"}, {"kind": "cat"}, {"kind": "dog"}, {"caption": "a sea"}, {"kind": None}, {"kind": "fox"}]
    assert candidates(rows, [{"kind": "cat"}, {"kind": "cat"}], "kind") == (["cat"], ["dog", "fox"])
    assert candidates(rows, [{"caption": "a sea"}], "kind") == ([], ["dog", "cat", "fox"])


def test_similarities_by_hand():
    # means over positions (2, 0), (0, 2), (2, 0), (0, -2); their mean (1, 0), which is what all texts have in common
    gone = torch.tensor([[[4.0, 0], [0, 0]]])
    others = torch.tensor([[[0.0, 0], [0, 4]], [[2, 0], [2, 0]], [[0, -2], [0, -2]]])
    # (1, 0) with (-1, 2), (1, 0) and (-1, -2)
    assert similarities(gone, others) == pytest.approx([-(5**-0.5), 1.0, -(5**-0.5)])
    # of several that go the one that it is most like counts
    assert similarities(others[:2], others[2:]) == pytest.approx(similarities(others[[1, 0]], others[2:]))


def test_two_are_near_and_one_is_left_to_be_far():
    assert nearest({"a": 0.1, "b": 0.9, "c": 0.5, "d": -1.0}) == ("b", "c")
    assert nearest({"c": 0.5, "b": 0.5, "a": 0.5 - 1e-9}) == ("a", "b")  # ties by name
    assert nearest({"a": 0.1, "b": 0.9}) == ("b",) and nearest({"a": 0.1}) == ("a",)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "judge").mkdir()
    return tmp_path


@pytest.fixture
def models(folder):
    stable_diffusion().save_pretrained(folder / "pipeline")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], id2label=dict(enumerate(KINDS)))
    ResNetForImageClassification(config).save_pretrained(folder / "judge")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "judge")


def recipe(*changes: tuple[str, str]):
    text = RECIPE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml")


def by_text_embeddings() -> dict[str, float]:
    """Of each kind with "cat", worked out apart from the package."""
    pipeline = stable_diffusion()
    states = torch.stack([pipeline.encode_prompt([k], "cpu", 1, False)[0][0].double().mean(0).detach() for k in KINDS])
    states -= states.mean(0)
    return dict(zip(KINDS[1:], torch.nn.functional.cosine_similarity(states[1:], states[:1]).tolist(), strict=True))


def test_a_run_chooses_near_neighbours_and_says_so(folder, models, caplog):
    caplog.set_level(logging.INFO)
    plan = plan_recipe(recipe())
    assert plan[0]["notes"] == [
        "retain: none is named, so that it is the other prompts known from the recipe: 'a dog', 'a bird', 'a fox', 'a cow'",
        "near neighbours: up to 2 of dog, bird, fox, cow, whose text is most like that of cat to the model; a run chooses them "
        "when it has loaded it",
    ]
    run_recipe(recipe(), folder / "out")
    results = json.loads((folder / "out" / "results.json").read_text())
    wanted = by_text_embeddings()
    names = sorted(wanted, key=lambda name: -wanted[name])[:2]
    judged = results["judged"]
    assert (judged["near"], judged["near_from"], judged["axis"]) == (names, "text embeddings", "kind")
    assert judged["similarity"] == pytest.approx(wanted, abs=1e-4)
    assert f"near neighbours of cat, by the pipeline's text embeddings: {', '.join(names)}" in caplog.text
    assert "request 00-unlearn-cats: retain: none is named" in caplog.text
    assert results["stages"][1]["retains"] == plan[0]["notes"][0]
    assert results["stages"][1]["examples"] == {"forget": 2, "retain": 4}
    for stage in results["stages"]:
        rows = [
            json.loads(line) for line in (folder / "out" / _place(stage) / "examples.jsonl").read_text().splitlines()
        ]
        right = {row["kind"]: row["predicted"][0]["kind"] == row["kind"] for row in rows if row["group"] == "retain"}
        metrics = stage["groups"]["retain"]["metrics"]
        assert metrics["near_retain_accuracy"] == sum(right[name] for name in names) / 2
        assert metrics["far_retain_accuracy"] == sum(right[name] for name in right if name not in names) / 2


def _place(stage) -> str:
    return "base" if stage["kind"] == "base" else f"requests/{stage['stage']}"


def test_what_a_recipe_names_is_taken_and_none_is_none(folder, models):
    for given, near, source in (("[cow]", ["cow"], "recipe"), ("[]", [], "recipe")):
        run_recipe(recipe(("axis: kind", f"axis: kind, near: {given}")), folder / given)
        results = json.loads((folder / given / "results.json").read_text())
        assert (results["judged"]["near"], results["judged"]["near_from"]) == (near, source)
        assert results["judged"]["similarity"] is None
        found = results["stages"][0]["groups"]["retain"]["metrics"]
        assert (found["near_retain_accuracy"] is None) == (not near)


def captions(*changes: tuple[str, str]) -> list[str]:
    (step,) = plan_steps(recipe(*changes))
    return [row["caption"] for row in step.roles.get("retain", ())]


def test_what_is_retained_where_nothing_is_named(folder):
    known = ["a dog", "a bird", "a fox", "a cow"]
    assert captions() == known
    # near neighbours that the recipe names come first, in the request's own words and drawn as often
    near = ("axis: kind", "axis: kind, near: [dog, owl]")
    assert captions(near) == ["a red dog"] * 2 + ["a red owl"] * 2 + known
    assert captions(near, ("caption: a dog", "caption: a red dog")) == ["a red owl"] * 2 + ["a red dog", *known[1:]]
    # what is held out is not trained on, nor is what any request forgets
    assert captions(near, ("{images", "{held_out: others, images")) == ["a red dog"] * 2 + ["a red owl"] * 2
    other = ("data: things}", "data: things, retain: others}")
    assert captions(other) == known and plan_steps(recipe(other))[0].retains == ""


def test_no_prompt_that_is_forgotten_sooner_or_later_is_retained(folder):
    more = "  more: {path: generated, prompts: [a dog, a whale], images_per_prompt: 1, steps: 2}\nrequests:"
    later = "data: things}\n  - unlearn: {name: rest, from: base, data: others}"
    first, second = plan_steps(recipe(("requests:", more), ("data: things}", later)))
    for step in (first, second):
        assert [row["caption"] for row in step.roles["retain"]] == ["a whale"]


def test_where_nothing_is_known_it_is_refused(folder):
    alone = ("{images", "{held_out: others, images")
    with pytest.raises(
        RecipeError, match="requests.0.unlearn: nothing is known that is to stay.*`retain: others`; or keep"
    ):
        plan_steps(recipe(alone))
    (step,) = plan_steps(recipe(alone, ("retain: {denoising: {}}", "retain: {}")))
    assert list(step.roles) == ["forget"]


def test_names_with_underscores_are_found_as_words(folder):
    found = recipe(
        ("{caption: a red cat, kind: cat}", "{caption: a Van Gogh cat, kind: Van_Gogh}"),
        ("axis: kind", "axis: kind, near: [Paul_Klee]"),
    )
    rows = known_prompts(found, found.requests[0])
    assert (rows[0]["caption"], rows[0]["kind"]) == ("a Paul Klee cat", "Paul_Klee")
