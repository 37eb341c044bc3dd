"""A stream planned: which adapters train on which, what is remembered, what is gone, and how exact a deletion is. Nothing trains."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_clmul.data.memory import remembered
from hf_clmul.data.roles import derived_seed
from hf_clmul.data.shards import assign
from hf_clmul.data.sources import load_examples
from hf_clmul.errors import RecipeError
from hf_clmul.plan.exactness import why
from hf_clmul.plan.steps import Job, Step, plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe

PERSONS, EACH = "ABCD", 6


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("people.jsonl", [row(person, i) for person in PERSONS for i in range(EACH)])
    write("world.jsonl", [row("W", i) for i in range(4)])


def row(person: str, i: int, name: str | None = None) -> dict[str, str]:
    texts = {"question": f"Who is {person}, part {i}?", "answer": f"Answer {person}{i}."}
    return {"id": name or f"{person}{i}", "person": person, **texts}


def write(name: str, rows: list[dict[str, str]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe(*requests: str, adapter: str = "{r: 2}", memory: str = "null", more: str = "") -> Recipe:
    Path("r.yaml").write_text(f"""\
recipe_version: 1
name: streamed
model: {{path: some/model}}
adapter: {adapter}
memory: {memory}
data:
  people: {{path: people.jsonl}}
  twins: {{path: twins.jsonl}}
  world: {{path: world.jsonl}}
requests:
{"".join(f"  - {request}" + chr(10) for request in requests)}
{more}
""")
    if not Path("twins.jsonl").exists():
        write("twins.jsonl", [row("T", i) for i in range(2)])
    return load_recipe("r.yaml")


def learn(task: str, *more: str) -> str:
    """Of the person who has the task's name."""
    return f"learn: {{{', '.join([f'task: {task}, data: people, where: {{person: {task.upper()}}}', *more])}}}"


def unlearn(name: str, task: str, *more: str) -> str:
    return f"unlearn: {{{', '.join([f'name: {name}, from: {task}', *more])}}}"


def planned(*requests: str, **options: str) -> list[Step]:
    return plan_steps(recipe(*requests, **options))


def ids(rows: list[dict[str, Any]]) -> str:
    return " ".join(row["id"] for row in rows)


def of(person: str, *numbers: int) -> str:
    return " ".join(f"{person}{i}" for i in numbers or range(EACH))


def roles(job: Job | Step) -> dict[str, str]:
    return {role: ids(rows) for role, rows in job.roles.items()}


def message(*requests: str, **options: str) -> str:
    with pytest.raises(RecipeError) as caught:
        planned(*requests, **options)
    return str(caught.value)


ISOLATED = "isolated: true"
MEMORY = {"memory": "{size: 6}", "more": "learning: {memory: {nll: {}}}"}


# ---- jobs and the adapters that train ------------------------------------------------------------------------


def test_each_task_trains_its_own_adapter_on_the_frozen_older_ones():
    steps = planned(learn("a"), learn("b"), unlearn("some", "a", "ids: [A1, A4]"), learn("c"))
    jobs = [job for step in steps for job in step.jobs]
    assert [(job.adapter, job.active) for job in jobs] == [
        ("a", ("a",)), ("b", ("a", "b")), ("a", ("a", "b")), ("c", ("a", "b", "c")),
    ]  # fmt: skip
    assert [job.label for job in jobs] == ["learn-a", "learn-b", "unlearn-some", "learn-c"]
    assert [job.settings_of for job in jobs] == [0, 1, 2, 3]
    assert not any(job.fresh or job.part for job in jobs)
    assert [step.stack for step in steps] == [("a",), ("a", "b"), ("a", "b"), ("a", "b", "c")]
    assert [step.how for step in steps] == ["training", "training", "approximate", "training"]
    assert [step.name for step in steps] == ["00-learn-a", "01-learn-b", "02-unlearn-some", "03-learn-c"]
    assert not any(step.own or step.removed for step in steps)


@pytest.mark.parametrize("strategy", ["single", "slao"])
def test_tasks_may_share_one_adapter(strategy):
    steps = planned(learn("a"), learn("b"), unlearn("some", "a", "ids: [A1]"), adapter=f"{{strategy: {strategy}}}")
    assert [(*step.jobs[0].active, step.jobs[0].adapter) for step in steps] == [("stream", "stream")] * 3
    assert [step.stack for step in steps] == [("stream",)] * 3


