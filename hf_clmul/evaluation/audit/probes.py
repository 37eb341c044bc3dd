"""An example asked in another way: another question before the same answer, a forced beginning, other examples before it. Knows
the formats of examples and how they are encoded; no scores, no attack."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_clmul.data.encoding import IGNORED, chat, encode, example_format, first_label, prompt_and_completion
from hf_clmul.evaluation.audit.protocol import Absent, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BETWEEN = "\n\n"
"""Between examples that are shown one after the other as plain text."""


def turn(example: Example) -> dict[str, Any]:
    """The example as one question and its answer, {"id", "question", "answer"} or {"id", "prompt", "completion"}: of a
    conversation its last answer. Columns beside these, such as wrong answers, are left out.

    Raises Absent for plain text, which nothing asks for, and for a conversation without a question.
    """
    names = example_format(example)
    if names == ("text",):
        raise Absent(
            f"example {example.get('id')} is plain text, and this attack works with questions. "
            "Give the data as prompt and completion: the beginning of each text, and the rest."
        )
    if names != ("messages",):
        found = {name: example[name] for name in names}
    else:
        messages = example["messages"]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        found = {"prompt": messages[:last], "completion": messages[last : last + 1]}
    if isinstance(found.get("prompt"), list) and _asking(found["prompt"]) is None:
        raise Absent(f"the conversation of example {example.get('id')} has no turn of a user before its last answer.")
    return {"id": example.get("id"), **found}


def question_of(example: Example) -> str:
    """What a `turn` asks: the question, the prompt, or the user's last message."""
    prompt = example["question"] if "question" in example else example["prompt"]
    return prompt if isinstance(prompt, str) else prompt[_asking(prompt)]["content"]


def answer_of(example: Example) -> str:
    """The answer of a `turn`, without white space around it."""
    answer = example["answer"] if "question" in example else example["completion"]
    return (answer if isinstance(answer, str) else "\n".join(message["content"] for message in answer)).strip()


def asked(example: Example, question: str) -> dict[str, Any]:
    """The `turn` with another question. Of a conversation, all but the user's last message stays."""
    if "question" in example:
        return {**example, "question": question}
    if isinstance(example["prompt"], str):
        return {**example, "prompt": question}
    messages = list(example["prompt"])
    at = _asking(messages)
    messages[at] = {**messages[at], "content": question}
    return {**example, "prompt": messages}


def answered(example: Example, answer: str) -> dict[str, Any]:
    """The `turn` with another answer. White space before a completion, which may belong to its first token, stays."""
    if "question" in example:
        return {**example, "answer": answer}
    if isinstance(example["completion"], list):
        return {**example, "completion": [{"role": "assistant", "content": answer}]}
    old = example["completion"]
    return {**example, "completion": old[: len(old) - len(old.lstrip())] + answer}


def opened(example: Example, tokenizer: "PreTrainedTokenizerBase", phrase: str) -> dict[str, Any]:
    """The `turn` with an answer that begins with `phrase`, encoded so that the phrase is given and only what follows it is the
    answer: what is generated goes on behind it."""
    answer = answer_of(example)
    whole, alone = (encode(answered(example, text), tokenizer) for text in (f"{phrase} {answer}", phrase))
    begin = end = first_label(whole)
    for found, wanted in zip(whole["input_ids"][begin:], alone["input_ids"][begin:], strict=False):
        if found != wanted:
            break
        end += 1
    labels = [*whole["labels"][:begin], *[IGNORED] * (end - begin), *whole["labels"][end:]]
    shown = {"id": example.get("id"), "question": f"{question_of(example)}\n{phrase}", "answer": answer}
    return {**shown, "input_ids": whole["input_ids"], "labels": labels}


def after(
    example: Example, others: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", room: int | None = None
) -> dict[str, Any]:
    """The `turn` behind other ones with their answers: earlier turns of the conversation, where the model has a chat template
    and the example is one, else plain text. Of more tokens than `room` in all, the first others are left out."""
    for start in range(len(others) + 1):
        found = _after(example, others[start:], tokenizer)
        if start == len(others) or room is None or len(encode(found, tokenizer)["input_ids"]) <= room:
            return found
    raise AssertionError


def context_length(model: Any) -> int | None:
    """Tokens that the model can read at once; None where its config sets no limit."""
    config = model.config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


def _after(example: Example, others: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    if not others:
        return dict(example)
    if chat(example, tokenizer) is None:
        prompt, completion = prompt_and_completion(example)
        shown = BETWEEN.join("".join(prompt_and_completion(_plain(other))) for other in others)
        return {"id": example.get("id"), "prompt": shown + BETWEEN + prompt, "completion": completion}
    if "question" in example:
        own = [{"role": "user", "content": example["question"]}]
        completion = [{"role": "assistant", "content": example["answer"]}]
    else:
        own, completion = list(example["prompt"]), list(example["completion"])
    pairs = [(("user", question_of(other)), ("assistant", answer_of(other))) for other in others]
    turns = [{"role": role, "content": content} for pair in pairs for role, content in pair]
    lead = 1 if own[0]["role"] == "system" else 0
    return {"id": example.get("id"), "prompt": own[:lead] + turns + own[lead:], "completion": completion}


def _plain(other: Example) -> Example:
    """A turn as text: messages, which a model without a chat template cannot read, as question and answer."""
    if isinstance(other.get("prompt"), list):
        return {"question": question_of(other), "answer": answer_of(other)}
    return other


def _asking(messages: Sequence[Example]) -> int | None:
    """Place of the last message of a user."""
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
