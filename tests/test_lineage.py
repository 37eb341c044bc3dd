"""The closure of a deletion, worked out by hand: a stream with a memory, a teacher, an isolated task and an export."""

import itertools
import random

import pytest

from hf_clmul.plan.lineage import Lineage, Node


def stream():
    """Learn people (some rows go), notes isolated, maths with replay and a teacher; export the merge and notes."""
    return [
        Node("people/kept", "data"),
        Node("people/gone", "data"),
        Node("notes", "data"),
        Node("maths", "data"),
        Node("adapter people", "adapter", ("people/kept", "people/gone")),
        Node("memory after people", "memory", ("people/kept", "people/gone")),
        Node("adapter notes", "adapter", ("notes",)),  # isolated: no memory, no teacher
        Node("teacher of maths", "teacher", ("adapter people",)),
        Node("top-k of the memory", "cache", ("memory after people", "teacher of maths")),
        Node("adapter maths", "adapter", ("maths", "memory after people", "teacher of maths", "top-k of the memory")),
        Node("memory after maths", "memory", ("memory after people", "maths")),
        Node("merge", "merge", ("adapter people", "adapter maths")),
        Node("model", "export", ("merge",)),
        Node("adapters/notes", "export", ("adapter notes",)),
    ]


def names(nodes):
    return [node.name for node in nodes]


def test_an_isolated_task_is_gone_with_its_adapter():
    assert names(Lineage(stream()).closure(["notes"])) == ["adapter notes", "adapters/notes"]


def test_rows_that_were_replayed_reach_later_tasks():
    found = Lineage(stream()).closure(["people/gone"])
    assert set(names(found)) == {
        "adapter people",
        "memory after people",
        "teacher of maths",
        "top-k of the memory",
        "adapter maths",
        "memory after maths",
        "merge",
        "model",
    }
    assert {node.kind for node in found} == {"adapter", "memory", "teacher", "cache", "merge", "export"}


def test_the_last_task_reaches_only_what_came_after_it():
    expected = {"adapter maths", "memory after maths", "merge", "model"}
    assert set(names(Lineage(stream()).closure(["maths"]))) == expected
    assert set(names(Lineage(stream()).closure(["maths", "notes"]))) == expected | {"adapter notes", "adapters/notes"}


def test_what_nothing_was_made_from_has_an_empty_closure():
    lineage = Lineage([*stream(), Node("held out", "data")])
    assert lineage.closure(["held out"]) == [] and lineage.closure([]) == [] and lineage.closure(["model"]) == []


def test_a_named_descendant_of_a_named_one_is_not_listed_but_followed():
    found = names(Lineage(stream()).closure(["people/gone", "adapter maths"]))
    assert "adapter maths" not in found and "merge" in found


def test_parents_come_before_children_however_the_nodes_are_given():
    drawn = random.Random(0)
    nodes = stream()
    expected = set(names(Lineage(nodes).closure(["people/gone"])))
    for _ in range(30):
        drawn.shuffle(nodes)
        found = Lineage(nodes).closure(["people/gone"])
        place = {node.name: i for i, node in enumerate(found)}
        assert set(place) == expected and len(found) == len(expected)
        assert all(place[p] < place[node.name] for node in found for p in node.parents if p in place)


def test_the_order_of_the_question_has_no_say():
    chain = [Node(str(i), "data") for i in range(4)] + [Node(f"a{i}", "adapter", (str(i),)) for i in range(4)]
    for some in itertools.permutations("0123", 3):
        assert names(Lineage(chain).closure(some)) == [f"a{i}" for i in sorted(some)]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node("a", "data"), Node("a", "cache")], "two artefacts are called 'a'"),
        ([Node("a", "adapters")], "artefact 'a': expected a kind of data, .*, cache, found 'adapters'"),
        ([Node("a", "data"), Node("b", "adapter", ("a", "c"))], "'b' descends from 'c'; there are: a, b"),
        ([Node("a", "merge", ("b",)), Node("b", "merge", ("a",))], "descend from themselves: [ab] -> [ab] -> [ab]"),
        ([Node("a", "merge", ("a",))], "descend from themselves: a -> a"),
    ],
)
def test_a_graph_that_makes_no_sense_is_refused(nodes, message):
    with pytest.raises(ValueError, match=message):
        Lineage(nodes)


def test_an_unknown_name_has_no_closure():
    with pytest.raises(ValueError, match="there is no artefact called 'notse'; there are: adapter maths, "):
        Lineage(stream()).closure(["notes", "notse"])