def test_without_an_adapter_no_job_names_one():
    steps = planned(learn("a"), learn("b"), unlearn("some", "a", "ids: [A1]"), adapter="null")
    assert [(step.jobs[0].active, step.jobs[0].adapter, step.stack) for step in steps] == [((), None, ())] * 3


def test_the_same_request_again_has_a_seed_of_its_own_that_says_nothing_of_its_place():
    """A history without a deleted task has other indices and the same labels, and so the same seeds."""
    steps = planned(learn("secret", ISOLATED).replace("SECRET", "D"), learn("a"), learn("b"), learn("a"),
                    unlearn("x", "a", "ids: [A1]"))  # fmt: skip
    without = planned(learn("a"), learn("b"), learn("a"), unlearn("x", "a", "ids: [A1]"))
    labels = [[job.label for step in some for job in step.jobs] for some in (steps, without)]
    assert labels == [["learn-secret", *labels[1]], ["learn-a", "learn-b", "learn-a#2", "unlearn-x"]]
    assert [step.jobs[0].active for step in steps[1:]] == [step.jobs[0].active for step in without]


def test_a_kept_task_is_learned_again_in_its_own_adapter():
    more = "learn: {task: a, data: people, where: {person: [A, B]}}"
    steps = planned(learn("a"), learn("c"), more, unlearn("all", "a"))
    assert (steps[2].jobs[0].adapter, steps[2].jobs[0].active, steps[2].stack) == ("a", ("a", "c"), ("a", "c"))
    assert roles(steps[2]) == {"learn": f"{of('A')} {of('B')}"}
    # Rows that are learned twice are the task's once.
    assert roles(steps[3]) == {"forget": f"{of('A')} {of('B')}", "retain": of("C")}


# ---- what is unlearned, and from where -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "forget"),
    [
        ((), "0 1 2 3 4 5"),
        (("ids: [A4, A1, A4]",), "4 1"),
        (("where: {answer: [Answer A2., Answer A5.]}",), "2 5"),
        (("data: twins",), "0 3"),
    ],
    ids=["task", "ids", "where", "data"],
)
def test_rows_are_chosen_from_what_is_left_of_the_task(chosen, forget):
    write("twins.jsonl", [row("A", 3, "x"), row("A", 0, "y")])  # known by their text, not by their ids
    steps = planned(learn("a"), learn("b"), unlearn("some", "a", *chosen))
    gone = [int(i) for i in forget.split()]
    left = [i for i in range(EACH) if i not in gone]
    assert roles(steps[2])["forget"] == of("A", *gone)
    assert roles(steps[2])["retain"] == (f"{of('A', *left)} {of('B')}" if left else of("B"))
    assert list(steps[2].gone.values()) == ["some"] * len(gone)


def test_an_unlearn_request_meets_nothing_that_an_earlier_one_took():
    steps = planned(learn("a"), unlearn("one", "a", "ids: [A0, A1]"), unlearn("rest", "a"), learn("b"))
    assert roles(steps[2]) == {"forget": of("A", 2, 3, 4, 5)}
    again = [learn("a"), unlearn("one", "a", "ids: [A0, A1]"), unlearn("two", "a", "ids: [A1, A2]")]
    assert message(*again) == (
        "requests.2.unlearn.ids: 1 of the 2 ids were never learned in 'a', or are unlearned already, such as 'A1'; ids there: "
        "A2, A3, A4, A5, ..."
    )
    assert message(learn("a"), unlearn("one", "a"), unlearn("two", "a")) == (
        "requests.2.unlearn.from: nothing is left of 'a': it is unlearned already."
    )
    never = message(learn("a"), learn("b"), unlearn("x", "a", "ids: [A0, B3]"))
    assert never.startswith("requests.2.unlearn.ids: 1 of the 2 ids were never learned in 'a'") and "'B3'" in never


