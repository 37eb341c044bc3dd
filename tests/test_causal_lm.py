"""The causal language model family: predictions against a plain pass, gradients, scores, generation."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny import EOS_ID, tiny_gpt2, tiny_llama, tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.roles import in_context
from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.causal_lm import accepted_inputs, generate, predict, score

BOTH = frozenset({"logps", "logits"})
LOGPS = frozenset({"logps"})
X = -100
EXAMPLES = [
    {"input_ids": [11, 12, EOS_ID, 14, 15, 16, EOS_ID], "labels": [X, X, X, X, 15, 16, EOS_ID]},
    {"input_ids": [21, 22, 23, 24], "labels": [X, X, 23, X]},
    {"input_ids": [31, 32, 33, 34, 35], "labels": [X, 32, X, 34, 35]},
]
every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


def collated(examples=EXAMPLES):
    return RoleCollator(EOS_ID).collate(examples)


def plain(model, example):
    """Log-probabilities [n] and logits [n, V] at supervised positions, of one example alone and unpadded."""
    logits = model(torch.tensor([example["input_ids"]])).logits[0]
    at = [t for t, label in enumerate(example["labels"]) if label != X]
    chosen = logits[[t - 1 for t in at]]
    targets = torch.tensor([example["labels"][t] for t in at])
    return chosen.log_softmax(-1).gather(1, targets[:, None]).squeeze(1), chosen


def predicted(model, batch, needs=BOTH):
    return predict(model, batch, needs, accepted_inputs(model))


def with_adapter(model):
    modules = ["q_proj", "down_proj"] if hasattr(model, "model") else ["c_attn"]
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    return adapters.attach(model, config, "default", 1)


# ---- predictions -------------------------------------------------------------------------------------------


@every_model
def test_a_padded_batch_predicts_what_each_example_predicts_alone(make):
    model = make().double()
    found = predicted(model, collated())
    alone = [plain(model, example) for example in EXAMPLES]
    expected_logps, expected_logits = (torch.cat(part) for part in zip(*alone, strict=True))
    torch.testing.assert_close(found.logps.double(), expected_logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.logits.double(), expected_logits, rtol=1e-6, atol=1e-6)
    assert found.rows.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert (found.batch_size, found.tokens, found.alternative) == (3, 7, None)
    sums = torch.stack([logps.sum() for logps, _ in alone])
    torch.testing.assert_close(found.sequence_logps().double(), sums, rtol=1e-6, atol=1e-6)
    assert found.sequence_lengths().tolist() == [3, 1, 3]


@every_model
def test_only_what_was_asked_for_is_there_in_float32(make):
    model, batch = make().bfloat16(), collated()
    logps, logits = predicted(model, batch, LOGPS), predicted(model, batch, frozenset({"logits"}))
    assert logps.logits is None and logps.logps.shape == (7,) and logps.logps.dtype == torch.float32
    assert logits.logps is None and logits.logits.shape == (7, 64) and logits.logits.dtype == torch.float32


@every_model
def test_logits_are_computed_from_the_first_supervised_column_on(make):
    model = make()
    # Seven columns; the first supervised token stands in column 4, predicted by column 3.
    batch = collated(EXAMPLES[:2])
    widths = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: widths.append(output.shape[1]))
    found = predicted(model, batch)
    assert widths == [4]
    # A model whose forward cannot be told so gives the same.
    whole = predict(model, batch, BOTH, accepted_inputs(model) - {"logits_to_keep"})
    assert widths == [4, 7]
    torch.testing.assert_close(found.logits, whole.logits, rtol=1e-6, atol=1e-6)


@every_model
def test_second_answers_are_told_from_the_first_ones(make):
    model = make().double()
    refusals = [
        {"input_ids": [11, 12, EOS_ID, 14, 51], "labels": [X, X, X, X, 51]},
        {"input_ids": [21, 22, 52, 53, EOS_ID], "labels": [X, X, 52, 53, EOS_ID]},
    ]
    pairs = [{**e, "alternative": refusal} for e, refusal in zip(EXAMPLES[:2], refusals, strict=True)]
    found = predicted(model, collated(pairs))
    first, second = (found, EXAMPLES[:2], [0, 0, 0, 1]), (found.alternative, refusals, [0, 1, 1, 1])
    for prediction, examples, rows in (first, second):
        expected = torch.cat([plain(model, example)[0] for example in examples])
        torch.testing.assert_close(prediction.logps.double(), expected, rtol=1e-6, atol=1e-6)
        assert prediction.rows.tolist() == rows and prediction.batch_size == 2
        assert prediction.logits.shape == (4, 64)


class HandsOn(LlamaForCausalLM):
    """Takes the mask without naming it, as some models with code of their own do."""

    def forward(self, input_ids, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_mask_reaches_a_model_that_only_hands_it_on(adapter):
    plain = tiny_llama()
    model = HandsOn(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    unnamed = {"position_ids", "logits_to_keep"}
    models = [with_adapter(made) if adapter else made for made in (model, plain)]
    found, expected = (predict(made, collated(), BOTH, accepted_inputs(made) - unnamed) for made in models)
    assert torch.equal(found.logits, expected.logits)


def test_a_model_that_takes_no_mask_is_refused():
    class Unmasked(LlamaForCausalLM):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids=input_ids, position_ids=position_ids)

    with pytest.raises(
        RunError, match="Unmasked.forward takes no attention_mask, so that padding would be read as text"
    ):
        accepted_inputs(Unmasked(tiny_llama().config))


@every_model
def test_accepted_inputs_look_below_an_adapter(make):
    model = make()
    accepted = accepted_inputs(model)
    assert {"input_ids", "attention_mask", "position_ids", "logits_to_keep"} <= accepted
    assert accepted_inputs(with_adapter(model)) == accepted


# ---- gradients ---------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_gradients_with_checkpointing_equal_those_without(make, adapter):
    """Trap 6. Two predictions before one backward pass, as in a term with a second forward."""

    def gradients(checkpointing):
        model = with_adapter(make()) if adapter else make()
        if checkpointing:
            model.gradient_checkpointing_enable()
            if adapter:
                model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)  # GPT-2 has dropout
        first, second = predicted(model, collated(), LOGPS), predicted(model, collated(EXAMPLES[:2]), LOGPS)
        (first.logps.sum() - 2 * second.logps.sum()).backward()
        assert model.is_gradient_checkpointing == checkpointing
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert len(found) == len(expected) > 0
    for name, gradient in found.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


def test_a_weight_changed_between_two_predictions_is_seen_under_autocast():
    """Trap 6: autocast keeps bfloat16 copies of weights as long as its context lasts."""
    model, batch = tiny_llama(), collated()
    with torch.autocast("cpu", torch.bfloat16):
        before = predicted(model, batch, LOGPS).logps
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(3)
        after = predicted(model, batch, LOGPS).logps
    with torch.autocast("cpu", torch.bfloat16):
        fresh = predicted(model, batch, LOGPS).logps
    assert torch.equal(after, fresh) and not torch.allclose(after, before, atol=0.1)
    (before.sum() + after.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- scores ------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A model with the same next-token probabilities [T, V] for every sequence."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.tensor(probabilities).log()

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), -1, -1))


def test_scores_by_hand():
    # Columns 0 to 3 predict tokens 1 to 4; the likeliest are 1, 2, 0.
    model = Table([[0.25, 0.5, 0.25], [0.125, 0.25, 0.625], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]])
    batch = collated(
        [
            {"input_ids": [2, 1, 1, 0], "labels": [X, 1, 1, 0]},  # 0.5 right, 0.25 wrong, 0.5 right
            {"input_ids": [1, 2], "labels": [X, 2]},  # padded by two: column 2, 0.25, wrong
        ]
    )
    scored = score(model, batch, frozenset({"input_ids"}))
    assert [row["hits"] for row in scored] == [[True, False, True], [False]]
    assert scored[0]["logps"] == pytest.approx([log(0.5), log(0.25), log(0.5)], rel=1e-6)
    assert scored[1]["logps"] == pytest.approx([log(0.25)], rel=1e-6)


@every_model
def test_scores_are_those_of_a_plain_pass_and_need_no_gradients(make):
    model = make()
    scored = score(model, collated(), accepted_inputs(model))
    for example, row in zip(EXAMPLES, scored, strict=True):
        logps, logits = plain(model, example)
        labels = torch.tensor([label for label in example["labels"] if label != X])
        assert row["logps"] == pytest.approx(logps.tolist(), rel=1e-5)
        assert row["hits"] == (logits.argmax(-1) == labels).tolist()


# ---- generation --------------------------------------------------------------------------------------------


TOKENIZER = tiny_tokenizer([], vocab=258)
PRINTABLE = 96  # the end token, another special one, and "!" to "~": every continuation is readable
PROMPTS = [[40, 41, 42, 43, 44, 45], [50, EOS_ID, 51], [60]]


def greedy(model, prompt, tokens, end=EOS_ID):
    """Token by token, the likeliest one, until the end token."""
    ids = []
    while len(ids) < tokens and end not in ids:
        with torch.no_grad():
            ids.append(model(torch.tensor([prompt + ids])).logits[0, -1].argmax().item())
    return ids


def text(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@every_model
def test_generation_is_greedy_and_the_same_in_a_padded_batch(make):
    model = make(vocab=PRINTABLE)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3)  # as a Hub model may
    expected = [text(greedy(model, prompt, 8)) for prompt in PROMPTS]
    assert len(set(expected)) == 3
    assert generate(model, TOKENIZER, PROMPTS, 8) == expected
    assert [generate(model, TOKENIZER, [prompt], 8)[0] for prompt in PROMPTS] == expected
    assert model.generation_config.do_sample and model.generation_config.temperature == 5.0


def test_an_answer_that_ends_early_is_not_continued_or_padded_visibly():
    model = tiny_llama(vocab=PRINTABLE)
    end = greedy(model, PROMPTS[0], 3)[-1]
    model.generation_config.eos_token_id = end
    expected = [greedy(model, prompt, 8, end) for prompt in PROMPTS]
    assert len(expected[0]) <= 3 < max(map(len, expected))
    assert generate(model, TOKENIZER, PROMPTS, 8) == [text(ids) for ids in expected]


def test_generation_without_a_pad_token():
    tokenizer = tiny_tokenizer([], vocab=258)
    tokenizer.pad_token = None
    model = tiny_llama(vocab=PRINTABLE)
    assert generate(model, tokenizer, PROMPTS, 4) == generate(model, TOKENIZER, PROMPTS, 4)


def test_contexts_are_asked_of_the_model_one_by_one():
    """Against the model on each text by itself, unpadded."""
    model = tiny_llama()
    examples = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 3], "labels": [-100, 3]}]
    texts = {"novice": [40, 41, 42], "expert": [43]}
    shown = [{**e, "contexts": {name: in_context(e, ids, None) for name, ids in texts.items()}} for e in examples]
    batch, accepted = RoleCollator(0).collate(shown), accepted_inputs(model)
    with torch.no_grad():
        found = predict(model, batch, frozenset({"logits", "contexts"}), accepted)
        for name, ids in texts.items():
            whole = [model(torch.tensor([ids + e["input_ids"]])).logits[0] for e in examples]
            expected = torch.cat([whole[0][-3:-1], whole[1][-2:-1]])
            torch.testing.assert_close(found.variants[name].logits, expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(found.variants[name].rows, found.rows)
        plain = predict(model, batch, frozenset({"logits"}), accepted)
    assert plain.variants is None and torch.equal(plain.logits, found.logits)
