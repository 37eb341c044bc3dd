"""One pass per example: vocabulary moments and paraphrased questions as plain passes give them, greedy answers that go on
from what scoring knows of them, and the same table on two ranks as on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_suites import GROUPS, HOW, PEOPLE, TOKENIZER, by_hand, generated_by_hand
from tiny import tiny_gpt2, tiny_llama

from hf_clmul.data.encoding import encode
from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.suites import Measuring, measure
from hf_clmul.models import causal_lm

TEXT = [{"id": f"text-{i}", "text": f"Once there were {'many ' * i}people."} for i in range(2)]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_moments_are_those_of_the_whole_distribution(make):
    model = make(vocab=len(TOKENIZER))
    for example, row in zip(PEOPLE, measure(model, TOKENIZER, {"forget": PEOPLE}, HOW)["forget"], strict=True):
        encoded = encode(example, TOKENIZER)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].double()
        at = [t - 1 for t, label in enumerate(encoded["labels"]) if label != -100]
        logps = logits[at].log_softmax(-1)
        means = (logps.exp() * logps).sum(-1)
        squares = (logps.exp() * logps.square()).sum(-1)
        assert row["token_means"] == pytest.approx(means.tolist(), abs=1e-4)
        assert row["token_deviations"] == pytest.approx((squares - means.square()).sqrt().tolist(), abs=1e-4)
        assert len(row["token_means"]) == len(row["logps"])


def test_an_impossible_token_adds_nothing_to_the_moments():
    """p = 1/2, 1/2, 0: every possible token has log p = -log 2."""
    means, deviations = causal_lm._moments(torch.tensor([[0.0, 0.0, -torch.inf]]))
    assert means.tolist() == pytest.approx([-0.6931472]) and deviations.tolist() == [0.0]


def test_the_answer_is_scored_after_the_paraphrased_question_too():
    model = tiny_llama(vocab=len(TOKENIZER))
    other = "Tell me who that is!"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chat = {"id": "c", "prompt": [*turns, {"role": "user", "content": "Who?"}],
            "completion": [{"role": "assistant", "content": "You."}]}  # fmt: skip
    plain = {"id": "p", "prompt": "Say 1:", "completion": " one"}
    asked = {"id": "q", **{key: PEOPLE[2][key] for key in ("question", "answer")}}
    rows = measure(
        model, TOKENIZER, {"g": [{**e, "paraphrased_question": other} for e in (chat, plain, asked)] + [asked]}, HOW
    )["g"]
    expected = [
        {**chat, "prompt": [*turns, {"role": "user", "content": other}]}, {**plain, "prompt": other},
        {**asked, "question": other},
    ]  # fmt: skip
    for row, example in zip(rows, expected, strict=False):
        assert row["question_logps"] == pytest.approx(by_hand(model, example)[0], abs=1e-4)
        assert row["question_logps"] != pytest.approx(row["logps"], abs=1e-3)
    assert rows[3]["question_logps"] is None
    with pytest.raises(RecipeError, match="example text-0: `paraphrased_question` needs a question"):
        measure(model, TOKENIZER, {"g": [{**TEXT[0], "paraphrased_question": other}]}, HOW)


def test_nothing_is_scored_twice(monkeypatch):
    scored: list[int] = []
    whole = causal_lm.score
    monkeypatch.setattr(
        causal_lm,
        "score",
        lambda model, batch, *rest: scored.append(len(batch["input_ids"])) or whole(model, batch, *rest),
    )
    rows = [{**row, "paraphrased_question": "Who?"} for row in PEOPLE]
    measure(tiny_llama(vocab=len(TOKENIZER)), TOKENIZER, {"forget": rows}, HOW)
    assert sum(scored) == len(PEOPLE) * (1 + 1 + 2 + 1)  # answer, paraphrase, two wrong answers, paraphrased question


# ---- greedy answers --------------------------------------------------------------------------------------------------


def memorised(make=tiny_llama):
    """Knows the first answers by heart, and others not to the end."""
    model = make(vocab=len(TOKENIZER)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = [encode(example, TOKENIZER) for example in (*PEOPLE[:3], TEXT[1])]
    for _ in range(60):
        for encoded in batches:
            model(**{k: torch.tensor([v]) for k, v in encoded.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("most", [2, 6, 40])
def test_the_greedy_answer_is_the_same_however_much_of_it_scoring_knows(monkeypatch, most):
    model, how = memorised(), Measuring(3, most, bf16=False)
    groups = {"known": PEOPLE[:3], "others": [*PEOPLE[3:], *GROUPS["held_out"]], "text": TEXT}
    begun: list[int] = []
    whole = causal_lm.continuations
    monkeypatch.setattr(
        causal_lm, "continuations", lambda model, tokenizer, prompts, new: begun.extend(map(len, prompts))
        or whole(model, tokenizer, prompts, new),
    )  # fmt: skip
    rows = measure(model, TOKENIZER, groups, how)
    assert [row["hits"][:-1] for row in rows["known"]] == [[True] * (len(row["hits"]) - 1) for row in rows["known"]]
    for name, examples in groups.items():
        for example, row in zip(examples, rows[name], strict=True):
            assert row["generated"] == generated_by_hand(model, example, most)
    assert len(begun) < sum(map(len, groups.values())), "what is known by heart needs no generation"


@pytest.mark.parametrize("change", ["bf16 weights", "suppressed"])
def test_where_the_likeliest_token_may_not_be_the_next_generation_begins_at_the_prompt(change):
    model = memorised()
    if change == "suppressed":
        first = encode(PEOPLE[0], TOKENIZER)
        token = next(label for label in first["labels"] if label != -100)
        model.generation_config.suppress_tokens = [token]
    else:
        model = model.bfloat16()
    assert causal_lm.ends_of_greedy(model) is None
    known = measure(model, TOKENIZER, {"g": PEOPLE[:1]}, HOW)["g"][0]
    prompt = encode(PEOPLE[0], TOKENIZER)["input_ids"]
    prompt = prompt[: next(t for t, label in enumerate(encode(PEOPLE[0], TOKENIZER)["labels"]) if label != -100)]
    assert known["generated"] == causal_lm.generate(model, TOKENIZER, [prompt], 6)[0]


# ---- ranks -----------------------------------------------------------------------------------------------------------

_RANK = """
import json, os, sys, torch
from test_one_pass import TEXT, memorised
from test_suites import GROUPS, HOW, TOKENIZER
from accelerate import PartialState
from hf_clmul.evaluation.suites import measure
torch.set_num_threads(1)
state = PartialState(cpu=True)
assert state.num_processes == 2
rows = measure(memorised(), TOKENIZER, {**GROUPS, "text": TEXT}, HOW)
open(f"{sys.argv[1]}/rank{state.process_index}.json", "w").write(json.dumps(rows))
"""


def test_two_ranks_measure_what_one_does_to_the_bit(tmp_path: Path):
    import json
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path)], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": path},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    told = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told
    one = json.loads(json.dumps(measure(memorised(), TOKENIZER, {**GROUPS, "text": TEXT}, HOW)))
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == one
