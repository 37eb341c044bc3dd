"""Probes: every format of data asked in another way, down to the tokens that the model reads."""

import subprocess
import sys

import pytest
from audit_probe_bed import CHAT_TOKENIZER, FORMATS, PAIRS, PLAIN_TOKENIZER, PROMPTS, QUESTIONS, TURNS
from small_recipe import RECIPE

from hf_clmul.data.encoding import encode, first_label
from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.audit.attacks import ATTACKS, attack_parameters
from hf_clmul.evaluation.audit.probes import after, answer_of, answered, asked, opened, question_of, turn
from hf_clmul.evaluation.audit.protocol import Absent
from hf_clmul.recipe.load import load_recipe

PHRASE = "Sure, here is the answer:"
every_format = pytest.mark.parametrize("name", FORMATS)
CHAT_ONLY = ("messages", "turns")


def parts(example, tokenizer):
    """What the model reads before the answer, and the answer with its end."""
    encoded = encode(example, tokenizer)
    first = first_label(encoded)
    assert encoded["labels"][first:] == encoded["input_ids"][first:]
    return tokenizer.decode(encoded["input_ids"][:first]), tokenizer.decode(encoded["input_ids"][first:])


def tokenizers(name):
    return [CHAT_TOKENIZER] if name in CHAT_ONLY else [CHAT_TOKENIZER, PLAIN_TOKENIZER]


@every_format
def test_a_turn_asks_and_answers_and_can_be_changed(name):
    for example, (question, answer) in zip(FORMATS[name], PAIRS, strict=True):
        found = turn({**example, "paraphrased_answer": "left out"})
        asks = f"{question} Say:" if name == "prompts" else question
        assert (question_of(found), answer_of(found)) == (asks, answer)
        assert "paraphrased_answer" not in found and found["id"] == example["id"]
        for tokenizer in tokenizers(name):
            plain = parts(example, tokenizer)
            assert parts(found, tokenizer) == plain
            before, said = parts(asked(found, "Why?"), tokenizer)
            assert before == plain[0].replace(asks, "Why?") != plain[0] and said == plain[1]
            before, said = parts(answered(found, "Never."), tokenizer)
            assert before == plain[0] and said == plain[1].replace(answer, "Never.") != plain[1]


def test_a_conversation_keeps_its_earlier_turns_and_is_asked_its_last_question():
    earlier = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    messages = [*earlier, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Eve."}]
    found = asked(turn({"messages": [*messages, {"role": "user", "content": "Thanks."}]}), "Where?")
    assert found["prompt"] == [*earlier, {"role": "user", "content": "Where?"}]
    assert (question_of(found), answer_of(found)) == ("Where?", "Eve.")


def test_what_nobody_asks_is_absent():
    with pytest.raises(Absent, match="example 3 is plain text.*Give the data as prompt and completion"):
        turn({"id": 3, "text": "Ada lives in Bern."})
    answer = {"role": "assistant", "content": "Eve."}
    with pytest.raises(Absent, match="example 4 has no turn of a user"):
        turn({"id": 4, "prompt": [{"role": "system", "content": "Be brief."}], "completion": [answer]})


@every_format
def test_a_forced_beginning_is_read_and_not_scored(name):
    for example, (_, answer) in zip(FORMATS[name], PAIRS, strict=True):
        for tokenizer in tokenizers(name):
            prompt, _ = parts(example, tokenizer)
            found = opened(turn(example), tokenizer, PHRASE)
            before, said = parts(found, tokenizer)
            gap = "" if tokenizer.chat_template is not None and name != "prompts" else " "
            assert before == prompt + gap + PHRASE
            assert said == f" {answer}<|im_end|>"
            assert found["question"].endswith(f"\n{PHRASE}") and found["answer"] == answer


@pytest.mark.parametrize("name", ["questions", "messages", "turns"])
def test_other_examples_are_earlier_turns_of_a_conversation(name):
    first, second, third = map(turn, FORMATS[name])
    before, said = parts(after(third, [first, second], CHAT_TOKENIZER), CHAT_TOKENIZER)
    begin = "" if name == "questions" else "<|im_start|>system\nBe brief.<|im_end|>\n"
    shown = "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in PAIRS[:2])
    assert before == f"{begin}{shown}<|im_start|>user\n{PAIRS[2][0]}<|im_end|>\n<|im_start|>assistant\n"
    assert said == f"{PAIRS[2][1]}<|im_end|>"


def test_other_examples_are_text_where_there_is_no_conversation():
    first, second, third = map(turn, QUESTIONS)
    before, said = parts(after(third, [first, second], PLAIN_TOKENIZER), PLAIN_TOKENIZER)
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in PAIRS[:2])
    assert (before, said) == (f"{shown}Question: {PAIRS[2][0]}\nAnswer:", f" {PAIRS[2][1]}<|im_end|>")
    before, said = parts(after(turn(PROMPTS[2]), [turn(PROMPTS[0]), turn(TURNS[1])], CHAT_TOKENIZER), CHAT_TOKENIZER)
    shown = f"{PAIRS[0][0]} Say: {PAIRS[0][1]}\n\nQuestion: {PAIRS[1][0]}\nAnswer: {PAIRS[1][1]}\n\n"
    assert (before, said) == (f"{shown}{PAIRS[2][0]} Say:", f" {PAIRS[2][1]}<|im_end|>")


