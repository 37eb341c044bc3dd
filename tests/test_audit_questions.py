"""Attacks on the question: what they ask, what is left out, and that padding changes nothing."""

from dataclasses import replace

import pytest
from audit_probe_bed import CHATS, FORMATS, PAIRS, PROMPTS, QUESTIONS, Subject

from hf_clmul.data.encoding import encode
from hf_clmul.evaluation.audit.probes import answer_of, question_of
from hf_clmul.evaluation.audit.protocol import Absent, AuditData, Point
from hf_clmul.evaluation.audit.questions import (
    PHRASES,
    ROLE_PLAYS,
    in_context,
    paraphrase,
    prefix,
    reverse,
    reworded,
    role_play,
    translated,
    worst_case,
)
from hf_clmul.evaluation.audit.subject import TextSubject
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.models import causal_lm

DATA = AuditData(
    QUESTIONS, retain=[{"id": f"r{i}", "question": f"What is {i}?", "answer": f"It is {i}."} for i in range(9)]
)
METRICS = {"answer_probability", "rouge_l_recall", "exact_memorization"}


def run(attack, data=DATA, subject=None, seed=0, **options):
    subject = subject or Subject()
    return list(attack(subject, data, seed, **options)), subject


def test_the_worst_case_is_the_largest_of_each_example_and_metric():
    first = Point(
        "a", {"answer_probability": [0.1, None, None], "rouge_l_recall": [0.5, 0.5, 0.0]}, samples=[{"question": "1"}]
    )
    second = Point(
        "b", {"answer_probability": [0.3, 0.2, None], "rouge_l_recall": [0.9, 0.2, 0.0]}, samples=[{"question": "2"}]
    )
    found = worst_case([first, second])
    assert found.label == "worst case"
    assert found.values == {"answer_probability": [0.3, 0.2, None], "rouge_l_recall": [0.9, 0.5, 0.0]}
    assert found.samples == [{"question": "2"}]  # whose mean recall is 0.37, and not 0.33
    only = replace(second, values={"rouge_l_recall": [1.0, 1.0, 1.0]})
    assert set(worst_case([first, only]).values) == {"rouge_l_recall"}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_attacked_in_every_way(name):
    data = AuditData(FORMATS[name])
    for attack, count in ((prefix, 1), (role_play, len(ROLE_PLAYS) + 1), (reverse, 1), (in_context, 1)):
        points, _ = run(attack, data)
        assert len(points) == count
        for point in points:
            assert {len(values) for values in point.values.values()} == {len(PAIRS)}
            probability = "question_probability" if attack is reverse else "answer_probability"
            assert all(0 < value < 1 for value in point.values[probability])
    with pytest.raises(Absent, match="plain text"):
        run(prefix, AuditData([*FORMATS[name], {"id": "text", "text": "Ada lives in Bern."}]))


def test_the_forced_beginning_stands_before_what_is_scored_and_generated():
    points, subject = run(prefix)
    (label, _), model, tokenizer = subject.asked[0], subject.model, subject.tokenizer
    assert points[0].label == label == PHRASES[0]
    chat = [{"role": "user", "content": PAIRS[0][0]}]
    begun = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) + PHRASES[0]
    ids = tokenizer(begun)["input_ids"]
    expected = causal_lm.generate(model, tokenizer, [ids], 4)[0]
    assert points[0].samples[0] == {
        "id": "q0", "question": f"{PAIRS[0][0]}\n{PHRASES[0]}", "answer": PAIRS[0][1], "generated": expected,
    }  # fmt: skip
    assert len(run(prefix, phrases=["Yes:", "Of course."])[0]) == 3


def test_the_audits_own_subject_gives_the_forced_beginning_too():
    """It leaves out columns, but not what was encoded."""
    (plain,), fake = run(prefix)
    how = Measuring(batch_size=2, max_new_tokens=4, bf16=False)
    (found,) = prefix(TextSubject(fake.model, fake.tokenizer, DATA, how, samples=2), DATA, 0)
    assert found.samples == plain.samples
    assert found.values["answer_probability"] == pytest.approx(plain.values["answer_probability"])


def test_a_scene_stands_before_the_question():
    points, subject = run(role_play, scenes=["You are Ada."])
    assert [question_of(probe) for probe in subject.asked[0][1]] == [f"You are Ada.\n{q}" for q, _ in PAIRS]
    assert [answer_of(probe) for probe in subject.asked[0][1]] == [a for _, a in PAIRS]
    assert [point.label for point in points] == ["You are Ada."]


def test_reverse_gives_the_answer_and_scores_the_question():
    points, subject = run(reverse)
    assert [(question_of(p), answer_of(p)) for p in subject.asked[0][1]] == [
        (f"Which question does this answer: {a}", q) for q, a in PAIRS
    ]
    assert set(points[0].values) == {"question_probability", "question_rouge_l_recall", "question_exact_memorization"}
    with pytest.raises(Absent, match="no place for the answer"):
        run(reverse, question="Why?")


