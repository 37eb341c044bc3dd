"""Answers that the model writes itself: a fair draw, seeded one by one, the same from the cache; and those of the data."""

import copy
import json
import logging

import pytest
import torch
from tiny import tiny_tokenizer
from trainer_bed import LORA, TOKENIZER, Stop, llama, make, same, weights

from hf_clmul.data.encoding import encode
from hf_clmul.data.roles import RoleDataset
from hf_clmul.data.sources import load_examples, refusals
from hf_clmul.models import alternatives, causal_lm
from hf_clmul.models.alternatives import encoded_alternatives, own_alternatives
from hf_clmul.recipe.schema import Data

ROWS = [{"question": f"Where does number {i} live?", "answer": f"In house {i}." + i * " Far away."} for i in range(4)]
PEOPLE = {"forget": ROWS, "retain": [{"question": "What is it?", "answer": "A house."}]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/alternatives"


@pytest.fixture
def model():
    return llama()


def written(model, number=2, seed=0, rows=ROWS):
    return own_alternatives(model, TOKENIZER, [encode(row, TOKENIZER) for row in rows], number, seed)


def test_the_draw_is_the_softmax():
    """Of 4000 draws from a known distribution, whatever stands beside them; a draw follows from its seed alone."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    scores = p.log().expand(4000, 5)
    drawn = causal_lm.Sampled(range(4000))(None, scores).argmax(-1)
    frequency = drawn.bincount(minlength=5) / 4000
    assert (frequency - p).abs().max() < 0.025 and frequency[4] == 0
    alone = [causal_lm.Sampled([seed])(None, scores[:1]).argmax(-1).item() for seed in (7, 3999)]
    assert alone == drawn[[7, 3999]].tolist()
    sampler = causal_lm.Sampled([1])
    assert len({sampler(None, scores[:1]).argmax(-1).item() for _ in range(40)}) > 1  # from token to token it goes on


def test_every_example_and_number_has_a_draw_of_its_own(model, monkeypatch, cache):
    before = torch.get_rng_state()
    found = written(model)
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert [len(texts) for texts in found] == [2, 2, 2, 2]
    assert len({text for texts in found for text in texts}) == 8
    monkeypatch.setattr(alternatives, "BATCH", 3)  # rows of one example fall into two batches
    cache.joinpath(next(cache.iterdir()).name).unlink()
    assert written(model) == found
    assert written(model, seed=1) != found
    assert [texts[:2] for texts in written(model, number=3)] == found


def test_the_cache_answers_for_the_same_weights_prompts_and_settings_only(model, cache, monkeypatch):
    found = written(model)
    (file,) = cache.iterdir()
    assert json.loads(file.read_text()) == found
    with monkeypatch.context() as patched:
        patched.setattr(causal_lm, "generate", None)
        assert written(model) == found
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1e-3
    for i, other in enumerate([{}, {"number": 3}, {"seed": 1}, {"rows": ROWS[:3]}]):
        written(model, **other)
        assert len(list(cache.iterdir())) == 2 + i


def test_empty_texts_and_the_right_answer_are_dropped(model, monkeypatch, caplog):
    right = [row["answer"] for row in ROWS]
    said = {0: ["", right[0]], 1: [right[1], "other"], 2: ["one", "two"], 3: [right[2], ""]}
    flat = [said[i][n] for i in (0, 1, 2, 3) for n in (0, 1)]
    monkeypatch.setattr(causal_lm, "generate", lambda *args: flat)
    with caplog.at_level(logging.WARNING):
        assert written(model) == [refusals(), ["other"], ["one", "two"], [right[2]]]
    assert "for 1 of 4 examples" in caplog.text


def test_the_prompt_shows_the_question_and_the_answer(model, monkeypatch):
    seen = []
    monkeypatch.setattr(
        causal_lm, "generate", lambda m, t, prompts, n, seeds: seen.extend(prompts) or ["x"] * len(seeds)
    )
    written(model, number=1)
    shown = [TOKENIZER.decode(ids) for ids in seen]
    for row in ROWS:
        assert sum(row["question"] in text and row["answer"] in text for text in shown) == 1
    assert all(text.endswith("<|im_start|>assistant\n") for text in shown)
    plain, seen[:] = tiny_tokenizer(refusals(), 600, chat_template=None), []
    own_alternatives(model, plain, [encode(ROWS[0], plain)], 1, 0)
    assert plain.decode(seen[0]).endswith("In house 0.\n\nDifferent answer:")


def test_a_template_with_a_clock_asks_the_same_on_every_day(model, monkeypatch):
    clock = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    turns = "{{ date_string }}|{% for m in messages %}{{ m.content }}{% endfor %}"
    dated = tiny_tokenizer(refusals(), 600, chat_template=clock + turns)
    seen = []
    monkeypatch.setattr(
        causal_lm, "generate", lambda m, t, prompts, n, seeds: seen.extend(prompts) or ["x"] * len(seeds)
    )
    own_alternatives(model, dated, [encode(ROWS[0], dated)], 1, 0)
    assert dated.decode(seen[0]).startswith("26 Jul 2024|Below is an exchange")


def test_alternatives_are_cut_to_what_fits_after_the_prompt():
    example = encode(ROWS[3], TOKENIZER)
    prompt = example["labels"].count(-100)
    ((short, long),) = encoded_alternatives([["a", "a" * 50]], [example], TOKENIZER, prompt + 4)
    assert short == encode({**ROWS[3], "answer": "a"}, TOKENIZER)["input_ids"][prompt:] and len(long) == 4
    ((whole,),) = encoded_alternatives([["a" * 50]], [example], TOKENIZER, None)
    assert len(whole) > 4 and whole[-1] == TOKENIZER.eos_token_id


@pytest.mark.parametrize("adapter", [False, True])
def test_a_resumed_request_meets_the_same_alternatives(tmp_path, cache, adapter):
    """From the cache, and where that is gone, from the weights before the request."""
    options = {"forget": {"altpo": {"alternatives": 2}}, "max_steps": 4, "per_device_train_batch_size": 2,
               "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}  # fmt: skip
    if adapter:
        options["peft_config"] = LORA
    start = llama()
    through = make(copy.deepcopy(start), PEOPLE, tmp_path / "through", **options)
    assert "alternative" not in through.train_dataset[0]["forget"]
    through.train()
    for name, gone in (("kept", False), ("gone", True)):
        with pytest.raises(KeyboardInterrupt):
            make(copy.deepcopy(start), PEOPLE, tmp_path / name, [Stop(3)], **options).train()
        if gone:
            (file,) = cache.iterdir()
            file.unlink()
        resumed = make(copy.deepcopy(start), PEOPLE, tmp_path / name, **options)
        resumed.train(resume_from_checkpoint=True)
        assert same(weights(resumed.model), weights(through.model))
        assert resumed.train_dataset.own_alternatives == through.train_dataset.own_alternatives
    assert len(through.train_dataset.own_alternatives["forget"][0]) == 2


# ---- the column ----------------------------------------------------------------------------------------------


def test_a_column_of_the_data_becomes_the_second_answer(tmp_path):
    other = "In a boat."
    row = {**ROWS[0], "alternative": other}
    encoded = encode(row, TOKENIZER)
    assert (
        encoded["alternative_ids"]
        == encode({**ROWS[0], "answer": other}, TOKENIZER)["input_ids"][-len(encoded["alternative_ids"]) :]
    )
    assert {k: v for k, v in encoded.items() if k != "alternative_ids"} == encode(ROWS[0], TOKENIZER)
    assert encode(encoded, TOKENIZER) == encoded  # as the trainer gets it from a run
    prompt = encoded["labels"].count(-100)
    data = RoleDataset({"forget": [encoded]}, "forget", 0, own_alternatives={"forget": [[encoded["alternative_ids"]]]})
    assert data[5]["forget"]["alternative"] == {
        k: v for k, v in encode({**row, "answer": other, "alternative": None}, TOKENIZER).items()
    }
    assert len(encode(row, TOKENIZER, prompt + 3)["alternative_ids"]) == 3
    for empty in ("", "  ", None):
        assert "alternative_ids" not in encode({**row, "alternative": empty}, TOKENIZER)


def test_a_recipe_maps_its_own_name_to_the_column(tmp_path, monkeypatch):
    rows = [{"question": "q", "answer": "a", "idk": "no idea"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = load_examples(Data(path=str(tmp_path / "x.jsonl"), columns={"alternative": "idk"}), "x")
    assert row == {"id": "x-0", "question": "q", "answer": "a", "alternative": "no idea"}