def test_data_that_was_unlearned_already_cannot_be_unlearned_again():
    write("twins.jsonl", [row("A", 3), row("A", 0)])
    assert message(learn("a"), unlearn("one", "a", "ids: [A0]"), unlearn("two", "a", "data: twins")).startswith(
        "requests.2.unlearn.data: 1 of the 2 examples of 'twins' were never learned in 'a'"
    )


@pytest.mark.parametrize(("filter", "how"), [("false", "approximate"), ("true", "filter")])
def test_what_the_base_knew_is_unlearned_through_an_adapter_of_its_own(filter, how):
    steps = planned(learn("a"), unlearn("w", "base", "data: world", f"filter: {filter}"), learn("b"))
    assert (steps[1].how, steps[1].jobs[0].adapter, steps[1].jobs[0].active) == (
        how, "unlearn-w", ("a", "unlearn-w"),
    )  # fmt: skip
    assert roles(steps[1]) == {"forget": of("W", 0, 1, 2, 3), "retain": of("A")}
    assert steps[2].jobs[0].active == ("a", "unlearn-w", "b")
    whole = planned(learn("a"), unlearn("w", "base", "data: world"), adapter="null")[1]
    assert (whole.jobs[0].adapter, whole.jobs[0].active) == (None, ())


def test_retain_data_may_be_named():
    steps = planned(learn("a"), unlearn("some", "a", "ids: [A1]", "retain: world"))
    assert roles(steps[1]) == {"forget": "A1", "retain": of("W", 0, 1, 2, 3)}
    write("world.jsonl", [row("A", 1, "w")])
    assert message(learn("a"), unlearn("some", "a", "ids: [A1]", "retain: world")).startswith(
        "requests.1.unlearn: forget and retain share 1 examples, such as "
    )
    later = message(learn("a"), unlearn("some", "a", "ids: [A1]"), unlearn("more", "a", "ids: [A2]", "retain: world"))
    assert later.startswith("requests.2.unlearn.retain: 1 of its 1 rows were unlearned by 'some', such as ")


def test_ids_that_are_not_unique_are_refused():
    write("twins.jsonl", [row("T", 0), row("T", 1, "T0")])
    assert message("learn: {task: t, data: twins}") == (
        "data.twins: two rows have the id 'T0', and a request to forget it would not know which. Give each row its own id, or "
        "drop the column `id`: rows are numbered then."
    )


# ---- tombstones ----------------------------------------------------------------------------------------------


def test_what_was_unlearned_is_not_learned_again_unless_its_tombstone_is_lifted():
    first = [learn("a"), unlearn("gone", "a", "ids: [A2, A3]"), learn("b")]
    assert message(*first, learn("a")) == (
        "requests.3.learn: 2 of its 6 rows were unlearned by 'gone', such as "
        '{"answer": "Answer A2.", "question": "Who is A, part 2?"}. Leave them out with `where` or `exclude`, or, '
        "if they may come back, say so: `lifts: [gone]`."
    )
    left_out = planned(*first, "learn: {task: a, data: people, where: {id: [A0, A1, B0]}}")
    assert ids(left_out[3].roles["learn"]) == "A0 A1 B0" and set(left_out[3].gone.values()) == {"gone"}
    steps = planned(*first, learn("a", "lifts: [gone]"), unlearn("again", "a", "ids: [A2]"))
    assert [len(step.gone) for step in steps] == [0, 2, 2, 0, 1]
    assert roles(steps[4]) == {"forget": "A2", "retain": f"{of('A', 0, 1, 3, 4, 5)} {of('B')}"}


def test_a_tombstone_holds_for_every_task_and_under_every_id():
    write("twins.jsonl", [row("A", 2, "other-id")])
    later = "learn: {task: t, data: twins}"
    assert message(learn("a"), unlearn("gone", "a", "ids: [A2]"), later).startswith(
        "requests.2.learn: 1 of its 1 rows were unlearned by 'gone'"
    )
    assert len(planned(learn("a"), unlearn("gone", "a", "ids: [A2]"), later[:-1] + ", lifts: [gone]}")) == 3


def test_lifting_one_tombstone_leaves_the_others():
    first = [learn("a"), unlearn("one", "a", "ids: [A0]"), unlearn("two", "a", "ids: [A1]")]
    assert "unlearned by 'two'" in message(*first, learn("a", "lifts: [one]"))
    assert len(planned(*first, learn("a", "lifts: [one, two]"))[3].roles["learn"]) == EACH


