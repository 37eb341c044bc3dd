"""The memory: quotas by hand, a uniform sample, and nothing left of what was purged."""

import datetime
import random

import pytest
from scipy.stats import chi2

from hf_clmul.data import memory
from hf_clmul.data.memory import quotas, remembered
from hf_clmul.errors import RunError


def rows(task, count, start=0):
    return [{"id": f"{task}-{i}", "question": f"{task} {i}?", "answer": str(i)} for i in range(start, start + count)]


def ids(kept):
    return {task: [row["id"] for row in of_task] for task, of_task in kept.items()}


@pytest.mark.parametrize(
    ("sizes", "total", "expected"),
    [
        ({"a": 10, "b": 10}, 6, {"a": 3, "b": 3}),
        ({"b": 10, "a": 10, "c": 10}, 8, {"b": 3, "a": 3, "c": 2}),  # the remainder to those learned first
        ({"a": 10, "b": 2, "c": 10}, 9, {"a": 4, "b": 2, "c": 3}),  # b leaves one place
        ({"a": 1, "b": 3, "c": 9}, 12, {"a": 1, "b": 3, "c": 8}),  # first a, then b is full
        ({"a": 4, "b": 4}, 8, {"a": 4, "b": 4}),
        ({"a": 2, "b": 3}, 64, {"a": 2, "b": 3}),
        ({"a": 5, "b": 0, "c": 5}, 3, {"a": 2, "b": 0, "c": 1}),
        ({"a": 5, "b": 5, "c": 5}, 2, {"a": 1, "b": 1, "c": 0}),
        ({"a": 5}, 0, {"a": 0}),
        ({}, 5, {}),
    ],
)
def test_quotas(sizes, total, expected):
    found = quotas(sizes, total)
    assert found == expected and list(found) == list(sizes)


def test_quotas_fill_the_memory_and_never_more():
    drawn = random.Random(0)
    for _ in range(300):
        sizes = {f"t{i}": drawn.randrange(12) for i in range(drawn.randrange(1, 7))}
        total = drawn.randrange(40)
        found = quotas(sizes, total)
        assert sum(found.values()) == min(total, sum(sizes.values()))
        assert all(found[task] <= sizes[task] for task in sizes)
        open_quotas = [found[task] for task in sizes if found[task] < sizes[task]]
        assert not open_quotas or max(found.values()) - min(open_quotas) <= 1  # nobody has more while another could
        assert open_quotas == sorted(open_quotas, reverse=True)


@pytest.mark.parametrize("arguments", [({"a": 3}, -1), ({"a": -3}, 1)])
def test_a_negative_size_is_refused(arguments):
    with pytest.raises(ValueError, match="0 or more"):
        quotas(*arguments)


def p_value(counts, seeds, kept):
    """Of the chi-square test that each of the rows is kept as often as any other, drawn without replacement."""
    count, share = len(counts), kept / len(counts)
    spread = sum((found - seeds * share) ** 2 for found in counts) / (seeds * share * (1 - share))
    return chi2.sf(spread * (count - 1) / count, count - 1)


def kept_counts(tasks, task, size, seeds):
    counts = {row["id"]: 0 for row in tasks[task]}
    for seed in range(seeds):
        for row in remembered(tasks, size, seed)[task]:
            counts[row["id"]] += 1
    return list(counts.values())


def test_every_row_of_a_task_is_kept_equally_often():
    tasks = {"a": rows("a", 20), "b": rows("b", 40)}
    for task, kept in (("a", 4), ("b", 3)):
        counts = kept_counts(tasks, task, 7, 1200)
        assert sum(counts) == 1200 * kept
        assert 0.001 < p_value(counts, 1200, kept) < 0.999
    # The test can fail: what keeps the first ten rows twice as often as the others is found out.
    assert p_value([320] * 10 + [160] * 10, 1200, 4) < 1e-12


def test_rows_learned_after_a_purge_are_kept_as_often_as_those_before_it():
    """A reservoir whose counter is lowered, or left, by a purge prefers one of the two."""
    after_purge = {"a": [*rows("a", 15, start=10), *rows("a", 15, start=100)]}
    counts = kept_counts(after_purge, "a", 6, 1200)
    assert p_value(counts, 1200, 6) > 0.001
    before, after = sum(counts[:15]), sum(counts[15:])
    assert before + after == 1200 * 6 and abs(before - after) < 3 * (1200 * 6 * 24 / 29) ** 0.5


