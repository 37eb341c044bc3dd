"""Shards and slices: where rows go, what a deletion retrains, and its cost against counting all cases."""

from itertools import product

import pytest

from hf_clmul.data.shards import affected, assign, cost


def rows(count):
    return [{"id": f"t-{i}", "text": str(i)} for i in range(count)]


def ids(parts):
    return {part: [row["id"] for row in of_part] for part, of_part in parts.items()}


def test_every_row_is_in_one_part_and_every_part_is_there():
    parts = assign(rows(60), 3, 2, seed=0)
    assert list(parts) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert sorted(name for names in ids(parts).values() for name in names) == sorted(r["id"] for r in rows(60))
    assert all(len(of_part) > 3 for of_part in parts.values())  # ten are expected
    assert ids(assign([], 2, 2, seed=0)) == {(0, 0): [], (0, 1): [], (1, 0): [], (1, 1): []}
    assert sorted(ids(assign(rows(5), 1, 1, seed=0))[0, 0]) == [f"t-{i}" for i in range(5)]


def test_removing_a_row_moves_no_other():
    everything = rows(40)
    whole = ids(assign(everything, 3, 4, seed=7))
    for gone in everything:
        left = ids(assign([row for row in everything if row is not gone], 3, 4, seed=7))
        assert left == {part: [name for name in names if name != gone["id"]] for part, names in whole.items()}


def test_order_of_rows_has_no_say_and_the_seed_has():
    assert assign(rows(40)[::-1], 3, 4, seed=7) == assign(rows(40), 3, 4, seed=7)
    assert ids(assign(rows(40), 3, 4, seed=8)) != ids(assign(rows(40), 3, 4, seed=7))


def test_the_parts_are_the_same_everywhere():
    """Written down, so that neither another process nor another version cuts otherwise unnoticed."""
    assert ids(assign(rows(6), 2, 2, seed=0)) == {
        (0, 0): ["t-1"],
        (0, 1): ["t-2", "t-0"],
        (1, 0): ["t-3"],
        (1, 1): ["t-5", "t-4"],
    }


def test_rows_spread_evenly_over_the_parts():
    counts = [len(of_part) for of_part in assign(rows(6000), 2, 3, seed=1).values()]
    # Chi-square with 5 degrees of freedom: 20.5 has a probability of 0.001.
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 20.5


def by_hand():
    """Two shards of three slices, two rows a part; row 2 * (3 * shard + slice) comes first."""
    names = iter(f"t-{i}" for i in range(12))
    return {part: [{"id": next(names)}, {"id": next(names)}] for part in product(range(2), range(3))}


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ([], []),
        (["t-0"], [(0, 0), (0, 1), (0, 2)]),
        (["t-3"], [(0, 1), (0, 2)]),
        (["t-5"], [(0, 2)]),
        (["t-10", "t-11"], [(1, 2)]),
        (["t-5", "t-2"], [(0, 1), (0, 2)]),
        (["t-9", "t-4"], [(0, 2), (1, 1), (1, 2)]),
    ],
)
def test_a_slice_and_all_later_ones_of_its_shard_are_retrained(gone, expected):
    assert affected(by_hand(), gone) == expected
    assert affected(dict(reversed(by_hand().items())), gone[::-1]) == expected


def test_an_id_that_was_never_learned_is_refused():
    with pytest.raises(ValueError, match="2 of 3 ids are in no part, such as 't-12'"):
        affected(by_hand(), ["t-13", "t-0", "t-12"])


def retrained_by_counting(shards, slices, requests):
    """(share retrained, share of shards touched), averaged over all ways in which the requests can fall."""
    parts = list(product(range(shards), range(slices)))
    held = {part: [{"id": i}] for i, part in enumerate(parts)}
    retrained = touched = cases = 0
    for gone in product(range(len(parts)), repeat=requests):
        found = affected(held, set(gone))
        retrained += len(found) / len(parts)
        touched += len({shard for shard, _ in found}) / shards
        cases += 1
    return retrained / cases, touched / cases


@pytest.mark.parametrize(
    ("shards", "slices", "requests"),
    [(1, 1, 1), (1, 4, 1), (4, 1, 1), (3, 4, 1), (8, 4, 1), (2, 2, 2), (2, 3, 3), (3, 2, 2), (4, 1, 3), (2, 2, 0)],
)
def test_the_cost_is_that_of_counting_all_cases(shards, slices, requests):
    found = cost(shards, slices, requests)
    assert (found.retrained, found.shards_touched) == pytest.approx(retrained_by_counting(shards, slices, requests))


def test_the_cost_in_the_closed_forms():
    for shards, slices in product(range(1, 9), range(1, 7)):
        assert cost(shards, slices).retrained == pytest.approx((1 / shards) * (slices + 1) / (2 * slices))
    assert cost(8, 4).retrained == pytest.approx(0.078125)
    assert [round(cost(8, 4, k).shards_touched, 2) for k in (1, 4, 8)] == [0.12, 0.41, 0.66]


@pytest.mark.parametrize(("shards", "slices"), [(0, 1), (1, 0), (-2, 3)])
def test_less_than_one_part_is_refused(shards, slices):
    with pytest.raises(ValueError, match="expected 1 or more"):
        assign(rows(3), shards, slices, seed=0)
    with pytest.raises(ValueError, match="expected 1 or more"):
        cost(shards, slices)


def test_a_negative_number_of_requests_is_refused():
    with pytest.raises(ValueError, match="expected 0 or more, found -1"):
        cost(2, 2, -1)


def test_two_rows_with_one_id_are_refused():
    with pytest.raises(ValueError, match="1 of 3 rows have the id of another row"):
        assign([*rows(2), {"id": "t-1"}], 2, 2, seed=0)
