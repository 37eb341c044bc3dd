"""What descends from erased rows, what an exact erasure would take, and the one sentence that says so."""

from pathlib import Path

import pytest
from test_stream_plan import ISOLATED, SHARDED, learn, recipe, row, unlearn, write

from hf_clmul.data.sources import content
from hf_clmul.plan.exactness import closure, exact_instead, why
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("people.jsonl", [row(person, i) for person in "ABCD" for i in range(6)])
    write("world.jsonl", [row("W", i) for i in range(4)])


MORE = "training: {per_device_train_batch_size: 2, num_train_epochs: 1}\nunlearning: {training: {max_steps: 5}}\n"


def stream(*requests: str, more: str = "", **options: str) -> Recipe:
    return recipe(*requests, more=MORE + more, **options)


def descends(planned: Recipe, person: str, *numbers: int) -> list[str]:
    return closure(planned, plan_steps(planned), [content(row(person, i)) for i in numbers]).artefacts


def reasons(planned: Recipe) -> list[str]:
    steps = plan_steps(planned)
    return [why(planned, steps, step) for step in steps]


# ---- the closure ---------------------------------------------------------------------------------------------


WORKED = (learn("a"), learn("b", ISOLATED), learn("c"), unlearn("some", "c", "ids: [C0]"))


def test_an_isolated_task_reaches_its_own_adapter_and_no_other():
    assert set(descends(stream(*WORKED), "B", 0)) == {"b after 01-learn-b", "adapters/b"}


def test_a_shared_task_reaches_what_stood_on_it():
    """Of the first task everything shared; of the second what came from it, and not what was there before."""
    assert set(descends(stream(*WORKED), "A", 0)) == {
        "a after 00-learn-a", "c after 02-learn-c", "c after 03-unlearn-some", "adapters/a", "adapters/c", "model/",
    }  # fmt: skip
    assert set(descends(stream(*WORKED), "C", 0)) == {
        "c after 02-learn-c", "c after 03-unlearn-some", "adapters/c", "model/",
    }  # fmt: skip


def test_parents_come_before_their_children():
    found = descends(stream(*WORKED), "A", 0)
    for earlier, later in (("a after 00-learn-a", "c after 02-learn-c"),
                           ("c after 02-learn-c", "c after 03-unlearn-some"),
                           ("c after 03-unlearn-some", "model/")):  # fmt: skip
        assert found.index(earlier) < found.index(later)


def test_retained_rows_reach_the_request_that_retained_them():
    """Nobody has learned the row, and the request keeps the model's answer to it."""
    planned = stream("learn: {task: w, data: world}", unlearn("gone", "w", "ids: [W0]", "retain: people"))
    assert "w after 01-unlearn-gone" in descends(planned, "A", 1)
    assert "w after 00-learn-w" not in descends(planned, "A", 1)


def test_replayed_rows_reach_the_memory_and_what_replays_them():
    """With a place for every row, memory holds the row until its request purges it."""
    requests = (learn("a"), learn("b"), unlearn("gone", "a", "ids: [A0]"))
    planned = stream(*requests, memory="{size: 24}", more="learning: {memory: {nll: {}}}")
    found = descends(planned, "A", 0)
    assert [name for name in found if name.startswith("memory")] == [
        "memory after 00-learn-a",
        "memory after 01-learn-b",
    ]


def test_one_model_trained_whole_descends_from_everything_before():
    planned = stream(learn("a"), learn("b"), adapter="null")
    assert set(descends(planned, "A", 0)) == {"the model after 00-learn-a", "the model after 01-learn-b", "model/"}
    assert set(descends(planned, "B", 0)) == {"the model after 01-learn-b", "model/"}


def test_a_moving_average_goes_from_request_to_request():
    averaged = stream(learn("a"), learn("b", ISOLATED), learn("c"), more="teacher: ema")
    found = descends(averaged, "A", 0)
    assert [name for name in found if "average" in name] == [
        "moving average after 00-learn-a", "moving average after 02-learn-c",
    ]  # fmt: skip
    assert not [name for name in descends(averaged, "B", 0) if "average" in name or name.startswith("c ")]


