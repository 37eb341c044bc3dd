"""Batches by hand: left padding, where the loss looks, second answers, roles."""

import pytest
import torch
from tiny import EOS_ID

from hf_clmul.data.collation import RoleCollator, pad_left, supervision
from hf_clmul.data.roles import in_context

X = -100
LONG = {"input_ids": [5, EOS_ID, 7, 8, EOS_ID], "labels": [X, X, X, 8, EOS_ID]}
SHORT = {"input_ids": [3, 4, 9], "labels": [X, 4, X]}
REFUSAL = {"input_ids": [5, EOS_ID, 7, 6], "labels": [X, X, X, 6]}


def lists(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def test_left_padding_and_positions_that_count_from_the_first_real_token():
    batch = pad_left([LONG, SHORT], pad_token_id=EOS_ID)
    assert lists(batch) == {
        "input_ids": [[5, EOS_ID, 7, 8, EOS_ID], [EOS_ID, EOS_ID, 3, 4, 9]],
        # The pad token is the end-of-turn token: only the mask tells them apart.
        "attention_mask": [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]],
        "labels": [[X, X, X, 8, EOS_ID], [X, X, X, 4, X]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # Column t predicts token t + 1. Shifted, the rows are X 7 8 | X and 5 6 X | X (the last column
        # predicts nothing); flat, the supervised ones are numbers 1, 2 and 4, 5.
        (
            [[X, X, 7, 8], [X, 5, 6, X]],
            {"keep": 4, "positions": [1, 2, 4, 5], "targets": [7, 8, 5, 6], "rows": [0, 0, 1, 1]},
        ),
        # Nothing is supervised before the last token: two columns are enough, 9 | X and 3 | X.
        (
            [[X, X, X, 9], [X, X, X, 3]],
            {"keep": 2, "positions": [0, 2], "targets": [9, 3], "rows": [0, 1]},
        ),
        # Rows of unequal length; one of them, in the middle, has nothing. Token 0 is a target like any other.
        (
            [[X, X, X, 9, 0], [X, X, X, X, X], [X, X, 4, X, 6]],
            {"keep": 4, "positions": [1, 2, 8, 10], "targets": [9, 0, 4, 6], "rows": [0, 0, 2, 2]},
        ),
        # The first token of a row is predicted by nothing.
        ([[5, 6, 7]], {"keep": 3, "positions": [0, 1], "targets": [6, 7], "rows": [0, 0]}),
    ],
)
def test_supervision(labels, expected):
    assert lists(supervision(torch.tensor(labels))) == expected


def test_a_batch_of_one_role():
    batch = lists(RoleCollator(EOS_ID).collate([LONG, SHORT]))
    # Shifted from column 2 on: 8 EOS | X and 4 X | X
    found = {key: batch[key] for key in ("keep", "positions", "targets", "rows")}
    assert found == {"keep": 3, "positions": [0, 1, 3], "targets": [8, EOS_ID, 4], "rows": [0, 0, 1]}
    assert (batch["alternatives"], batch["lengths"]) == (0, [2, 1])


def test_second_answers_follow_the_first_ones():
    examples = [{**LONG, "alternative": REFUSAL}, {**SHORT, "alternative": SHORT}]
    batch = lists(RoleCollator(EOS_ID).collate(examples))
    assert batch["input_ids"] == [
        [5, EOS_ID, 7, 8, EOS_ID],
        [EOS_ID, EOS_ID, 3, 4, 9],
        [EOS_ID, 5, EOS_ID, 7, 6],
        [EOS_ID, EOS_ID, 3, 4, 9],
    ]
    assert batch["alternatives"] == 2
    assert (batch["rows"], batch["targets"]) == ([0, 0, 1, 2, 3], [8, EOS_ID, 4, 6, 4])
    assert batch["lengths"] == [2, 1, 1, 1]


def test_contexts_are_batches_of_their_own_whose_positions_align():
    texts = {"novice": [40, 41], "expert": [42]}
    shown = [{**e, "contexts": {name: in_context(e, ids, 3) for name, ids in texts.items()}} for e in (LONG, SHORT)]
    shown[0]["alternative"] = shown[1]["alternative"] = REFUSAL
    batch = RoleCollator(EOS_ID).collate(shown)
    novice = lists(batch["contexts"]["novice"])
    assert novice["input_ids"] == [[40, 41, 5, EOS_ID, 7, 8, EOS_ID], [EOS_ID, EOS_ID, 3, 40, 41, 4, 9]]
    assert (novice["targets"], novice["rows"], novice["alternatives"]) == ([8, EOS_ID, 4], [0, 0, 1], 0)
    own = batch["rows"] < 2  # of the batch itself, less the second answers
    for one in batch["contexts"].values():
        assert torch.equal(one["targets"], batch["targets"][own]) and torch.equal(one["rows"], batch["rows"][own])


def test_roles_are_collated_apart_and_a_plain_list_is_one_batch():
    collate = RoleCollator(EOS_ID)
    drawn = [{"forget": LONG, "retain": SHORT}, {"forget": SHORT, "retain": SHORT}]
    batch = collate(drawn)
    assert {role: lists(inputs) for role, inputs in batch.items()} == {
        "forget": lists(collate([LONG, SHORT])),
        "retain": lists(collate([SHORT, SHORT])),
    }
    # A role is padded to its own longest example.
    assert batch["forget"]["input_ids"].shape == (2, 5) and batch["retain"]["input_ids"].shape == (2, 3)


def test_collating_does_not_change_the_examples():
    before = {key: list(value) for key, value in LONG.items()}
    RoleCollator(EOS_ID)([LONG, SHORT])["input_ids"].fill_(1)
    assert before == LONG


def test_classes_of_a_batch():
    marked = {**LONG, "class_id": 2**62}
    assert RoleCollator(EOS_ID).collate([marked, SHORT])["classes"].tolist() == [2**62, -1]
    assert "classes" not in RoleCollator(EOS_ID).collate([LONG, SHORT])
    with_refusal = {**marked, "alternative": REFUSAL}
    assert RoleCollator(EOS_ID).collate([with_refusal, with_refusal])["classes"].tolist() == [2**62, 2**62]