def test_the_base_has_tombstones_too():
    assert "were unlearned by 'w'" in message(
        learn("a"), unlearn("w", "base", "data: world"), "learn: {task: w, data: world}"
    )


# ---- memory --------------------------------------------------------------------------------------------------


def test_memory_holds_the_rows_of_learned_tasks_and_purges_what_is_unlearned():
    stream = recipe(learn("a"), learn("b"), unlearn("gone", "a", "ids: [A0, A1, A2, A3]"), learn("c"), **MEMORY)
    rows = load_examples(stream.data["people"], "people")
    by_person = {name.lower(): [row for row in rows if row["person"] == name] for name in PERSONS}
    seed = derived_seed(0, "memory")
    left = {"a": [row for row in by_person["a"] if row["id"] in ("A4", "A5")], "b": by_person["b"]}
    expected = [remembered({name: by_person[name] for name in names}, 6, seed) for names in ("a", "ab")]
    expected += [remembered(left, 6, seed), remembered({**left, "c": by_person["c"]}, 6, seed)]
    steps = plan_steps(stream)
    assert [dict(step.memory) for step in steps] == expected
    assert [{name: len(rows) for name, rows in step.memory.items()} for step in steps] == [
        {"a": 6}, {"a": 3, "b": 3}, {"a": 2, "b": 4}, {"a": 2, "b": 2, "c": 2},
    ]  # fmt: skip
    # A request replays what was remembered before it.
    replayed = [None, expected[0], None, expected[2]]
    assert [step.roles.get("memory") for step in steps] == [
        memory and [row for rows in memory.values() for row in rows] for memory in replayed
    ]


def test_memory_is_replayed_by_the_requests_that_have_terms_on_it():
    own = learn("b", "memory: {}")
    steps = planned(learn("a"), own, learn("c"), unlearn("gone", "a", "ids: [A0]"), **MEMORY)
    assert ["memory" in step.roles for step in steps] == [False, False, True, False]
    more = "unlearning: {memory: {nll: {}}}"
    steps = planned(learn("a"), learn("b"), unlearn("gone", "a", "ids: [A0]"), memory="{size: 12}", more=more)
    assert ["memory" in step.roles for step in steps] == [False, False, True]
    assert "A0" not in ids(steps[2].roles["memory"]) and len(steps[2].roles["memory"]) == 11  # purged first
    assert steps[2].jobs[0].roles == steps[2].roles


def test_memory_after_a_deletion_is_that_of_a_history_without_it():
    steps = planned(learn("a"), learn("b"), unlearn("gone", "b"), learn("c"), **MEMORY)
    never = planned(learn("a"), learn("c"), **MEMORY)
    assert steps[3].memory == never[1].memory and steps[3].roles["memory"] == never[1].roles["memory"]


# ---- isolated tasks ------------------------------------------------------------------------------------------


def test_an_isolated_task_meets_no_other():
    steps = planned(learn("a"), learn("b", ISOLATED), learn("c"), unlearn("some", "a", "ids: [A0]"), **MEMORY)
    assert [(step.jobs[0].adapter, step.jobs[0].active, step.jobs[0].fresh) for step in steps] == [
        ("a", ("a",), False), ("b", ("b",), True), ("c", ("a", "c"), False), ("a", ("a", "c"), False),
    ]  # fmt: skip
    assert [step.stack for step in steps] == [("a",), ("a",), ("a", "c"), ("a", "c")]
    assert [dict(step.own) for step in steps] == [{}, {"b": ("b",)}, {"b": ("b",)}, {"b": ("b",)}]
    assert [list(step.memory) for step in steps] == [["a"], ["a"], ["a", "c"], ["a", "c"]]
    assert "memory" not in steps[1].roles
    assert roles(steps[3]) == {"forget": "A0", "retain": f"{of('A', 1, 2, 3, 4, 5)} {of('C')}"}