def test_of_a_divided_task_the_slice_and_those_after_it_in_its_shard():
    assert set(descends(stream(SHARDED), "B", 5)) == {
        "bS0R0 after 00-learn-b/shard0-slice0", "bS0R1 after 00-learn-b/shard0-slice1", "adapters/b", "model/",
    }  # fmt: skip
    assert set(descends(stream(SHARDED), "B", 4)) == {
        "bS0R1 after 00-learn-b/shard0-slice1", "adapters/b", "model/",
    }  # fmt: skip


@pytest.mark.parametrize("more", [learn("b", ISOLATED), SHARDED])
def test_after_an_exact_deletion_nothing_that_is_left_descends_from_the_rows(more):
    planned = stream(learn("a"), more, unlearn("some", "b", "ids: [B4]"), learn("c"))
    left = {name for step in plan_steps(planned) for name in step.stack}
    found = descends(planned, "B", 4)
    assert found and all(name.startswith("b") and "01-learn-b" in name for name in found), found
    assert not left & {name.split()[0] for name in found}


def test_what_nobody_learned_has_no_descendants():
    assert descends(stream(*WORKED), "D", 0) == []


# ---- what exactness would take -------------------------------------------------------------------------------


def test_the_trainings_that_would_have_to_be_done_again():
    planned = stream(learn("a"), learn("b"), learn("c"), unlearn("some", "b", "ids: [B0]"), learn("d"))
    steps = plan_steps(planned)
    # Six rows in batches of two are three steps for each of the two; the request itself, and what follows, do not count.
    assert exact_instead(planned, steps, steps[3]) == (["b after 01-learn-b", "c after 02-learn-c"], 6)


def test_an_earlier_unlearn_request_would_be_done_again_with_its_own_settings():
    planned = stream(learn("a"), unlearn("one", "a", "ids: [A0]"), unlearn("two", "a", "ids: [A1]"))
    steps = plan_steps(planned)
    assert exact_instead(planned, steps, steps[2]) == (["a after 00-learn-a", "a after 01-unlearn-one"], 3 + 5)


def test_what_the_base_knew_would_need_another_base():
    planned = stream(learn("a"), unlearn("w", "base", "data: world"))
    steps = plan_steps(planned)
    assert exact_instead(planned, steps, steps[1]) == ([], 0)


# ---- the reason ----------------------------------------------------------------------------------------------


def test_the_reason_of_each_kind_of_request():
    planned = stream(
        learn("a"), learn("b", ISOLATED), learn("c"), learn("a"), unlearn("some", "a", "ids: [A0]"),
        unlearn("part", "b", "ids: [B0]"), unlearn("gone", "b"), unlearn("w", "base", "data: world"),
        SHARDED.replace("task: b", "task: d").replace("person: B", "person: D"), unlearn("one", "d", "ids: [D0]"),
    )  # fmt: skip
    measured = "its weights have seen the forget data, so erasure is measured and not proved"
    found = reasons(planned)
    assert found[:9] == [
        "new adapter",
        "isolated: a new adapter that meets no other task, so that to delete it is exact",
        "new adapter on 1 frozen",
        "the task's adapter is trained further in place",
        f"the task's adapter is trained further in place; {measured}",
        "b is isolated: 1 of its 1 parts met these rows or an adapter that did, and are trained again without them (b)",
        "b is isolated: what learned these rows is deleted, and nothing else has met them",
        f"a new adapter is trained, and merged when exported; {measured}",
        # One of the four parts gets no row; (1 / S) (R + 1) / (2 R) = 3 / 8.
        "isolated, 3 adapters (2 shards of 2 slices): to delete one row later trains 38% of it again, on average",
    ]
    assert found[9].startswith("d is isolated: ") and " of its 3 parts met these rows" in found[9]


def test_the_reason_without_adapters_and_of_a_filter():
    whole = stream(learn("a"), unlearn("some", "a", "ids: [A0]"), unlearn("rest", "a"), adapter="null")
    assert reasons(whole) == [
        "all weights are trained",
        "all weights are trained further; its weights have seen the forget data, so erasure is measured and not proved",
        "nothing else was learned: there is no retain data",
    ]
    hidden = stream(learn("a"), unlearn("w", "base", "data: world", "filter: true"))
    assert reasons(hidden)[1] == "an adapter hides what the base still knows; whoever switches it off has it back"
