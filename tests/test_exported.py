"""What an audit says of examples that are not in `model/`: deleted exactly, left in an adapter that is not exported, never learned.
Nothing is trained, and no model is opened."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from test_stream_plan import ISOLATED, SHARDED, learn, recipe, row, unlearn, write

from hf_clmul.plan.exported import exported
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.audit_families import Prepared, prepared

TWO, ALONE = unlearn("two", "a", "ids: [A0, A1]"), unlearn("gone", "b")
REPLAY = "learning: {memory: {nll: {}}}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("people.jsonl", [row(person, i) for person in "ABCD" for i in range(6)])
    write("world.jsonl", [row("W", i) for i in range(4)])


def ready(*requests: str, **options: str) -> Prepared:
    planned = recipe(*requests, **options)
    return prepared(planned, plan_steps(planned), torch.device("cpu"))


def attacked(found: Prepared) -> list[str]:
    return [example["id"] for example in found.data.forget]


@pytest.mark.parametrize(
    ("requests", "options"),
    [
        ((learn("a"), learn("b", ISOLATED), TWO), {}),
        ((learn("a"), TWO), {"adapter": "null"}),
        (
            (learn("a"), learn("c"), TWO),
            {"more": REPLAY + "export: {tasks: [c]}", "memory": "{size: 12}"},
        ),  # c met all of a
    ],
)
def test_what_the_model_met_is_attacked_without_a_word(requests, options):
    found = ready(*requests, **options)
    assert (attacked(found), found.scope, found.held) == (["A0", "A1"], [], True)


@pytest.mark.parametrize(
    ("requests", "options", "why"),
    [
        ((learn("a"), learn("b", ISOLATED), ALONE), {}, "gone is exact by deletion"),
        ((learn("b", ISOLATED), ALONE), {}, "gone is exact by deletion"),  # model/ is the base
        ((SHARDED, unlearn("one", "b", "ids: [B0]")), {}, "one is exact by partial retraining"),
        (
            (learn("a"), learn("b", ISOLATED), TWO),
            {"more": "export: {tasks: [b]}"},
            "they were learned in adapters/a, which the model does not have and which is not attacked",
        ),
        ((learn("a"),), {"more": "evaluation: {forget: world}"}, "no request learned or unlearned them"),
    ],
)
def test_where_the_model_met_none_all_are_asked_and_the_reason_is_told(requests, options, why):
    found = ready(*requests, **options)
    assert not found.held and attacked(found)
    assert found.scope == [
        f"What the run trained into the attacked model never met the forgotten examples: {why}. What follows does not show that they "
        "were forgotten, or stay so: it is how a model behaves that was not trained on them."
    ]


def test_where_the_model_met_some_only_these_are_attacked():
    later = unlearn("three", "c", "ids: [C0]")
    found = ready(learn("a"), TWO, learn("c"), later, more="export: {tasks: [c]}")
    assert (attacked(found), found.held) == (["C0"], True)
    assert found.scope == [
        "2 of 3 forgotten examples are not attacked, as what the run trained into the model never met them: they were learned in "
        "adapters/a, which the model does not have and which is not attacked."
    ]


def test_a_filter_says_that_it_is_one_and_whether_it_is_there():
    hidden = unlearn("w", "base", "data: world", "filter: true")
    there, gone = ready(learn("a"), hidden), ready(learn("a"), hidden, more="export: {tasks: [a]}")
    assert there.scope[0].startswith("w is a filter: nothing was erased") and there.about["filter"]
    assert gone.scope == [
        "w is a filter, and its adapter is not in the attacked model: nothing hides its examples there."
    ]
    assert not gone.about["filter"] and there.held and gone.held and len(attacked(gone)) == 4


def test_what_evaluation_forget_alone_names_is_attacked_where_the_base_unlearned():
    world, hidden = "evaluation: {forget: world}", unlearn("p", "base", "data: twins")
    found = ready(hidden, more=world)
    assert (attacked(found), found.held) == (["T0", "T1", *(f"W{i}" for i in range(4))], True)
    assert found.scope == [
        "4 of 6 attacked examples are named by evaluation.forget alone: no request had them. What the base model knew of them was "
        "unlearned through others, if at all."
    ]
    found = ready(learn("a"), TWO, more=world)
    assert (attacked(found), found.held) == (["A0", "A1"], True)
    assert found.scope == [
        "4 of 6 forgotten examples are not attacked, as what the run trained into the model never met them: no request learned or "
        "unlearned them, and none was to unlearn what the base model may know of them."
    ]


PICTURES = """\
recipe_version: 1
name: drawn
family: diffusion
model: {path: some/pipeline}
adapter: {r: 2}
data:
  cats: {path: cats, caption: "a {class}"}
  dogs: {path: dogs, caption: "a {class}"}
  birds: {path: birds, caption: "a {class}"}
requests:
"""
JUDGED = "evaluation: {images: {classifier: builtin:coloured_digits, axis: class}}\n"


def ready_pictures(*requests: str, more: str = "") -> Prepared:
    for folder, names in {"cats": ("cat", "lynx"), "dogs": ("dog",), "birds": ("bird",)}.items():
        for name in names:
            (Path(folder) / name).mkdir(parents=True, exist_ok=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (len(name), i, 0)).save(Path(folder) / name / f"{i}.png")
    text = PICTURES + "".join(f"  - {request}\n" for request in requests) + JUDGED + more
    Path("p.yaml").write_text(text)
    planned = load_recipe("p.yaml")
    return prepared(planned, plan_steps(planned), torch.device("cpu"))


def test_of_pictures_the_prompts_that_the_model_met_are_attacked():
    cats, dogs = "learn: {task: c, data: cats}", "learn: {task: d, data: dogs}"
    lynx = "unlearn: {name: l, from: c, where: {class: lynx}}"
    found = ready_pictures(cats, dogs, lynx)
    assert (attacked(found), found.scope, found.held) == (["a lynx"], [], True)
    found = ready_pictures(
        cats, lynx, dogs, "unlearn: {name: n, from: d, where: {class: dog}}", more="export: {tasks: [d]}"
    )
    assert (attacked(found), found.held) == (["a dog"], True)
    assert found.scope == [
        "1 of 2 forgotten prompts are not attacked, as what the run trained into the model never met them: they were learned in "
        "adapters/c, which the model does not have and which is not attacked."
    ]


def test_of_pictures_a_deletion_and_a_filter_are_told():
    cats, dogs = "learn: {task: c, data: cats, isolated: true}", "learn: {task: d, data: dogs}"
    found = ready_pictures(cats, dogs, "unlearn: {name: gone, from: c}")
    assert (attacked(found), found.held) == (["a cat", "a lynx"], False)
    assert found.scope == [
        "What the run trained into the attacked model never met the forgotten prompts: gone is exact by deletion. What follows does "
        "not show that they were forgotten, or stay so: it is how a model behaves that was not trained on them."
    ]
    hidden = ready_pictures(dogs, "unlearn: {name: b, from: base, data: birds, filter: true}")
    assert attacked(hidden) == ["a bird"] and hidden.held
    assert hidden.scope[0].startswith("b is a filter: nothing was erased")


def test_what_is_exported():
    planned = recipe(learn("a"), learn("b", ISOLATED), unlearn("w", "base", "data: world"), more="export: {tasks: [b]}")
    assert exported(planned, plan_steps(planned)) == ("b", "unlearn-w")
