"""What the TOFU suite costs in one pass against each metric with forward passes and generations of its own, in one run.

`python scripts/bench_suites.py [--recipe mini/npo] [KEY=VALUE ...]` learns the recipe's data, then measures both ways and asserts
that the numbers are the same. Two ratios are printed: with model utility and forget quality taken from the values of the
other metrics, and with passes of their own as all others. Unrelated people stand in for real authors and world facts.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from bed import Bed

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import encode, encode_prompt
from hf_clmul.data.sources import load_examples
from hf_clmul.evaluation import metrics
from hf_clmul.evaluation.suite_table import FORGET, GENERAL, RETAIN, results
from hf_clmul.evaluation.suites import Measuring, measure, shown, with_answer, with_question
from hf_clmul.models import causal_lm

ANSWER, PARAPHRASE, WRONG, QUESTION, GENERATED = "answer", "paraphrase", "wrong", "question", "generated"
RATIO = (PARAPHRASE, WRONG)
NEEDS: dict[str, tuple[Callable[[Any], float | None], tuple[str, ...]]] = {
    "answer_probability": (metrics.answer_probability, (ANSWER,)),
    "normalised_probability": (metrics.normalised_probability, (ANSWER, WRONG)),
    "paraphrase_probability": (metrics.paraphrase_probability, (PARAPHRASE,)),
    "rouge_l_recall": (metrics.rouge_l_recall, (GENERATED,)),
    "truth_ratio_near_one": (metrics.forget_truth_ratio, RATIO),
    "truth_ratio_truth_first": (metrics.kept_truth_ratio, RATIO),
    "truth_share": (metrics.truth_share, RATIO),
    "extraction_strength": (metrics.extraction_strength, (ANSWER,)),
    "exact_memorization": (metrics.exact_memorization, (ANSWER,)),
    "question_probability": (metrics.question_probability, (QUESTION,)),
}
"""A metric, and what it asks of the model. `truth_ratio` is one of two of these, by group."""


class Apart:
    """Each metric with its own passes."""

    def __init__(self, model: Any, tokenizer: Any, how: Measuring) -> None:
        self.model, self.tokenizer, self.how = model.eval(), tokenizer, how
        self.accepted = causal_lm.accepted_inputs(model)
        self.collator = RoleCollator(tokenizer.pad_token_id or tokenizer.eos_token_id)

    def value(self, name: str, examples: Sequence[Mapping[str, Any]]) -> float | None:
        function, needs = NEEDS[name]
        rows = self.rows(needs, examples)
        return metrics.mean_of(function(row) for row in rows)

    def rows(self, needs: tuple[str, ...], examples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"answer": shown(e)[1], "paraphrase_logps": None, "perturbed_logps": None} for e in examples
        ]
        if ANSWER in needs:
            for row, scored in zip(found, self.scores(examples), strict=True):
                row |= scored
        if PARAPHRASE in needs:
            for row, scored in zip(
                found, self.scores([with_answer(e, e["paraphrased_answer"]) for e in examples]), strict=True
            ):
                row["paraphrase_logps"] = scored["logps"]
        if WRONG in needs:
            wrong = [with_answer(e, text) for e in examples for text in e["perturbed_answers"]]
            scores = iter(self.scores(wrong))
            for row, e in zip(found, examples, strict=True):
                row["perturbed_logps"] = [next(scores)["logps"] for _ in e["perturbed_answers"]]
        if QUESTION in needs:
            asked = [with_question(e, e["paraphrased_question"]) for e in examples]
            for row, scored in zip(found, self.scores(asked), strict=True):
                row["question_logps"] = scored["logps"]
        if GENERATED in needs:
            for row, text in zip(found, self.generated(examples), strict=True):
                row["generated"] = text
        return found

    def scores(self, examples: Sequence[Mapping[str, Any]]) -> list[dict[str, list]]:
        encoded = [encode(e, self.tokenizer) for e in examples]
        return self._batched([len(e["input_ids"]) for e in encoded], lambda some: causal_lm.score(
            self.model, self.collator([encoded[i] for i in some]), self.accepted, ()
        ))  # fmt: skip

    def generated(self, examples: Sequence[Mapping[str, Any]]) -> list[str]:
        prompts = [encode_prompt(e, self.tokenizer) for e in examples]
        return self._batched([len(ids) for ids in prompts], lambda some: causal_lm.generate(
            self.model, self.tokenizer, [prompts[i] for i in some], self.how.max_new_tokens
        ))  # fmt: skip

    def _batched(self, lengths: Sequence[int], work: Callable[[Sequence[int]], list[Any]]) -> list[Any]:
        """As the one pass does it: sorted by length, so that there is little padding."""
        order, found = sorted(range(len(lengths)), key=lambda i: -lengths[i]), {}
        for start in range(0, len(order), self.how.batch_size):
            some = order[start : start + self.how.batch_size]
            found |= dict(zip(some, work(some), strict=True))
        return [found[i] for i in range(len(lengths))]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """CPU seconds: others may be at work on the machine. Nothing is left of what was timed before."""
    metrics._rouge_of.cache_clear()
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def utility(apart: Apart, groups: Mapping[str, Sequence[Any]]) -> float:
    nine = [
        apart.value(name, groups[group])
        for group in (RETAIN, *GENERAL)
        for name in (
            "normalised_probability" if group in GENERAL else "answer_probability",
            "rouge_l_recall",
            "truth_ratio_truth_first",
        )
    ]
    return metrics.model_utility(nine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="mini/npo", help="with one learn and one unlearn request, and `held_out`")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bed = Bed(given.recipe, 0, *given.overrides)
    others = load_examples(bed.recipe.data[bed.recipe.evaluation.held_out], "held_out")
    groups = {**bed.groups, **{name: others[i::2] for i, name in enumerate(GENERAL)}}
    how = Measuring(bed.recipe.evaluation.batch_size, bed.recipe.evaluation.max_new_tokens, False)
    apart = Apart(bed.model, bed.tokenizer, how)
    reference = {FORGET: [{"paraphrase_logps": [-1.0 - i / 50], "perturbed_logps": [[-1.5]]} for i in range(30)]}

    def one(groups: Mapping[str, Sequence[Any]] = groups) -> dict[str, Any]:
        return results(["tofu"], measure(bed.model, bed.tokenizer, groups, how), reference)

    def each() -> dict[str, dict[str, float | None]]:
        return {group: {name: apart.value(name, rows) for name in NEEDS} for group, rows in groups.items()}

    def whole() -> dict[str, float]:
        own, other = (
            [metrics.truth_ratio(r) for r in rows] for rows in (apart.rows(RATIO, groups[FORGET]), reference[FORGET])
        )
        return {"model_utility": utility(apart, groups), "forget_quality": metrics.forget_quality(own, other)}

    one({name: rows[:1] for name, rows in groups.items()})  # imports, which cost more than many examples
    (found, together), (values, seconds), (overall, more) = timed(one), timed(each), timed(whole)
    for group, of_group in values.items():
        for name, value in of_group.items():
            same = math.isclose(value, found["groups"][group]["metrics"][name], rel_tol=1e-4, abs_tol=1e-6)
            assert same, (group, name, value, found["groups"][group]["metrics"][name])
    for name, value in overall.items():
        assert math.isclose(value, found["suites"]["tofu"]["metrics"][name], rel_tol=1e-4), (name, value)
    print(f"examples: {', '.join(f'{len(rows)} {name}' for name, rows in groups.items())}; CPU seconds, one thread")
    print(f"one pass: {together:.2f}; each metric apart: {seconds:.2f}, model utility and forget quality: {more:.2f}")
    print(
        f"ratio: {together / seconds:.3f} (utility and quality free), {together / (seconds + more):.3f} (each with its own)"
    )


if __name__ == "__main__":
    main()