def test_examples_that_do_not_fit_are_left_out_from_the_first_on():
    first, second, third = map(turn, QUESTIONS)
    one = after(third, [second], CHAT_TOKENIZER)
    room = len(encode(one, CHAT_TOKENIZER)["input_ids"])
    assert after(third, [first, second], CHAT_TOKENIZER, room) == one
    assert after(third, [first, second], CHAT_TOKENIZER, room - 1) == third
    assert after(third, [first, second], CHAT_TOKENIZER, 1) == third


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("prefix: {phrases: [Yes.]}, sample: {samples: 4, threshold: 0.5}, patching: {before: full, layers: 3}", None),
        ("prefix: {phrases: []}", "audit.attacks.prefix.phrases"),
        ("role_play: {scenes: You are Ada.}", "audit.attacks.role_play.scenes"),
        ("sample: {threshold: 1.5}", "audit.attacks.sample.threshold"),
        ("sample: {samples: 0}", "audit.attacks.sample.samples"),
        ("in_context: {shots: 0}", "audit.attacks.in_context.shots"),
        ("logit_lens: {layer: 3}", "audit.attacks.logit_lens.layer"),
    ],
)
def test_options_are_checked_in_the_recipe(tmp_path, given, wrong):
    file = tmp_path / "recipe.yaml"
    (tmp_path / "notes.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')
    file.write_text(f"{RECIPE}audit: {{attacks: {{{given}}}}}\n")
    if wrong is None:
        assert load_recipe(file).audit.attacks["sample"] == {"samples": 4, "threshold": 0.5}
    else:
        with pytest.raises(RecipeError, match=wrong):
            load_recipe(file)


def test_the_table_of_attacks_needs_no_torch():
    code = "import sys, hf_clmul.evaluation.audit.attacks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documentation_names_every_option(repo):
    text = (repo / "docs" / "audit.md").read_text().split("## Attacks on pictures")[0]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    assert not {name for name in ATTACKS if name not in rows}
    probes = {name for name, entry in ATTACKS.items() if entry.changes != "weights" and entry.family == "causal_lm"}
    rows = {name: row for name, row in rows.items() if name in probes}
    for name, row in rows.items():
        for option, (_, default) in attack_parameters(name).items():
            assert f"`{option}" in row, (name, option)
            if isinstance(default, int | float):
                assert f"{option}: {default}`" in row, (name, option)