def test_an_isolated_task_is_deleted_with_its_adapter():
    steps = planned(learn("a"), learn("b", ISOLATED), unlearn("gone", "b"), learn("c"))
    gone = steps[2]
    assert (gone.how, gone.jobs, gone.removed, dict(gone.own)) == ("exact by deletion", (), ("b",), {})
    assert roles(gone) == {"forget": of("B")} and set(gone.gone.values()) == {"gone"}
    assert steps[3].jobs[0].active == ("a", "c")
    assert "nothing is left of 'b'" in message(learn("b", ISOLATED), unlearn("x", "b"), unlearn("y", "b"))


def test_a_part_of_an_isolated_task_is_trained_again_without_the_rows():
    steps = planned(learn("b", ISOLATED), unlearn("some", "b", "ids: [B5, B0]"), unlearn("rest", "b"))
    (job,) = steps[1].jobs
    assert (steps[1].how, steps[1].removed, dict(steps[1].own)) == ("exact by partial retraining", (), {"b": ("b",)})
    assert (job.label, job.adapter, job.active, job.settings_of, job.fresh) == ("learn-b", "b", ("b",), 0, True)
    assert sorted(row["id"] for row in job.roles["learn"]) == of("B", 1, 2, 3, 4).split()
    # In the order of a hash of their ids, in which a history without the two has them too.
    assert job.roles["learn"] == [row for row in steps[0].jobs[0].roles["learn"] if row["id"] not in ("B5", "B0")]
    assert (steps[2].how, steps[2].removed) == ("exact by deletion", ("b",))
    assert roles(steps[2]) == {"forget": of("B", 1, 2, 3, 4)}


# Where the keyed hash puts the six rows of B in two shards of two slices, with the seed 0.
LAYOUT = {(0, 0): "B5", (0, 1): "B1 B4", (1, 0): "B2", (1, 1): "B0 B3"}
SHARDED = learn("b", ISOLATED, "shards: 2", "slices: 2")


def parts(step: Step) -> dict[str, tuple[str, tuple[str, ...], str]]:
    return {job.part: (job.adapter, job.active, ids(job.roles["learn"])) for job in step.jobs}


def test_a_divided_task_trains_each_slice_on_those_before_it_in_its_shard():
    cut = assign([row("B", i) for i in range(EACH)], 2, 2, derived_seed(0, "b", "shards"))
    assert {part: ids(rows) for part, rows in cut.items()} == LAYOUT
    (step,) = planned(SHARDED)
    assert parts(step) == {
        "shard0-slice0": ("bS0R0", ("bS0R0",), "B5"),
        "shard0-slice1": ("bS0R1", ("bS0R0", "bS0R1"), "B1 B4"),
        "shard1-slice0": ("bS1R0", ("bS1R0",), "B2"),
        "shard1-slice1": ("bS1R1", ("bS1R0", "bS1R1"), "B0 B3"),
    }
    assert [job.label for job in step.jobs] == [f"learn-b-{job.part}" for job in step.jobs]
    assert all(job.fresh for job in step.jobs)
    assert (step.stack, dict(step.own)) == ((), {"b": ("bS0R0", "bS0R1", "bS1R0", "bS1R1")})
    assert step.digests.keys() == {"learn", "parts"} and step.digests["parts"].keys() == parts(step).keys()


def test_a_deletion_retrains_the_slice_and_those_after_it_in_its_shard():
    first, second, third = planned(SHARDED, unlearn("x", "b", "ids: [B4]"), unlearn("y", "b", "ids: [B2]"))
    assert parts(second) == {"shard0-slice1": ("bS0R1", ("bS0R0", "bS0R1"), "B1")}
    assert second.removed == () and second.own == first.own
    # The first slice of the other shard is empty now: the second stands alone.
    assert parts(third) == {"shard1-slice1": ("bS1R1", ("bS1R1",), "B0 B3")}
    assert third.removed == ("bS1R0",) and dict(third.own) == {"b": ("bS0R0", "bS0R1", "bS1R1")}
    assert [step.how for step in (second, third)] == ["exact by partial retraining"] * 2


def test_the_last_rows_of_a_divided_task_go_with_their_adapters():
    steps = planned(SHARDED, unlearn("x", "b", "ids: [B0, B3]"), unlearn("y", "b"))
    assert (steps[1].how, steps[1].removed, steps[1].jobs) == ("exact by deletion", ("bS1R1",), ())
    assert (steps[2].how, steps[2].removed, dict(steps[2].own)) == (
        "exact by deletion", ("bS0R0", "bS0R1", "bS1R0"), {},
    )  # fmt: skip


