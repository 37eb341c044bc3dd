"""UA, IRA and CRA of a table whose right answers are counted by hand, and what is absent."""

import pytest

from hf_clmul.evaluation.images.metrics import (
    METRICS,
    Share,
    Target,
    measure_target,
    unlearning_accuracy,
    worst_unlearning_accuracy,
)

SEVEN = Target("digit", ["seven"], near=["one"])
FIELDS = ("unlearning_accuracy", "near_retain_accuracy", "far_retain_accuracy", "cross_retain_accuracy")


def rows(*found: tuple[str, str, str, str]) -> list[dict]:
    """(digit and colour asked for, digit and colour seen)"""
    return [{
        "prompt": f"a {colour} {digit}", "seed": i, "labels": {"digit": digit, "colour": colour},
        "predicted": {"digit": seen, "colour": seen_colour},
    } for i, (digit, colour, seen, seen_colour) in enumerate(found)]  # fmt: skip


TABLE = rows(
    ("seven", "red", "one", "red"),  # forgotten
    ("seven", "red", "seven", "green"),  # not forgotten; its wrong colour counts nowhere
    ("seven", "green", "two", "green"),
    ("seven", "green", "three", "green"),
    ("one", "red", "one", "red"),
    ("one", "green", "seven", "red"),
    ("two", "red", "two", "red"),
    ("two", "green", "two", "green"),
    ("three", "red", "eight", "red"),
)


def test_shares_are_those_counted_by_hand():
    found = measure_target(TABLE, SEVEN)
    assert tuple(found) == FIELDS
    assert found["unlearning_accuracy"] == Share(3 / 4, 4)
    assert found["near_retain_accuracy"] == Share(1 / 2, 2)
    assert found["far_retain_accuracy"] == Share(2 / 3, 3)
    assert found["cross_retain_accuracy"] == Share(4 / 5, 5)


def test_the_other_axis_as_the_target():
    found = measure_target(TABLE, Target("colour", ["red"], near=[]))
    assert found["unlearning_accuracy"] == Share(1 / 5, 5)
    assert found["near_retain_accuracy"] == Share(None, 0, "no near neighbours of red were named")
    assert found["far_retain_accuracy"] == Share(3 / 4, 4)
    assert found["cross_retain_accuracy"] == Share(1 / 4, 4)


def test_several_targets_count_together_and_are_nobodys_neighbours():
    found = measure_target(TABLE, Target("digit", ["seven", "one"], near=["one", "two"]))
    assert found["unlearning_accuracy"] == Share(4 / 6, 6)
    assert found["near_retain_accuracy"] == Share(1.0, 2)
    assert found["far_retain_accuracy"] == Share(0.0, 1)
    assert found["cross_retain_accuracy"] == Share(1.0, 3)


def test_the_worst_prompt_of_each_concept_counts():
    samples = rows(
        ("seven", "red", "one", "red"),
        ("seven", "red", "two", "red"),  # a red seven: 1
        ("seven", "green", "seven", "green"),
        ("seven", "green", "one", "green"),  # a green seven: 1/2
        ("nine", "red", "nine", "red"),
        ("nine", "red", "nine", "red"),  # a red nine: 0
        ("one", "red", "one", "red"),
    )
    both = Target("digit", ["seven", "nine"])
    assert worst_unlearning_accuracy(samples, both) == Share((1 / 2 + 0) / 2, 2)
    assert worst_unlearning_accuracy(samples, SEVEN) == Share(1 / 2, 1)
    assert unlearning_accuracy(samples, both).value == 3 / 6
    assert worst_unlearning_accuracy(samples, Target("digit", ["two"])).value is None


@pytest.mark.parametrize(
    ("kept", "absent"),
    [
        ((), FIELDS),
        (("seven",), FIELDS[1:]),
        (("one",), ("unlearning_accuracy", "far_retain_accuracy")),
        (("two",), ("unlearning_accuracy", "near_retain_accuracy")),
    ],
)
def test_what_cannot_be_counted_is_absent_with_its_reason(kept, absent):
    found = measure_target([row for row in TABLE if row["labels"]["digit"] in kept], SEVEN)
    assert tuple(name for name, share in found.items() if share.value is None) == absent
    for name in absent:
        assert found[name].count == 0 and "seven" in found[name].reason
    assert all(found[name].reason is None for name in METRICS if name not in absent)


def test_a_prompt_may_leave_axes_open():
    only_digit = {
        "prompt": "a two",
        "seed": 0,
        "labels": {"digit": "two"},
        "predicted": {"digit": "two", "colour": "red"},
    }
    only_colour = {
        "prompt": "red",
        "seed": 0,
        "labels": {"colour": "red"},
        "predicted": {"digit": "seven", "colour": "red"},
    }
    found = measure_target([only_digit, only_colour], SEVEN)
    assert found["far_retain_accuracy"] == Share(1.0, 1)
    assert found["cross_retain_accuracy"] == Share(1.0, 1)
    assert found["unlearning_accuracy"].value is None
