"""The one pass: what a model says of groups of examples, measured once per example, as rows from which every suite's metrics
follow (`metrics`, `suite_table`). Knows the family's `score` and `generate`; nothing of requests or training."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, send_to_device
from tqdm.auto import tqdm

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import IGNORED, encode, encode_prompt, example_format, first_label, prompt_and_completion
from hf_clmul.data.roles import permutation
from hf_clmul.errors import RecipeError
from hf_clmul.evaluation import suite_table
from hf_clmul.evaluation.gradient_norms import gradient_norms
from hf_clmul.models import causal_lm

Example = Mapping[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Measuring:
    """How to measure: batch size, tokens to generate, whether to score under bf16 autocast as in training, and whether to add
    `grad_norm`, a backward pass for each example."""

    batch_size: int
    max_new_tokens: int
    bf16: bool
    max_length: int | None = None
    gradient_norms: bool = False


def fixed_sample(examples: Sequence[Example], size: int, seed: int) -> list[Example]:
    """`size` examples, always the same ones, in their own order; all of them if there are no more."""
    chosen = sorted(permutation(len(examples), seed, "evaluation")[:size].tolist())
    return [examples[i] for i in chosen]


def measure(
    model: torch.nn.Module,
    tokenizer: Any,
    groups: Mapping[str, Sequence[Example]],
    how: Measuring,
    title: str = "evaluating",
) -> dict[str, list[Row]]:
    """Per-example statistics of each group (see `metrics`), the same and complete on every rank; each rank takes its share of
    batches that do not depend on how many ranks there are.

    One pass: the answer, the paraphrased and the wrong answers, and the answer after the paraphrased question are scored
    once each, then the greedy answer is generated. Where the most likely tokens, teacher-forced, are those of the answer,
    they are the first tokens of the greedy answer too, so that generation goes on from where the two part.

    `model` is the bare model. Its mode is given back.
    """
    state = PartialState()
    jobs = [(group, i, _last_turn(example)) for group, examples in groups.items() for i, example in enumerate(examples)]
    encoded = [
        (_texts(example, tokenizer, how.max_length), encode_prompt(example, tokenizer)) for _, _, example in jobs
    ]
    rows = [_row(example) for _, _, example in jobs]
    texts = [(i, *text) for i, (of_example, _) in enumerate(encoded) for text in of_example]
    prompts = [prompt for _, prompt in encoded]
    mode = model.training
    model.eval()
    try:
        total = (len(texts) + len(prompts)) // state.num_processes
        with tqdm(total=total, desc=title, disable=not state.is_main_process, leave=False) as bar:
            drafts = _score(rows, texts, model, tokenizer, how, bar)
            _generate(rows, prompts, drafts, model, tokenizer, how, bar)
        if how.gradient_norms:
            _add_gradient_norms(rows, [example for _, _, example in jobs], model, tokenizer, how)
    finally:
        model.train(mode)
    ordered: dict[str, list[Row]] = {group: [{}] * len(examples) for group, examples in groups.items()}
    for (group, i, _), row in zip(jobs, rows, strict=True):
        ordered[group][i] = row
    return ordered


def summary(rows: Mapping[str, Sequence[Row]], samples: int, suites: Sequence[str] = ("basic",)) -> dict[str, Any]:
    """{group: {"examples", "metrics", "counts", "intervals", "absent", "samples"}} of a results record."""
    found = suite_table.results(suites, rows)["groups"]
    return {
        group: {
            "examples": len(of_group),
            **found[group],
            "samples": [{key: row[key] for key in ("question", "answer", "generated")} for row in of_group[:samples]],
        }
        for group, of_group in rows.items()
        if of_group
    }


def score_generated(
    base: torch.nn.Module, tokenizer: Any, examples: Sequence[Example], rows: list[Row], how: Measuring, title: str
) -> None:
    """Adds `base_logps` to measured rows: what a base model thinks of their generated answers, each after its question. None
    for an empty answer."""
    texts = []
    for i, (example, row) in enumerate(zip(examples, rows, strict=True)):
        row["base_logps"] = None
        if row["generated"]:
            with suppress(RecipeError):  # nothing but special tokens, or more than fits
                texts.append(
                    (i, "base", encode(with_answer(_last_turn(example), row["generated"]), tokenizer, how.max_length))
                )
    mode, state = base.training, PartialState()
    base.eval()
    try:
        total = len(texts) // state.num_processes
        with tqdm(total=total, desc=title, disable=not state.is_main_process, leave=False) as bar:
            _score(rows, texts, base, tokenizer, how, bar)
    finally:
        base.train(mode)


def _row(example: Example) -> Row:
    question, answer = shown(example)
    wrong = example.get("perturbed_answers")
    return {
        "id": example.get("id"),
        "question": question,
        "answer": answer,
        "paraphrase_logps": None,
        "perturbed_logps": [] if wrong else None,
        "question_logps": None,
    }


def _texts(example: Example, tokenizer: Any, max_length: int | None) -> list[tuple[str, dict[str, list[int]]]]:
    """The answer, the paraphrased answer and the wrong answers, each after the same prompt, and the answer after the
    paraphrased question; encoded."""
    paraphrase, question = example.get("paraphrased_answer"), example.get("paraphrased_question")
    found = [("answer", example)] + ([("paraphrase", with_answer(example, paraphrase))] if paraphrase else [])
    found += [("perturbed", with_answer(example, text)) for text in example.get("perturbed_answers") or []]
    try:
        found += [("question", with_question(example, question))] if question else []
        return [(kind, encode(each, tokenizer, max_length)) for kind, each in found]
    except RecipeError as error:
        raise RecipeError(f"evaluation, example {example.get('id')}: {error}") from None


def _score(
    rows: list[Row],
    texts: Sequence[tuple[int, str, dict[str, list[int]]]],
    model: torch.nn.Module,
    tokenizer: Any,
    how: Measuring,
    bar: tqdm,
) -> list[list[int]]:
    """Adds to the rows what the model thinks of their texts, (index of the row, kind, encoded). Returns how the greedy answer
    of each row begins, as far as that is known from here."""
    order = sorted(range(len(texts)), key=lambda t: -len(texts[t][2]["input_ids"]))  # little padding
    collator = RoleCollator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)
    device = next(model.parameters()).device
    accepted = causal_lm.accepted_inputs(model)
    found: list[tuple[int, dict[str, list]]] = []
    for some in _mine(order, how.batch_size):
        batch = send_to_device(collator([texts[t][2] for t in some]), device)
        answers = [i for i, t in enumerate(some) if texts[t][1] == "answer"]
        with torch.autocast(device.type, torch.bfloat16) if how.bf16 else nullcontext():
            found += zip(some, causal_lm.score(model, batch, accepted, answers), strict=True)
        bar.update(len(some))
    scores = dict(gather_object(found))
    ends = None if how.bf16 else causal_lm.ends_of_greedy(model)
    drafts: list[list[int]] = [[] for _ in rows]
    for t, (i, kind, encoded) in enumerate(texts):
        predicted = scores[t].pop("predicted")
        match kind:
            case "answer":
                rows[i].update(scores[t])
                drafts[i] = _draft(encoded, predicted, scores[t]["hits"], ends)
            case "perturbed":
                rows[i]["perturbed_logps"].append(scores[t]["logps"])
            case _:
                rows[i][f"{kind}_logps"] = scores[t]["logps"]
    return drafts


def _draft(
    encoded: Mapping[str, list[int]], predicted: list[int], hits: list[bool], ends: frozenset[int] | None
) -> list[int]:
    """The greedy answer up to and with its first token that is not the answer's, or its end."""
    if ends is None or IGNORED in encoded["labels"][first_label(encoded) :]:
        return []
    until = next(
        (i for i, (token, hit) in enumerate(zip(predicted, hits, strict=True)) if token in ends or not hit), None
    )
    return predicted[: None if until is None else until + 1]


