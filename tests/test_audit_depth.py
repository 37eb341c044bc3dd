"""Looking inside: the lens against hand-made passes, the mathematics of erasure by hand, and patching on tiny models."""

import math

import pytest
import torch
from audit_probe_bed import CHAT_TOKENIZER, CHATS, FORMATS, QUESTIONS, Subject
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import encode, first_label
from hf_clmul.evaluation.audit.depth import (
    chosen_layers,
    depth_score,
    erasures,
    logit_lens,
    patched_drops,
    patching,
    unlearning_depth,
)
from hf_clmul.evaluation.audit.protocol import Absent, AuditData, Point
from hf_clmul.models import causal_lm, hidden

VOCAB = len(CHAT_TOKENIZER)
LONG = {"id": "long", "question": "Who? " * 9, "answer": "Nobody. " * 9}
DATA = AuditData([*QUESTIONS, LONG])
every_model = pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])


def subject(make=tiny_llama, seed=0, layers=3):
    return Subject(model=make(vocab=VOCAB, layers=layers, seed=seed))


# ---- logit lens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "count", "layers"), [(3, 12, [0, 1, 2]), (30, 3, [9, 19, 29]), (5, 2, [1, 4]), (7, 1, [6])]
)
def test_layers_are_evenly_spaced_and_the_last_is_one_of_them(depth, count, layers):
    assert chosen_layers(depth, count) == layers


@every_model
def test_the_last_layer_is_the_whole_model(make):
    audited = subject(make)
    points = list(logit_lens(audited, DATA, 0))
    own = audited.measure("plain", forget=DATA.forget)
    assert [(point.x, point.label) for point in points] == [(k, f"layer {k} of 3") for k in (1, 2, 3)]
    assert points[-1].values["lens_probability"] == pytest.approx(own.values["answer_probability"], rel=1e-4)
    assert points[-1].values["lens_hits"] == own.values["exact_memorization"]
    assert not any(block._forward_hooks for block in hidden.blocks(audited.model))


@every_model
def test_a_layer_is_read_through_the_models_own_norm_and_head(make):
    """Against transformers' own hidden states, each example by itself and unpadded."""
    audited = subject(make)
    model = audited.model
    norm = model.model.norm if hasattr(model, "model") else model.transformer.ln_f
    first, second, _ = logit_lens(audited, DATA, 0, batch_size=3)
    for point, at in ((first, 1), (second, 2)):
        for i, example in enumerate(DATA.forget):
            encoded = encode(example, CHAT_TOKENIZER)
            begin = first_label(encoded)
            with torch.no_grad():
                states = model(torch.tensor([encoded["input_ids"]]), output_hidden_states=True).hidden_states[at][0]
                logits = model.get_output_embeddings()(norm(states))[begin - 1 : -1]
            targets = torch.tensor(encoded["labels"][begin:])
            own = logits.gather(1, targets[:, None])
            ranks = (logits > own).sum(-1).add(1).double()
            logps = logits.log_softmax(-1).gather(1, targets[:, None])
            assert point.values["lens_probability"][i] == pytest.approx(logps.mean().exp().item(), rel=1e-4)
            assert point.values["lens_reciprocal_rank"][i] == pytest.approx((1 / ranks[:-1]).mean().item(), rel=1e-6)
            assert point.values["lens_hits"][i] == pytest.approx((ranks[:-1] == 1).double().mean().item())


def test_the_lens_reads_every_format_and_plain_text():
    for examples in (*FORMATS.values(), [{"id": 1, "text": "Ada lives in Bern."}]):
        points = list(logit_lens(subject(), AuditData(examples), 0, layers=1))
        assert [point.label for point in points] == ["layer 3 of 3"]
        assert len(points[0].values["lens_probability"]) == len(examples)


# ---- the mathematics ---------------------------------------------------------------------------------------


def test_erasures_by_hand():
    # Half; nothing lies there; more than in the retrained model; less than nothing.
    assert erasures([0.5, 0.3, 9.0, -0.1], [1.0, 0.05, 3.0, 0.5]) == [0.5, None, 1.0, 0.0]
    assert erasures([0.03], [0.06], threshold=0.1) == [None]


def test_the_depth_score_weighs_layers_by_what_lies_there():
    assert depth_score([0.5, 0.3, 9.0, -0.1], [1.0, 0.05, 3.0, 0.5]) == pytest.approx((0.5 + 3.0) / 4.5)
    assert depth_score([0.0, 0.0], [1.0, 2.0]) == 0.0 and depth_score([1.0, 2.0], [1.0, 2.0]) == 1.0
    assert depth_score([1.0, 1.0], [0.05, -1.0]) is None


def test_the_depth_of_each_example_from_points():
    run = [Point("", {"patched_drop": [0.5, 0.0]}, 1.0), Point("", {"patched_drop": [3.0, 0.0]}, 2.0)]
    reference = [Point("", {"patched_drop": [1.0, 0.0]}, 1.0), Point("", {"patched_drop": [3.0, 0.01]}, 2.0)]
    assert unlearning_depth(run, reference).values == {"unlearning_depth": [pytest.approx(3.5 / 4), None]}
    for other in (reference[:1], reference[::-1], []):
        with pytest.raises(ValueError, match="at the same layers"):
            unlearning_depth(run, other)
    with pytest.raises(ValueError, match="at the same layers"):
        unlearning_depth([], [])


