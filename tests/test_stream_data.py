"""The built-in tasks of a stream: what their rows hold, and that the script still makes the files."""

import runpy
from collections import Counter

import pytest

from hf_clmul.data.sources import load_examples
from hf_clmul.paths import builtin_data
from hf_clmul.recipe.schema import Data

SIZES = {  # train, held out
    "support_intents": (84, 24),
    "table_bookings": (80, 20),
    "word_problems": (80, 20),
    "conflict_intents": (72, 18),
}
each = pytest.mark.parametrize("name", SIZES)


def split(name: str, which: str) -> list[dict]:
    return load_examples(Data(path=f"builtin:{name}", split=which), name)


@each
def test_the_script_makes_the_file_byte_for_byte(name, repo):
    script = runpy.run_path(str(repo / "scripts/make_stream_data.py"))
    assert script["lines"](name).encode() == builtin_data(name).read_bytes()


@each
def test_rows_are_unique_and_splits_apart(name):
    train, held_out = split(name, "train"), split(name, "held_out")
    assert (len(train), len(held_out)) == SIZES[name]
    for column in ("id", "question"):
        assert len({row[column] for row in [*train, *held_out]}) == sum(SIZES[name])
    for row in [*train, *held_out]:
        for text in (row["question"], row["answer"]):
            assert isinstance(text, str) and text.strip() == text != ""


def test_ids_are_unique_over_all_tasks():
    rows = [
        row for name in [*SIZES, "invented_people"] for which in ("train", "held_out") for row in split(name, which)
    ]
    assert len({row["id"] for row in rows}) == len(rows) == 398 + 320


@pytest.mark.parametrize(
    ("name", "classes", "train", "held_out"),
    [("support_intents", 12, 7, 2), ("word_problems", 4, 20, 5), ("conflict_intents", 6, 12, 3)],
)
def test_classes_are_of_one_size(name, classes, train, held_out):
    for which, size in (("train", train), ("held_out", held_out)):
        assert list(Counter(row["class"] for row in split(name, which)).values()) == [size] * classes


def test_an_intent_is_its_own_answer():
    assert all(row["answer"] == row["class"] for row in split("support_intents", "train"))


def test_bookings_are_of_other_people_in_each_split():
    train, held_out = (
        {row["answer"].split(",")[0] for row in split("table_bookings", s)} for s in ("train", "held_out")
    )
    assert len(train) == 80 and len(held_out) == 20 and not train & held_out


def test_a_booking_repeats_name_and_day_of_its_message():
    for row in split("table_bookings", "train"):
        name, day, time, guests = row["answer"].split(", ")
        assert all(part in row["question"] for part in (*name.split(), day)) and row["class"] == day
        assert time[2:] in (":00", ":30") and 17 <= int(time[:2]) <= 20 and 2 <= int(guests.split()[0]) <= 9


def test_word_problems_are_calculated_right():
    signs = {"plus": "+", "minus": "-", "times": "x", "divided by": "/"}
    values = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__, "/": int.__floordiv__}
    for which in ("train", "held_out"):
        for row in split("word_problems", which):
            a, sign, b, equals, result, things = row["answer"].split()
            assert (sign, equals) == (signs[row["class"]], "=")
            assert values[sign](int(a), int(b)) == int(result) > 1
            assert sign != "/" or int(a) % int(b) == 0
            assert {a, b, things} <= set(row["question"].replace(".", " ").replace("?", " ").split())


def test_the_parts_of_the_conflict_stream_contradict_each_other():
    """Each message comes once in each part, and no two parts send it to the same queue."""
    for which in ("train", "held_out"):
        queues: dict[str, dict[str, str]] = {}
        for row in split("conflict_intents", which):
            desk, message = row["question"].split(" desk: ")
            assert desk == row["part"]
            queues.setdefault(message, {})[desk] = row["answer"]
        assert all(set(of) == {"elm", "ash", "oak"} and len(set(of.values())) == 3 for of in queues.values())
        assert len(queues) == SIZES["conflict_intents"][which == "held_out"] / 3
