"""Who meets whom in a step: a pure function of (seed, epoch, index), whatever was asked before (trap 13)."""

import os
import pickle
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from hf_clmul.data.roles import EpochSampler, RoleDataset, derived_seed, in_context, permutation

FORGET = [{"input_ids": [1, 2, 10 + i], "labels": [-100, -100, 10 + i]} for i in range(3)]
RETAIN = [{"input_ids": [3, 50 + i], "labels": [-100, 50 + i]} for i in range(5)]
MEMORY = [{"input_ids": [4, 70 + i], "labels": [-100, 70 + i]} for i in range(2)]
REFUSALS = [[90, 0], [91, 92, 0], [93, 0], [94, 0]]


def dataset(seed=0, alternatives=()):
    return RoleDataset({"forget": FORGET, "retain": RETAIN, "memory": MEMORY}, "forget", seed, alternatives)


def partners(data, role, draws):
    return [data[draw][role]["input_ids"][-1] for draw in draws]


def test_the_anchor_is_example_i_of_every_epoch():
    data = dataset()
    assert len(data) == 3
    assert partners(data, "forget", range(7)) == [10, 11, 12, 10, 11, 12, 10]
    assert set(data[0]) == {"forget", "retain", "memory"}


@pytest.mark.parametrize(("role", "size"), [("retain", 5), ("memory", 2)])
def test_every_pass_over_a_role_is_a_permutation_of_its_own(role, size):
    found = partners(dataset(), role, range(8 * size))
    passes = [tuple(found[i : i + size]) for i in range(0, len(found), size)]
    for one in passes:
        assert len(set(one)) == size
    assert len(set(passes)) > 1


def test_partners_are_the_same_in_whatever_order_they_are_asked_for():
    draws = list(range(30))
    expected = [dataset(alternatives=REFUSALS)[draw] for draw in draws]  # a fresh one for each
    for order in (draws, draws[::-1], [(7 * draw) % 30 for draw in draws], [29, 0, 29, 3] + draws):
        data = dataset(alternatives=REFUSALS)
        assert {draw: data[draw] for draw in order} == dict(enumerate(expected))


def test_a_resumed_or_copied_data_set_draws_what_an_unbroken_one_draws():
    whole = dataset()
    unbroken = [whole[draw] for draw in range(12)]
    copied = pickle.loads(pickle.dumps(whole))  # as a data loader's worker gets it
    assert [dataset()[draw] for draw in range(6, 12)] == unbroken[6:]
    assert [copied[draw] for draw in range(6, 12)] == unbroken[6:]


def test_seeds_roles_and_passes_draw_differently():
    draws = range(40)
    assert partners(dataset(0), "retain", draws) != partners(dataset(1), "retain", draws)
    data = RoleDataset({"forget": FORGET, "retain": RETAIN, "memory": RETAIN}, "forget", 0)
    assert partners(data, "retain", draws) != partners(data, "memory", draws)