# ---- patching ----------------------------------------------------------------------------------------------


def points(full, audited, examples=DATA.forget, **options):
    return [
        Point("", {"patched_drop": drops}, layer)
        for layer, _, drops in patched_drops(full, audited, examples, **options)
    ]


def learned(audited):
    """Knows the answers, so that there is something to lose."""
    batch = RoleCollator(CHAT_TOKENIZER.pad_token_id).collate([encode(e, CHAT_TOKENIZER) for e in DATA.forget])
    optimizer = torch.optim.Adam(audited.model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        predicted = causal_lm.predict(
            audited.model, batch, frozenset({"logps"}), causal_lm.accepted_inputs(audited.model)
        )
        (-predicted.logps.mean()).backward()
        optimizer.step()
    return audited


@every_model
def test_identical_states_erase_nothing_and_retrained_ones_all(make):
    full, retrained = learned(subject(make)), subject(make, seed=1)
    of_full, of_retrained = points(full.model, full), points(full.model, retrained)
    for point in of_full:
        assert point.values["patched_drop"] == pytest.approx([0.0] * 4, abs=1e-5)
    assert unlearning_depth(of_full, of_retrained).values["unlearning_depth"] == pytest.approx([0.0] * 4, abs=1e-4)
    assert unlearning_depth(of_retrained, of_retrained).values["unlearning_depth"] == [1.0] * 4


@every_model
def test_a_patched_pass_by_hand(make):
    """Behind layer 1, from the column before the answer to the one before its last token; unpadded."""
    full, audited = subject(make), subject(make, seed=1)
    found = points(full.model, audited, batch_size=3)[1].values["patched_drop"]
    for i, example in enumerate(DATA.forget):
        encoded = encode(example, CHAT_TOKENIZER)
        ids, begin = torch.tensor([encoded["input_ids"]]), first_label(encoded)
        targets = torch.tensor(encoded["labels"][begin:])

        def mean_logp(ids=ids, begin=begin, targets=targets):
            with torch.no_grad():
                logits = full.model(ids).logits[0, begin - 1 : -1]
            return logits.log_softmax(-1).gather(1, targets[:, None]).mean().item()

        with torch.no_grad():
            states = audited.model(ids, output_hidden_states=True).hidden_states[2][0]

        def patch(module, inputs, output, states=states, begin=begin):
            own = (output[0] if isinstance(output, tuple) else output).clone()
            own[0, begin - 1 : -1] = states[begin - 1 : -1]
            return (own, *output[1:]) if isinstance(output, tuple) else own

        plain = mean_logp()
        handle = hidden.blocks(full.model)[1].register_forward_hook(patch)
        patched = mean_logp()
        handle.remove()
        assert found[i] == pytest.approx(plain - patched, abs=1e-4) and math.fabs(plain - patched) > 1e-3


def test_only_what_the_layers_below_lost_is_missing():
    """A model that differs in its last layer alone: patched below it, nothing is lost."""
    full, shallow = subject(), subject()
    with torch.no_grad():
        hidden.blocks(shallow.model)[2].mlp.down_proj.weight.mul_(-3)
    first, second, last = (point.values["patched_drop"] for point in points(full.model, shallow))
    assert first == pytest.approx([0.0] * 4, abs=1e-5) and second == pytest.approx([0.0] * 4, abs=1e-5)
    assert min(map(abs, last)) > 1e-3


def saved(tmp_path, model, tokenizer=CHAT_TOKENIZER):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_attack_takes_the_model_before_from_its_folder(tmp_path):
    full, audited = subject(), subject(seed=1)
    folder = saved(tmp_path, full.model)
    found = list(patching(audited, AuditData(CHATS), 0, before=folder))
    assert [(point.x, point.label) for point in found] == [(k, f"layer {k} of 3") for k in (1, 2, 3)]
    expected = points(full.model, audited, CHATS)
    assert [point.values for point in found] == [point.values for point in expected]
    assert [point.x for point in patching(audited, AuditData(CHATS), 0, before=folder, layers=1)] == [3]


def test_patching_without_a_model_that_fits_is_absent(tmp_path):
    with pytest.raises(Absent, match="it needs the model before unlearning: give its folder"):
        next(patching(subject(), DATA, 0))
    with pytest.raises(Absent, match="could not be loaded"):
        next(patching(subject(), DATA, 0, before=str(tmp_path / "nowhere")))
    folder = saved(tmp_path / "deep", tiny_llama(vocab=VOCAB, layers=2))
    with pytest.raises(Absent, match="2 layers of width 32 .llama., and the subject 3 layers"):
        next(patching(subject(), DATA, 0, before=folder))
    folder = saved(tmp_path / "words", tiny_llama(vocab=VOCAB, layers=3), tiny_tokenizer(["other words"]))
    with pytest.raises(Absent, match="one vocabulary"):
        next(patching(subject(), DATA, 0, before=folder))
