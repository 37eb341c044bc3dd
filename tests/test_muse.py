"""MUSE: hand-computed memorization, gaps and curves, and what is absent and why."""

import pytest
from tiny import tiny_tokenizer

from hf_clmul.evaluation.membership import mia
from hf_clmul.evaluation.muse import (
    NONE_OF,
    PROMPT_TOKENS,
    TOKENS,
    groups_of,
    muse,
    scalability,
    sustainability,
    verbatim_example,
)
from hf_clmul.evaluation.suite_result import NO_REFERENCE


def row(question, answer, generated, logp=-1.0):
    return {"question": question, "answer": answer, "generated": generated, "logps": [logp] * 3}


def tables(first, second, logp):
    """F1 of the first answer: 1 for "one two", 1/2 for "one three", 2/3 for "one", 0 for nothing."""
    return {
        "forget": [row("a", "one two", first, logp), row("b", "one two", second, logp - 1)],
        "held_out": [row("h", "one", "", -2.0), row("i", "one", "", -4.0)],
        "forget_knowledge": [row("a", "one two", first), row("b", "one two", second)],
        "retain_knowledge": [row("r", "one two", first)],
        "forget_verbatim": [row("v", "one two", second)],
    }


RUN, REFERENCE = tables("one two", "one three", -1.0), tables("one", "", -3.0)


def test_the_four_sides_and_their_distance_to_the_reference():
    found = muse(RUN, REFERENCE)
    assert found.absent == {}
    values = {name: estimate.value for name, estimate in found.metrics.items()}
    assert values == pytest.approx(
        {
            "knowledge_memorization": 3 / 4,
            "knowledge_memorization_gap": 3 / 4 - 1 / 3,
            "utility_preservation": 1.0,
            "utility_preservation_gap": 1 / 3,
            "verbatim_memorization": 1 / 2,
            "verbatim_memorization_gap": 1 / 2,
            # AUC of -1, -2 and of -3, -4 against -2, -4: 3.5/4 and 1.5/4
            "privleak": 100 * (1.5 - 3.5) / 2.5,
        },
        rel=1e-12,
    )
    assert {name: estimate.n for name, estimate in found.metrics.items()} == {
        "knowledge_memorization": 2, "knowledge_memorization_gap": 2, "utility_preservation": 1,
        "utility_preservation_gap": 1, "verbatim_memorization": 1, "verbatim_memorization_gap": 1, "privleak": 4,
    }  # fmt: skip
    assert found.metrics["knowledge_memorization"].low == pytest.approx(1 / 2)
    assert found.metrics["utility_preservation"].low is None, "one example has no interval"
    assert found.metrics["privleak"] == mia(RUN, REFERENCE).metrics["privleak"]


def test_what_is_not_there_is_absent_with_its_reason():
    found = muse({name: RUN[name] for name in ("forget", "forget_knowledge")})
    assert set(found.metrics) == {"knowledge_memorization"}
    assert found.absent == {
        "knowledge_memorization_gap": NO_REFERENCE,
        "utility_preservation": NONE_OF["retain_knowledge"],
        "utility_preservation_gap": NONE_OF["retain_knowledge"],
        "verbatim_memorization": NONE_OF["forget_verbatim"],
        "verbatim_memorization_gap": NONE_OF["forget_verbatim"],
        "privleak": NO_REFERENCE,
    }


def test_answers_that_rouge_cannot_read_are_absent_and_not_zero():
    other = {**RUN, "retain_knowledge": [row("r", "東京", "東京")]}
    found = muse(other, other)
    reason = "no answer of the group retain_knowledge has words of a-z and 0-9, which ROUGE-L compares"
    assert found.absent == {"utility_preservation": reason, "utility_preservation_gap": reason}


def test_a_passage_is_cut_into_prompt_and_continuation():
    text = " ".join(f"word{i}" for i in range(200))
    tokenizer = tiny_tokenizer([text])
    ids = tokenizer(text)["input_ids"]
    found = verbatim_example(text, tokenizer, 10)
    assert found["prompt"] + found["completion"] == tokenizer.decode(ids[: 10 + 128])
    assert tokenizer(found["completion"])["input_ids"] == ids[10:138] and TOKENS["forget_verbatim"] == 128
    assert verbatim_example("word1", tokenizer, 50) is None


def test_groups_are_passages_and_questions():
    tokenizer = tiny_tokenizer(["a b c d e f g h"])
    question, other = {"question": "q", "answer": "a"}, {"question": "p", "answer": "b"}
    long = "h " * 300
    found = groups_of(
        {"forget": [{"id": 7, "text": "a b c d"}, question, {"text": ""}, {"text": long}], "retain": [other]}, tokenizer
    )
    short, cut = found["forget_verbatim"]
    assert short["prompt"] + short["completion"] == "a b c d" and len(tokenizer(short["prompt"])["input_ids"]) == (
        len(tokenizer("a b c d")["input_ids"]) // 2
    )
    assert len(tokenizer(cut["prompt"])["input_ids"]) == PROMPT_TOKENS
    assert short["id"] == 7, "by which a scan knows what is left of the passage"
    assert found["forget_knowledge"] == [question] and found["retain_knowledge"] == [other]
    named = groups_of({"forget": [{"text": "a b c d"}], "forget_knowledge": [other]}, tokenizer)
    assert named["forget_knowledge"] == [other] and named["retain_knowledge"] == []


def test_scalability_orders_by_size_and_averages_seeds():
    def record(size, **metrics):
        return {"forget_examples": size, "metrics": metrics}

    found = scalability(
        [record(40, f1=0.25, utility=None), record(20, f1=0.5, utility=0.75), record(80, f1=0.125, utility=0.25),
         record(20, f1=0.25)]
    )  # fmt: skip
    assert found == {
        "f1": {"points": [[20, 0.375], [40, 0.25], [80, 0.125]], "change": -0.25},
        "utility": {"points": [[20, 0.75], [80, 0.25]], "change": -0.5},
    }


def test_sustainability_counts_requests():
    found = sustainability(
        [{"metrics": {"f1": 1.0, "x": None}}, {"metrics": {"f1": 0.5}}, {"metrics": {"f1": 0.25, "x": 1.0}}]
    )
    assert found == {
        "f1": {"points": [[0, 1.0], [1, 0.5], [2, 0.25]], "change": -0.75},
        "x": {"points": [[2, 1.0]], "change": None},
    }


def test_a_change_needs_two_ends():
    assert scalability([]) == sustainability([]) == {}
    assert sustainability([{"metrics": {"f1": 1.0}}]) == {"f1": {"points": [[0, 1.0]], "change": None}}