def _generate(
    rows: list[Row],
    prompts: Sequence[list[int]],
    drafts: Sequence[list[int]],
    model: torch.nn.Module,
    tokenizer: Any,
    how: Measuring,
    bar: tqdm,
) -> None:
    """Adds the greedy answers to the rows, each from where its draft ends."""
    most = how.max_new_tokens
    ends = causal_lm.ends_of_greedy(model) or ()
    open_ended = [i for i, draft in enumerate(drafts) if len(draft) < most and (not draft or draft[-1] not in ends)]
    order = sorted(open_ended, key=lambda i: (len(drafts[i]), -len(prompts[i])))  # as many steps, then little padding
    found: list[tuple[int, list[int]]] = []
    for some in _mine(order, how.batch_size):
        begun = [[*prompts[i], *drafts[i]] for i in some]
        new = causal_lm.continuations(model, tokenizer, begun, most - min(len(drafts[i]) for i in some))
        found += [(i, ids[: most - len(drafts[i])]) for i, ids in zip(some, new, strict=True)]
        bar.update(len(some))
    continued = dict(gather_object(found))
    tokens = [[*draft, *continued.get(i, ())][:most] for i, draft in enumerate(drafts)]
    for row, text in zip(rows, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
        row["generated"] = text.strip()


def _add_gradient_norms(
    rows: list[Row], examples: Sequence[Example], model: torch.nn.Module, tokenizer: Any, how: Measuring
) -> None:
    state = PartialState()
    mine = range(state.process_index, len(examples), state.num_processes)
    norms = gradient_norms(model, tokenizer, [examples[i] for i in mine], how.max_length)
    for i, norm in gather_object(list(zip(mine, norms, strict=True))):
        rows[i]["grad_norm"] = norm


def _mine(order: Sequence[int], size: int) -> list[Sequence[int]]:
    """This rank's batches."""
    state = PartialState()
    return [order[start : start + size] for start in range(0, len(order), size)][
        state.process_index :: state.num_processes
    ]


def _last_turn(example: Example) -> Example:
    """A conversation as one question: all turns before its last answer, and that answer."""
    if example_format(example) != ("messages",):
        return example
    messages = example["messages"]
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return {**example, "prompt": messages[:last], "completion": messages[last : last + 1]}


def with_answer(example: Example, text: str) -> Example:
    """The example with another answer, in its own format."""
    match example_format(example):
        case ("question", "answer"):
            return {**example, "answer": text}
        case ("prompt", "completion") if isinstance(example["prompt"], list):
            return {**example, "completion": [{"role": "assistant", "content": text}]}
        case ("prompt", "completion"):
            return {**example, "completion": text}
        case _:
            return {**example, "text": text}


def with_question(example: Example, text: str) -> Example:
    """The example with another question (of a conversation, its last one), in its own format."""
    match example_format(example):
        case ("question", "answer"):
            return {**example, "question": text}
        case ("prompt", "completion") if isinstance(example["prompt"], list):
            *before, last = example["prompt"]
            return {**example, "prompt": [*before, {**last, "content": text}]}
        case ("prompt", "completion"):
            return {**example, "prompt": text}
        case _:
            raise RecipeError("`paraphrased_question` needs a question: plain `text` has none. Remove the column.")


def shown(example: Example) -> tuple[str, str]:
    """Question and answer of an example, as a reader wants to see them."""
    match example_format(example):
        case ("text",):
            return "", example["text"]
        case ("prompt", "completion") if isinstance(example["prompt"], list):
            question, answer = ("\n".join(m["content"] for m in example[part]) for part in ("prompt", "completion"))
            return question, answer
        case ("question", "answer"):
            return example["question"], example["answer"]
        case _:
            return prompt_and_completion(example)