def test_a_purge_leaves_the_memory_of_a_history_that_never_had_the_rows():
    a, b, c = rows("a", 30), rows("b", 30), rows("c", 5)
    never = {"b": rows("b", 24, start=6), "c": c}
    lived = {"a": a, "b": b, "c": c}
    before = remembered(lived, 12, seed=3)
    del lived["a"]  # a whole task, then some rows of another one
    lived["b"] = [row for row in lived["b"] if int(row["id"].removeprefix("b-")) >= 6]
    after = remembered(lived, 12, seed=3)
    assert after == remembered(never, 12, seed=3)
    gone = {f"b-{i}" for i in range(6)} | {row["id"] for row in a}
    assert gone & {name for names in ids(before).values() for name in names}  # some of them had been kept
    assert not gone & {name for names in ids(after).values() for name in names}


def test_every_place_holds_a_row_that_was_given():
    """The released code of UniCLUN fills purged places with zeros and replays them; here there are no such places."""
    tasks = {"a": rows("a", 9)}
    for size in (3, 9, 50):
        kept = remembered({"a": tasks["a"][4:]}, size, seed=0)["a"]
        assert len(kept) == min(size, 5)
        assert all(any(row is given for given in tasks["a"][4:]) for row in kept)


def test_order_of_rows_has_no_say_and_fewer_places_keep_the_first():
    tasks = {"a": rows("a", 40)}
    whole = ids(remembered(tasks, 40, seed=1))["a"]
    assert sorted(whole) == sorted(row["id"] for row in tasks["a"]) and whole != [row["id"] for row in tasks["a"]]
    for size in range(41):
        assert ids(remembered(tasks, size, seed=1))["a"] == whole[:size]
    assert remembered({"a": tasks["a"][::-1]}, 7, seed=1) == remembered(tasks, 7, seed=1)
    shared = {"a": tasks["a"][::2], "rest": tasks["a"][1::2]}  # as if two ranks had chosen: the smallest of both
    halves = remembered(shared, 40, seed=1)
    merged = [row for of_task in halves.values() for row in of_task]
    assert ids(remembered({"a": merged}, 7, seed=1))["a"] == whole[:7]


def test_another_seed_keeps_others():
    tasks = {"a": rows("a", 40)}
    assert remembered(tasks, 10, seed=1) != remembered(tasks, 10, seed=2)


def test_the_choice_is_the_same_everywhere():
    """Written down, so that neither another process nor another version chooses otherwise unnoticed."""
    assert ids(remembered({"a": rows("a", 12), "b": rows("b", 12)}, 5, seed=0)) == {
        "a": ["a-10", "a-7", "a-11"],
        "b": ["b-6", "b-0"],
    }


def test_a_memory_of_size_0_is_empty():
    assert remembered({"a": rows("a", 3), "b": []}, 0, seed=0) == {"a": [], "b": []}
    assert remembered({}, 5, seed=0) == {}


def test_two_rows_with_one_id_are_refused():
    with pytest.raises(ValueError, match="task 'a': 1 of its 3 rows have the id of another row"):
        remembered({"a": [*rows("a", 2), {"id": "a-1", "text": "other"}]}, 2, seed=0)


def test_what_is_written_comes_back(tmp_path):
    kept = remembered({"b": rows("b", 9), "a": rows("a", 9)}, 6, seed=5)
    kept["a"][0] |= {"answer": "two\nlines\u2028and Łódź", "turns": [{"role": "user", "content": "x"}], "task": "own"}
    memory.write(tmp_path / "memory", kept)
    found = memory.read(tmp_path / "memory")
    assert found == kept and list(found) == ["b", "a"]


def test_the_same_memory_has_the_same_bytes(tmp_path):
    memory.write(tmp_path, {"a": [{"id": "a-0", "text": "x", "n": 1}]})
    first = (tmp_path / "rows.jsonl").read_bytes()
    assert first == b'{"id": "a-0", "n": 1, "task": "a", "text": "x"}\n'
    memory.write(tmp_path, {"a": [{"n": 1, "text": "x", "id": "a-0"}]})
    assert (tmp_path / "rows.jsonl").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    memory.write(tmp_path, {"a": []})
    assert (tmp_path / "rows.jsonl").read_bytes() == b"" and memory.read(tmp_path) == {}


def test_a_date_becomes_text(tmp_path):
    memory.write(tmp_path, {"a": [{"id": "a-0", "text": "x", "day": datetime.date(2025, 3, 1)}]})
    assert memory.read(tmp_path) == {"a": [{"id": "a-0", "text": "x", "day": "2025-03-01"}]}


@pytest.mark.parametrize("content", [None, "{\n", "[]\n", '{"id": "a-0"}\n'])
def test_a_memory_that_cannot_be_read_is_no_empty_one(tmp_path, content):
    if content is not None:
        (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(RunError, match="rows.jsonl: the memory cannot be read"):
        memory.read(tmp_path)


def test_a_column_that_would_be_lost_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rename the column 'task column'"):
        memory.write(tmp_path, {"a": [{"id": "a-0", "text": "x", "task column": 1}]})
    assert not list(tmp_path.iterdir())
