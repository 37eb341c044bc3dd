"""Two processes do what one does with the same windows, and stay equal to the bit.

What each guard is worth was seen by removing it (error of the first gradient of `pcgrad`; sound code has 5e-8):
trap 1, both roles forward before both backward: 0.24, and elsewhere DDP raises. Trap 2, autograd.grad: 0.98.
Trap 4, no clone under bucket views: 1.0. Trap 8, counts of one rank: 1.0. Trap 10, Gram matrix of a rank's own
gradients: 0.17; weights of a rank's own rule: the ranks drift apart. Trap 7, flags not given back: the frozen A
matrices enter the norm that clips and the ranks drift apart. Sampler not told its epoch: the resume is not exact.
"""

import os
import shutil

import pytest
import ranks_worker
import torch
from accelerate.data_loader import BatchSamplerShard
from filelock import FileLock
from ranks_worker import CASES, MICRO_BATCH, SIZE, run
from torch.utils.data import BatchSampler
from trainer_bed import distance, llama, make, nudged, same, two_roles, windows

from hf_clmul.data.roles import EpochSampler


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What rank 0 and rank 1 found. With pytest-xdist the first worker that needs it runs it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if (folder / "rank1.pt").is_file():
            return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
        shutil.rmtree(folder, ignore_errors=True)  # another worker's attempt that failed
        folder.mkdir()
        return ranks_worker.launch(folder)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process(ranks, tmp_path, name):
    one = run(name, tmp_path, ranks=1)
    for two in (found[name] for found in ranks):
        steps = zip(two["steps"], one["steps"], strict=True)
        if "checkpointing" in name:  # several ranks then wait for all gradients, be they zero
            steps = [({n: g for n, g in a.items() if n in b or g.any()}, b) for a, b in steps]
        off = [distance(a, b) for a, b in steps]
        assert len(off) == 4
        # Later steps start from weights that differ in the last digit, and so does a pass at displaced weights.
        displaced = "look ahead" in name or "sharpness" in name
        assert off[0] < (1e-6 if displaced else 3e-7) and max(off) < 3e-6
        assert distance(two["weights"], one["weights"]) < 1e-7
        assert two["trainable"] == one["trainable"]
        assert two["counts"] == one["counts"]
        assert two["alternatives"] == one["alternatives"]
        assert (two["average"] is None) == (one["average"] is None) == (not name.startswith("ema"))
        if one["average"] is not None:
            assert two["average"].k == one["average"].k == 4
            assert distance(two["average"].values, one["average"].values) < 1e-7
            assert distance(two["average"].values, {n: two["weights"][n] for n in two["average"].values}) > 1e-3
        assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
        for a, b in zip(two["lines"], one["lines"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_ranks_stay_equal_to_the_bit(ranks, name):
    first, second = (found[name] for found in ranks)
    assert same(first["weights"], second["weights"])
    assert all(same(a, b) for a, b in zip(first["steps"], second["steps"], strict=True))
    assert first["lines"] == second["lines"]
    if first["average"] is not None:
        assert same(first["average"].values, second["average"].values) and first["average"].k == second["average"].k


def test_ranks_see_different_numbers_of_labels(tmp_path):
    """Else trap 8 (the counts of one rank) would not show."""
    trainer = make(llama(), two_roles(SIZE, SIZE), tmp_path)
    batches = windows(trainer, MICRO_BATCH)
    for role in trainer.terms:
        tokens = [sum(label >= 0 for row in batch for label in row[role]["labels"]) for batch in batches]
        of_rank_0 = [sum(window[0::2]) / sum(window) for window in (tokens[:4], tokens[4:])]
        assert max(abs(share - 0.5) for share in of_rank_0) > 0.05


def test_gradients_conflict(ranks):
    """Else rules could not be told from the sum."""
    for rule in ("pcgrad", "pcgrad_retain_first"):
        assert ranks[0][f"{rule}, views off"]["lines"][0]["conflict_rate"] == 1.0
        assert distance(ranks[0][f"{rule}, views off"]["steps"][0], ranks[0]["sum, views off"]["steps"][0]) > 0.01


def test_what_is_above_a_hidden_layer_does_not_decay(ranks):
    """On one process no gradient reaches it, and weight decay passes it over; so it must be on several."""
    before = {**llama().state_dict()}
    for name in ("hidden", "hidden, sum, views on"):
        after = ranks[0][name]["weights"]
        assert torch.equal(
            after["model.layers.1.mlp.down_proj.weight"], nudged(llama()).model.layers[1].mlp.down_proj.weight
        )
        assert not torch.equal(
            after["model.layers.0.mlp.down_proj.weight"], before["model.layers.0.mlp.down_proj.weight"]
        )
        assert not any("layers.1" in key for step in ranks[0][name]["steps"] for key in step)


def test_lambda_follows_the_loss_over_all_ranks(ranks):
    for name, first in (("pdu", 1.0), ("pdu from zero", 0.0)):
        logged = [line["weight/retain"] for line in ranks[0][name]["lines"]]
        assert logged == [line["weight/retain"] for line in ranks[1][name]["lines"]]
        assert logged[0] != first or logged[1] != first  # means over two windows each


@pytest.mark.parametrize("kind", ["resumed", "resumed ema"])
def test_resume_on_two_ranks_is_exact_and_rank_0_alone_writes(ranks, kind):
    first, second = (found[kind] for found in ranks)
    assert first["average"] and second["average"]
    assert first["same"] and second["same"] and first["lines"] and second["lines"]
    assert same(first["weights"], second["weights"])
    assert first["saved"] == [f"checkpoint-{step}" for step in (3, 6, 7, 3, 6, 7)]
    assert second["saved"] == []


@pytest.mark.parametrize(("size", "again"), [(15, 1), (13, 3), (16, 0), (3, 1), (1, 3)])
def test_an_epoch_that_ranks_cannot_share_begins_again_at_its_end(size, again):
    """What Accelerate does, on which the number that is logged relies."""
    order = list(EpochSampler(size, seed=2))
    shares = [
        [batch for batch in BatchSamplerShard(BatchSampler(order, MICRO_BATCH, False), 2, rank)] for rank in (0, 1)
    ]
    seen = [draw for pair in zip(*shares, strict=True) for batch in pair for draw in batch]
    assert sorted(seen) == sorted(order + (3 * order)[:again])
    assert -size % (2 * MICRO_BATCH) == again


def test_repeated_examples_are_told_once_a_training_and_by_rank_0(ranks):
    message = f"{SIZE - 1} examples cannot be shared evenly by 2 ranks: each epoch sees 1 again"
    assert [found["resumed"]["told"] for found in ranks] == [[message] * 3, []]


def test_collapse_on_one_rank_stops_both(ranks):
    for found in ranks:
        assert found["collapsed"]["message"].startswith("training collapsed at step 2: loss/forget/npo is nan.")
        assert found["collapsed"]["steps"] == 1