def test_draws_do_not_depend_on_the_process():
    code = (
        "from hf_clmul.data.roles import RoleDataset, EpochSampler, derived_seed\n"
        "data = RoleDataset({'forget': [{}] * 3, 'retain': list(range(50, 55))}, 'forget', 0)\n"
        "print(derived_seed(0, 'x'), [data[i]['retain'] for i in range(12)], list(EpochSampler(5, 1)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    expected = partners(dataset(), "retain", range(12))
    assert run.stdout == f"{derived_seed(0, 'x')} {expected} {list(EpochSampler(5, 1))}\n"


def test_seeds_are_derived_from_all_parts():
    assert derived_seed(0, "x") == 0x3879AAF3  # sha256 of "(0, 'x')", first four bytes
    seeds = [derived_seed(*parts) for parts in [(0, "x"), (0, "y"), (1, "x"), (0, "x", 0), ("0", "x")]]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert sorted(permutation(6, 0, "x")) == list(range(6))


# ---- second answers ----------------------------------------------------------------------------------------


def test_a_second_answer_takes_the_place_of_the_answer_after_the_same_prompt():
    data = RoleDataset({"forget": FORGET, "retain": RETAIN}, "forget", 0, [[91, 92, 0]])
    assert data[1]["forget"] == {
        "input_ids": [1, 2, 11],
        "labels": [-100, -100, 11],
        "alternative": {"input_ids": [1, 2, 91, 92, 0], "labels": [-100, -100, 91, 92, 0]},
    }
    assert "alternative" not in data[1]["retain"]
    assert "alternative" not in FORGET[1]  # the data set's own example is left alone


def test_second_answers_are_drawn_evenly():
    data = dataset(alternatives=REFUSALS)
    drawn = Counter(tuple(data[draw]["forget"]["alternative"]["input_ids"][2:]) for draw in range(12))
    assert drawn == {tuple(refusal): 3 for refusal in REFUSALS}


OWN = [[[100 + i, 0], [200 + i, 0], [300 + i, 0]][: i + 1] for i in range(3)]  # example i has i + 1 answers


def test_answers_of_its_own_are_all_used_before_one_comes_again():
    data = RoleDataset({"forget": FORGET, "retain": RETAIN}, "forget", 0, own_alternatives={"forget": OWN})
    for i in range(3):
        drawn = [data[epoch * 3 + i]["forget"]["alternative"] for epoch in range(12)]
        assert {tuple(one["input_ids"][:2]) for one in drawn} == {(1, 2)}
        tails = [one["input_ids"][2] for one in drawn]
        passes = [tails[j : j + i + 1] for j in range(0, 12, i + 1)]
        assert all(sorted(one) == [answer[0] for answer in OWN[i]] for one in passes[: 12 // (i + 1)])
        assert len({tuple(one) for one in passes}) > 1 or i == 0  # in orders of their own
    assert "alternative" not in data[0]["retain"]


def test_answers_of_its_own_follow_the_example_that_is_drawn():
    own = [[[500 + i, 0]] for i in range(5)]
    data = RoleDataset({"forget": FORGET, "retain": RETAIN}, "forget", 0, own_alternatives={"retain": own})
    for draw in [*range(15), 3, 1]:
        drawn = data[draw]["retain"]
        assert drawn["alternative"]["input_ids"] == [3, 500 + drawn["input_ids"][-1] - 50, 0]
        assert "alternative" not in data[draw]["forget"]


def test_an_example_in_a_context_is_the_example_behind_a_text():
    given = {"input_ids": [1, 2, 11, 12], "labels": [-100, -100, 11, 12]}
    assert in_context(given, [7, 8], None) == {"input_ids": [7, 8, 1, 2, 11, 12], "labels": [-100] * 4 + [11, 12]}
    # Behind a token that begins every text
    assert in_context(given, [7, 8], 1) == {"input_ids": [1, 7, 8, 2, 11, 12], "labels": [-100] * 4 + [11, 12]}
    # A first token that is supervised is predicted by nothing; behind a text it would be.
    assert in_context({"input_ids": [5, 6], "labels": [5, 6]}, [7], None)["labels"] == [-100, -100, 6]
    assert in_context({"input_ids": [5, 6], "labels": [5, 6]}, [7], 5) == {
        "input_ids": [5, 7, 6],
        "labels": [-100, -100, 6],
    }
    assert in_context(given, [], 1) == given


@pytest.mark.parametrize(
    ("max_length", "ids"),
    [(7, [1, 7, 8, 9, 2, 11, 12]), (6, [1, 8, 9, 2, 11, 12]), (5, [1, 9, 2, 11, 12]), (4, [1, 2, 11, 12])],
)
def test_a_text_is_cut_from_its_start_to_the_room_that_is_left(max_length, ids):
    given = {"input_ids": [1, 2, 11, 12], "labels": [-100, -100, 11, 12]}
    expected = {"input_ids": ids, "labels": [-100] * (len(ids) - 2) + [11, 12]}
    assert in_context(given, [7, 8, 9], 1, max_length) == expected
    data = RoleDataset({"forget": [given]}, "forget", 0, (), (), None, {"forget": {"novice": [7, 8, 9]}}, 1, max_length)
    assert data[0]["forget"]["contexts"] == {"novice": expected}


def test_only_the_roles_with_contexts_are_shown_in_them():
    texts = {"novice": [7], "expert": [8, 9]}
    data = RoleDataset({"forget": FORGET, "retain": RETAIN}, "forget", 0, contexts={"forget": texts}, first_token=1)
    drawn = data[4]
    assert drawn["forget"]["contexts"] == {name: in_context(FORGET[1], ids, 1) for name, ids in texts.items()}
    assert "contexts" not in drawn["retain"] and "contexts" not in FORGET[1]


# ---- the order of an epoch ---------------------------------------------------------------------------------


def test_an_epoch_is_one_pass_in_an_order_of_its_own():
    sampler = EpochSampler(6, seed=0)
    epochs = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert sorted(epochs[-1]) == list(range(6 * epoch, 6 * epoch + 6))
        assert list(sampler) == epochs[-1]  # asking twice changes nothing
    assert len(sampler) == 6
    assert any([d % 6 for d in one] != [d % 6 for d in two] for one, two in pairwise(epochs))
    fresh = EpochSampler(6, seed=0)
    fresh.set_epoch(3)
    assert list(fresh) == epochs[3]
    assert list(EpochSampler(6, seed=1)) != epochs[0]


def test_epochs_of_the_sampler_pass_over_the_other_roles_evenly():
    data, sampler = dataset(), EpochSampler(3, seed=0)
    met = Counter()
    for epoch in range(10):
        sampler.set_epoch(epoch)
        met.update(partners(data, "retain", sampler))
    assert met == {50 + i: 6 for i in range(5)}  # 30 draws over 5 examples
