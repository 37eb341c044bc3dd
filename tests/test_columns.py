"""What is evaluated after each request: a column for each task and each forgotten part, groups, and each example once."""

from pathlib import Path

import pytest
from test_stream_plan import ISOLATED, SHARDED, learn, of, recipe, row, unlearn, write

from hf_clmul.data.roles import derived_seed
from hf_clmul.data.sources import content
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.plan.columns import Column, Evaluated, columns, evaluated, groups
from hf_clmul.plan.steps import plan_steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("people.jsonl", [row(person, i) for person in "ABCD" for i in range(6)])
    write("world.jsonl", [row("W", i) for i in range(4)])


def ids(rows: list) -> str:
    return " ".join(sorted(row["id"] for row in rows))


def shown(found: list[Column]) -> list[tuple]:
    return [(c.name, c.kind, c.task, ids(c.rows), c.learned, c.forgotten) for c in found]


def planned(*requests: str, **options: str) -> list[tuple]:
    return shown(columns(plan_steps(recipe(*requests, **options))))


def measured(*requests: str, evaluation: str = "{}") -> Evaluated:
    stream = recipe(*requests, more=f"evaluation: {evaluation}")
    steps = plan_steps(stream)
    return evaluated(stream, steps, groups(stream, steps))


# ---- columns -------------------------------------------------------------------------------------------------


def test_a_task_has_a_column_of_what_stays_and_one_of_each_part_that_goes():
    found = planned(learn("a"), unlearn("one", "a", "ids: [A0, A1]"), learn("b"), unlearn("two", "a", "ids: [A4]"))
    assert found == [
        ("a", "task", "a", of("A", 2, 3, 5), (1,), ()),
        ("one", "forgotten", "a", "A0 A1", (1,), (2,)),
        ("two", "forgotten", "a", "A4", (1,), (4,)),
        ("b", "task", "b", of("B"), (3,), ()),
    ]


@pytest.mark.parametrize("more", ["", ISOLATED], ids=["shared", "isolated"])
def test_a_task_that_is_forgotten_whole_keeps_its_rows_and_says_when(more):
    assert planned(learn("a", *filter(None, [more])), learn("b"), unlearn("gone", "a")) == [
        ("a", "task", "a", of("A"), (1,), (3,)),
        ("b", "task", "b", of("B"), (2,), ()),
    ]


def test_a_task_forgotten_in_parts_until_nothing_is_left_has_only_the_parts():
    found = planned(learn("a"), unlearn("one", "a", "ids: [A0, A1]"), unlearn("rest", "a"))
    assert found == [
        ("one", "forgotten", "a", "A0 A1", (1,), (2,)),
        ("rest", "forgotten", "a", of("A", 2, 3, 4, 5), (1,), (3,)),
    ]


def test_what_is_learned_and_forgotten_again_and_again_is_one_column():
    back = learn("a", "lifts: [one]")
    found = planned(learn("a"), unlearn("one", "a"), back, unlearn("two", "a"))
    assert found == [("a", "task", "a", of("A"), (1, 3), (2, 4))]


def test_a_part_knows_the_stages_that_taught_its_rows_and_no_others():
    more = "learn: {task: a, data: people, where: {person: B}}"
    found = planned(learn("a"), more, unlearn("one", "a", "ids: [B0]"), unlearn("two", "a", "ids: [A0]"))
    assert found == [
        ("a", "task", "a", f"{of('A', 1, 2, 3, 4, 5)} {of('B', 1, 2, 3, 4, 5)}", (1, 2), ()),
        ("one", "forgotten", "a", "B0", (2,), (3,)),
        ("two", "forgotten", "a", "A0", (1,), (4,)),
    ]


def test_what_the_base_knew_was_learned_at_stage_nought():
    assert planned(learn("a"), unlearn("w", "base", "data: world")) == [
        ("a", "task", "a", of("A"), (1,), ()),
        ("w", "forgotten", "base", of("W", 0, 1, 2, 3), (0,), (2,)),
    ]


def test_a_part_with_the_name_of_a_task_is_told_apart():
    found = planned(learn("a"), learn("b"), unlearn("b", "a", "ids: [A0]"), unlearn("base", "b", "ids: [B0]"))
    assert [column[0] for column in found] == ["a", "unlearn-b", "b", "unlearn-base"]


def test_a_column_is_recorded_without_its_rows():
    column = Column("one", "forgotten", "a", [row("A", 0)], (1, 3), (2,))
    assert column.record() == {"name": "one", "kind": "forgotten", "task": "a", "learned": [1, 3], "forgotten": [2]}


# ---- what is measured ----------------------------------------------------------------------------------------


def test_forgotten_parts_are_measured_whole_and_the_others_by_a_fixed_sample():
    found = measured(learn("a"), unlearn("one", "a", "ids: [A0, A1, A2]"), learn("b"), evaluation="{max_examples: 2}")
    left = [row("A", i) for i in (3, 4, 5)]
    some = {name: fixed_sample(rows, 2, derived_seed("retain")) for name, rows in
            (("a", left), ("b", [row("B", i) for i in range(6)]))}  # fmt: skip
    by_name = {column.name: column.rows for column in found.columns}
    assert by_name == {**some, "one": [row("A", i) for i in (0, 1, 2)]}
    assert {name: len(texts) for name, texts in found.groups.items()} == {"forget": 3, "retain": 4}
    assert set(found.groups["retain"]) == {content(each) for rows in some.values() for each in rows}
    assert len(found.rows) == 7, "each example once"
    assert {found.task_of[text] for text in found.groups["forget"]} == {"a"}


def test_the_groups_of_examples_and_what_they_are_known_by():
    write("twins.jsonl", [row("T", 0), row("T", 1)])
    found = measured(learn("a"), unlearn("one", "a", "ids: [A0]"), evaluation="{held_out: twins, max_examples: 1}")
    (held_out,) = found.groups["held_out"]
    gone, kept = content(row("A", 0)), found.groups["retain"][0]
    assert [found.group(text) for text in (gone, kept, held_out)] == ["forget", "retain", "held_out"]
    assert found.key(gone) == "a/A0" and found.key(held_out) == f"held_out/{found.rows[held_out]['id']}"
    # The same id in two data sets is two examples.
    assert len({found.key(text) for text in found.rows}) == len(found.rows) == 3


def test_what_was_forgotten_and_learned_again_is_retained_and_keeps_its_columns():
    found = measured(learn("a"), unlearn("one", "a", "ids: [A0, A1]"), learn("a", "lifts: [one]"))
    assert found.groups.keys() == {"retain"}
    assert {column.name: ids(column.rows) for column in found.columns} == {"a": of("A", 2, 3, 4, 5), "one": "A0 A1"}
    assert {found.group(content(row("A", i))) for i in (0, 1)} == {"retain"}


def test_what_is_to_be_measured_changes_with_its_rows():
    """By this a stage that was measured knows whether anything is missing."""
    one, same, other = (
        measured(learn("a"), learn("b"), unlearn("one", "a", f"ids: [{name}]")).plain() for name in ("A0", "A0", "A1")
    )
    assert one == same != other


def test_isolated_tasks_are_measured_like_others():
    found = measured(SHARDED, unlearn("one", "b", "ids: [B1]"), learn("a"))
    assert [(c.name, ids(c.rows)) for c in found.columns] == [
        ("b", of("B", 0, 2, 3, 4, 5)), ("one", "B1"), ("a", of("A")),
    ]  # fmt: skip
    assert set(found.task_of.values()) == {"a", "b"}
