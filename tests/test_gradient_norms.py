"""Gradient norms: what a plain backward pass gives, and a model that is left as it was."""

import copy
import math

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from hf_clmul.data.encoding import encode
from hf_clmul.evaluation.gradient_norms import gradient_norms

EXAMPLES = [{"question": f"Who is {'x' * i}?", "answer": f"Number {i * i}."} for i in range(1, 4)]
TOKENIZER = tiny_tokenizer([text for row in EXAMPLES for text in row.values()])


def by_hand(model, example):
    model = copy.deepcopy(model).eval().requires_grad_(True)
    model.zero_grad()
    encoded = encode(example, TOKENIZER)
    model(input_ids=torch.tensor([encoded["input_ids"]]), labels=torch.tensor([encoded["labels"]])).loss.backward()
    norms = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    return sum(norms) / len(norms)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_it_is_the_mean_norm_of_a_plain_backward_pass(make):
    model = make(vocab=len(TOKENIZER))
    found = gradient_norms(model, TOKENIZER, EXAMPLES)
    assert found == pytest.approx([by_hand(model, example) for example in EXAMPLES], rel=1e-4)
    assert len({round(norm, 6) for norm in found}) == 3


def test_the_model_is_left_as_it_was_and_dropout_is_off():
    model = tiny_gpt2(vocab=len(TOKENIZER)).train()
    model.transformer.h[0].eval()
    frozen = dict(model.named_parameters())
    for name, p in frozen.items():
        p.requires_grad_("mlp" in name)
    kept = torch.ones_like(model.transformer.ln_f.weight)
    model.transformer.ln_f.weight.grad = kept
    before = {name: p.detach().clone() for name, p in frozen.items()}
    state = torch.random.get_rng_state()
    first = gradient_norms(model, TOKENIZER, EXAMPLES)
    assert gradient_norms(model, TOKENIZER, EXAMPLES) == first, "the same each time"
    assert first == pytest.approx([by_hand(model, example) for example in EXAMPLES], rel=1e-4)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training
    for name, p in model.named_parameters():
        assert p.requires_grad == ("mlp" in name), name
        assert torch.equal(p, before[name]), name
        assert (p.grad is kept) if name == "transformer.ln_f.weight" else (p.grad is None), name


def test_flags_come_back_after_an_error():
    model = tiny_llama(vocab=len(TOKENIZER)).requires_grad_(False).train()
    with pytest.raises(Exception, match="no usable columns"):
        gradient_norms(model, TOKENIZER, [{"nothing": 1}])
    assert model.training and not any(p.requires_grad for p in model.parameters())


def test_under_no_grad_too_and_nothing_for_no_examples():
    model = tiny_llama(vocab=len(TOKENIZER))
    with torch.no_grad():
        assert all(math.isfinite(norm) and norm > 0 for norm in gradient_norms(model, TOKENIZER, EXAMPLES))
    assert gradient_norms(model, TOKENIZER, []) == []