def test_a_part_that_gets_no_row_has_no_adapter():
    (step,) = plan_steps(recipe(SHARDED, more="seed: 2"))
    assert {job.part: ids(job.roles["learn"]) for job in step.jobs} == {
        "shard0-slice0": "B1 B0", "shard0-slice1": "B3 B2 B5", "shard1-slice1": "B4",
    }  # fmt: skip
    assert step.jobs[2].active == ("bS1R1",)


def test_an_isolated_task_shares_no_row_with_another():
    write("twins.jsonl", [row("B", 1, "twin"), row("T", 0)])
    shared, apart = "learn: {task: t, data: twins}", f"learn: {{task: t, data: twins, {ISOLATED}}}"
    for first, second, isolated in (
        (learn("b", ISOLATED), shared, "b"),
        (learn("b", ISOLATED), apart, "t"),
        (learn("b"), apart, "t"),
    ):
        assert message(first, second) == (
            "requests.1.learn: 1 of its 2 rows are learned in 'b' too, such as "
            '{"answer": "Answer B1.", "question": "Who is B, part 1?"}, and '
            f"'{isolated}' is isolated: it shares no row with another task. Leave them out of one of the two, with `where` "
            "or `exclude`."
        )
    assert len(planned(learn("b"), shared)) == 2


@pytest.mark.parametrize("gone", ["", "ids: [twin]"], ids=["deleted", "retrained"])
def test_rows_that_other_weights_have_met_can_be_deleted_and_the_claim_is_no_longer_exact(gone):
    """They came back to an isolated task after a shared one had unlearned them."""
    write("twins.jsonl", [row("B", 1, "twin"), row("T", 0)])
    back = f"learn: {{task: t, data: twins, {ISOLATED}, lifts: [first]}}"
    stream = recipe(
        learn("b"), unlearn("first", "b", "ids: [B1]"), back, unlearn("then", "t", *filter(None, [gone])), learn("c")
    )
    steps = plan_steps(stream)
    assert steps[3].how == "approximate" and (steps[3].jobs == ()) is (gone == "")
    assert why(stream, steps, steps[3]) == (
        "t's own adapter goes, or is trained again without these rows, but other weights have met them too, so erasure is "
        "measured and not proved"
    )
    others = planned(learn("b"), unlearn("first", "b", "ids: [B1]"), back, unlearn("then", "t", "ids: [T0]"))
    assert others[3].how == "exact by partial retraining", "of these rows no other weights know"


def test_rows_of_an_isolated_task_that_were_kept_elsewhere_are_known_to_have_been_met():
    write("world.jsonl", [row("B", 1, "w")])
    kept = [learn("b", ISOLATED), learn("a"), unlearn("some", "a", "ids: [A0]", "retain: world")]
    assert planned(*kept, unlearn("gone", "b"))[3].how == "approximate"


@pytest.mark.parametrize("isolated", [True, False])
def test_no_row_with_a_forgotten_text_may_stay_anywhere(isolated):
    """Neither in its own task, under another id, nor in one that no retain term would meet."""
    no_retain = "unlearning: {retain: {}}"
    write("twins.jsonl", [row("B", 1), row("B", 2), row("B", 1, "twin")])
    twins = f"learn: {{task: t, data: twins{', ' + ISOLATED if isolated else ''}}}"
    with pytest.raises(
        RecipeError, match=r"^requests.1.unlearn: 1 rows that stay in 't' .* such as 'twin'.* in this request too"
    ):
        plan_steps(recipe(twins, unlearn("x", "t", "ids: [B1]"), more=no_retain))
    whole = plan_steps(recipe(twins, unlearn("x", "t", "ids: [B1, twin]"), more=no_retain))
    assert ids(whole[1].roles["forget"]) == "B1 twin"
    if isolated:
        return
    both = [twins, learn("b"), unlearn("x", "b", "ids: [B1]")]
    with pytest.raises(
        RecipeError, match="^requests.2.unlearn: 2 rows that stay in 't' .* such as 'B1'.* one of the two"
    ):
        plan_steps(recipe(*both, more=no_retain))
