"""What an audit says of examples that are not in `model/`: deleted exactly, left in an adapter that is not exported, never learned.
Nothing is trained, and no model is opened."""

from pathlib import Path

import pytest
import torch
from test_stream_plan import ISOLATED, SHARDED, learn, recipe, row, unlearn, write

from hf_clmul.plan.exported import exported
from hf_clmul.plan.steps import plan_steps
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


def test_what_is_exported():
    planned = recipe(learn("a"), learn("b", ISOLATED), unlearn("w", "base", "data: world"), more="export: {tasks: [b]}")
    assert exported(planned, plan_steps(planned)) == ("b", "unlearn-w")