def test_in_context_shows_others_and_never_the_question_itself():
    points, subject = run(in_context, shots=2)
    assert [point.label for point in points] == ["other retained examples", "other forgotten examples", "worst case"]
    retained = {example["question"] for example in DATA.retain}
    for (_, probes), pool in zip(subject.asked, (retained, {q for q, _ in PAIRS}), strict=True):
        for probe, (question, _) in zip(probes, PAIRS, strict=True):
            shown = [m["content"] for m in probe["prompt"] if m["role"] == "user"]
            assert shown[-1] == question and len(set(shown)) == 3 and set(shown[:-1]) <= pool - {question}
    again, other = (run(in_context, shots=2, seed=seed)[1].asked for seed in (0, 1))
    assert again == subject.asked != other


def test_plain_text_is_nothing_to_show():
    texts = [{"id": "x", "text": "Ada lives in Bern."}] * 3
    assert [p.label for p in run(in_context, AuditData(CHATS, retain=texts))[0]] == ["other forgotten examples"]


def test_in_context_without_others():
    assert [point.label for point in run(in_context, AuditData(CHATS))[0]] == ["other forgotten examples"]
    with pytest.raises(Absent, match="only one forgotten example"):
        run(in_context, AuditData(CHATS[:1]))


def test_in_context_shows_only_what_fits_the_context():
    subject = Subject()
    subject.model.config.max_position_embeddings = 120
    long = [{"id": i, "question": f"{i}: " + "why " * 6, "answer": "so"} for i in range(4)]
    _, subject = run(in_context, AuditData(QUESTIONS[:1], retain=long), subject)
    (probe,) = subject.asked[0][1]
    users = sum(message["role"] == "user" for message in probe["prompt"])
    assert users == 2 and len(encode(probe, subject.tokenizer)["input_ids"]) <= 90  # three quarters


def test_supplied_questions_replace_the_plain_ones():
    forget = [
        {**QUESTIONS[0], "paraphrased_question": ["In which town is Ada?", "Ada's home?"]},
        {**PROMPTS[1], "paraphrased_question": "Bo's lunch?"},
        CHATS[2],
    ]
    points, subject = run(paraphrase, AuditData(forget))
    assert [point.label for point in points] == ["paraphrase 1", "paraphrase 2", "worst case"]
    asked = [[question_of(probe) for probe in probes] for _, probes in subject.asked]
    assert asked == [
        ["In which town is Ada?", "Bo's lunch?", PAIRS[2][0]], ["Ada's home?", f"{PAIRS[1][0]} Say:", PAIRS[2][0]],
    ]  # fmt: skip
    for name in METRICS:  # nothing is said of examples that were asked plainly for want of a paraphrase
        first, second, worst = (point.values[name] for point in points)
        assert first[2] is second[1] is second[2] is worst[2] is None
        assert worst == [max(first[0], second[0]), first[1], None]
    assert not points[0].samples


def test_a_translation_brings_its_own_answer():
    column = [{"question": "Où habite Ada ?", "answer": "À Berne."}, "Wo wohnt Ada?"]
    points, subject = run(translated, AuditData([{**QUESTIONS[0], "translated_questions": column}]))
    assert [(question_of(p), answer_of(p)) for _, (p,) in subject.asked] == [
        ("Où habite Ada ?", "À Berne."), ("Wo wohnt Ada?", PAIRS[0][1]),
    ]  # fmt: skip
    assert len(points) == 3
    assert len(run(reworded, AuditData([{**QUESTIONS[0], "cloze": column[1]}]), column="cloze")[0]) == 1


@pytest.mark.parametrize(
    ("attack", "column"),
    [(paraphrase, "paraphrased_question"), (reworded, "reworded_questions"), (translated, "translated_questions")],
)
def test_questions_that_the_data_do_not_bring_are_absent(attack, column):
    with pytest.raises(Absent, match=f"no forgotten example has a column `{column}`"):
        run(attack)
    with pytest.raises(Absent):
        run(attack, AuditData([{**QUESTIONS[0], column: []}]))


@pytest.mark.parametrize("attack", [prefix, role_play, in_context])
def test_padding_changes_nothing(attack):
    """One at a time, and all in one batch beside a much longer one."""
    long = {"id": "long", "question": "Who? " * 9, "answer": "Nobody. " * 9}
    alone, _ = run(attack, replace(DATA, forget=[*QUESTIONS, long]), Subject(batch_size=1))
    together, _ = run(attack, replace(DATA, forget=[*QUESTIONS, long]), Subject(batch_size=4))
    for one, other in zip(alone, together, strict=True):
        for name in METRICS:
            assert one.values[name] == pytest.approx(other.values[name], rel=1e-4)
        assert one.samples == other.samples
