"""SLAO: its two formulas by hand, and on an adapter of a model over three tasks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trainer_bed import LORA, adapted, llama, nudge, same

from hf_clmul.errors import RunError
from hf_clmul.models import slao


def matrix(rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_orthonormal_rows_by_hand():
    # (3, 4) / 5; of (5, 10) what is not along it: (5, 10) - 11 (0.6, 0.8) = (-1.6, 1.2), of length 2.
    expected = matrix([[0.6, 0.8], [-0.8, 0.6]])
    torch.testing.assert_close(slao.orthonormal(matrix([[3, 4], [5, 10]])), expected)
    torch.testing.assert_close(slao.orthonormal(matrix([[-3, -4], [5, 10]])), matrix([[-0.6, -0.8], [-0.8, 0.6]]))
    torch.testing.assert_close(slao.orthonormal(expected), expected)


def test_orthonormal_rows_span_the_same():
    a = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    q = slao.orthonormal(a)
    assert q.dtype == a.dtype
    torch.testing.assert_close(q @ q.T, torch.eye(3))
    torch.testing.assert_close(a @ q.T @ q, a)


def test_merging_by_hand():
    before, b = matrix([[1, 2]]), matrix([[5, -2]])
    assert slao.merged(before, b, 1).tolist() == [[5, -2]]
    assert slao.merged(before, b, 4).tolist() == [[3, 0]]  # half the way


def test_three_tasks():
    model = adapted()
    slao.begin(model, "default", {}, 1)
    assert same(slao.factors(model, "default"), slao.factors(adapted(), "default"))
    nudge(model)
    first = slao.factors(model, "default")
    tuned = slao.merge(model, "default", None, 1)
    assert same(tuned, first) and same(slao.factors(model, "default"), first)
    combined = first
    for i, share in ((2, 2**-0.5), (3, 3**-0.5)):
        slao.begin(model, "default", tuned, i)
        begun = slao.factors(model, "default")
        for key, start in begun.items():
            if "lora_A" in key:
                torch.testing.assert_close(start @ start.T, torch.eye(4))
                torch.testing.assert_close(tuned[key] @ start.T @ start, tuned[key])
            else:
                assert torch.equal(start, tuned[key])  # the one that was trained, not the merged one
        nudge(model)
        trained = slao.factors(model, "default")
        tuned = slao.merge(model, "default", combined, i)
        assert same(tuned, trained) and not same(trained, begun)
        now = slao.factors(model, "default")
        for key, value in now.items():
            if "lora_A" in key:
                assert torch.equal(value, trained[key])
            else:
                torch.testing.assert_close(value, (1 - share) * combined[key] + share * trained[key])
        combined = now


def test_only_that_adapter_changes_and_flags_stay():
    model = adapted()
    model.add_adapter("other", LORA)
    other, flags = slao.factors(model, "other"), {n: p.requires_grad for n, p in model.named_parameters()}
    tuned = slao.factors(model, "default")
    assert len(tuned) == len(other) == 12
    slao.begin(model, "default", tuned, 2)
    slao.merge(model, "default", tuned, 2)
    assert same(slao.factors(model, "other"), other)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


def test_saved_and_loaded(tmp_path):
    kept = slao.factors(adapted(), "default")
    slao.save(kept, tmp_path / "factors.safetensors")
    assert same(slao.load(tmp_path / "factors.safetensors"), kept)


def test_factors_of_another_adapter_are_refused_and_nothing_changes():
    model = adapted()
    before, others = slao.factors(model, "default"), slao.factors(adapted(r=2), "default")
    for call in (lambda: slao.begin(model, "default", others, 2), lambda: slao.merge(model, "default", others, 2),
                 lambda: slao.merge(model, "default", None, 2)):  # fmt: skip
        with pytest.raises(RunError, match="not those of adapter 'default': 12 differ, such as"):
            call()
    assert same(slao.factors(model, "default"), before)


def test_more_rows_than_inputs_are_refused():
    model = get_peft_model(llama(), LoraConfig(**{**LORA.to_dict(), "r": 40}))
    with pytest.raises(ValueError, match="has 32 inputs, too few for 40 orthonormal rows: give a rank of at most 32"):
        slao.begin(model, "default", slao.factors(model, "default"), 2)
