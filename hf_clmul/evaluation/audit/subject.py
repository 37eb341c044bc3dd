"""A language model under attack: loaded from a folder as a user loads it, measured as runs measure. It knows files, scores and
metrics; nothing of attacks, references or records."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_clmul.data.encoding import encode, example_format
from hf_clmul.errors import RunError, reason
from hf_clmul.evaluation import metrics
from hf_clmul.evaluation.audit.fine_tuning import fine_tuned
from hf_clmul.evaluation.audit.probes import context_length
from hf_clmul.evaluation.audit.protocol import SAMPLE, Absent, AuditData, Example, Point
from hf_clmul.evaluation.membership import min_k_score
from hf_clmul.evaluation.suites import Measuring, measure

ADAPTER = "adapter_config.json"
MEASURED = {
    "answer_probability": metrics.answer_probability,
    "rouge_l_recall": metrics.rouge_l_recall,
    "extraction_strength": metrics.extraction_strength,
    "exact_memorization": metrics.exact_memorization,
}


@dataclass
class TextSubject:
    """`how` is the measuring of the run; `samples` answers are kept of each point."""

    model: Any
    tokenizer: Any
    data: AuditData
    how: Measuring
    samples: int = 3

    def measure(self, label: str, x: float | None = None, forget: Sequence[Example] | None = None) -> Point:
        own = forget is None
        if own:
            rows = self._rows(self.data.forget, self.how, label)
        else:  # cut where training cuts, a question that an attack made longer might leave nothing of its answer
            self._check_room(forget)
            rows = self._rows(forget, replace(self.how, max_length=None), label)
        values = {name: [metric(row) for row in rows] for name, metric in MEASURED.items()}
        against = {}
        if own and self.data.held_out:  # only its scores are looked at
            others = self._rows(self.data.held_out, replace(self.how, max_new_tokens=1), label)
            against = {"min_k_auc": (_min_k_scores(rows), _min_k_scores(others))}
        samples = [{key: row[key] for key in ("id", *SAMPLE)} for row in rows[: self.samples]]
        return Point(label, values, x, {name: pair for name, pair in against.items() if all(pair)}, samples)

    def fine_tune(
        self, examples: Sequence[Example], seed: int, *, steps: int, learning_rate: float, batch_size: int
    ) -> Iterator[int]:
        return fine_tuned(
            self.model, self.tokenizer, examples, seed, steps, learning_rate, batch_size, self.how.max_length
        )

    def _check_room(self, examples: Sequence[Example]) -> None:
        most = context_length(self.model)
        for example in examples if most is not None else ():
            count = len(encode(_bare(example), self.tokenizer)["input_ids"])
            if count > most:
                raise Absent(
                    f"asked like that, example {example.get('id')} has {count} tokens, and the model reads {most}."
                )

    def _rows(self, examples: Sequence[Example], how: Measuring, title: str) -> list[dict[str, Any]]:
        return measure(self.model, self.tokenizer, {"rows": [_bare(e) for e in examples]}, how, title)["rows"]


def open_text(
    folder: Path, data: AuditData, how: Measuring, *, dtype: str, device: torch.device, switchable: bool = False,
    samples: int = 3, trust_remote_code: bool = False,
) -> TextSubject:  # fmt: skip
    """The model in a folder, whole or an adapter over its base. The adapter is merged in memory, so that attacks on weights
    meet the weights that answer; it stays apart only if it is `switchable`, a filter.

    Raises RunError if there is no model, or it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
        raise RunError(
            f"{folder} holds no model: there is neither config.json nor {ADAPTER}. Give a run, or a model's folder."
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not (folder / ADAPTER).is_file():
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
        else:
            about = PeftConfig.from_pretrained(str(folder))
            base = AutoModelForCausalLM.from_pretrained(
                about.base_model_name_or_path, revision=about.revision, **options
            )
            model = PeftModel.from_pretrained(base, folder)
            model = model if switchable else model.merge_and_unload()
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError) as error:
        raise RunError(
            f"the model in {folder} could not be loaded: {reason(error)}. If a run wrote it, delete the folder and give `hf-clmul run` "
            "again, which exports it anew."
        ) from error
    return TextSubject(model.eval().to(device), tokenizer, data, how, samples)


def _bare(example: Example) -> Mapping[str, Any]:
    """Without what the audit does not ask for, such as wrong answers, each of which would cost a forward pass. Where an attack
    encoded it, so that part of the answer is given, that stays."""
    keys = ("id", *example_format(example), "input_ids", "labels")
    return {key: example[key] for key in keys if key in example}


def _min_k_scores(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [score for row in rows if (score := min_k_score(row)) is not None]
