"""A subject over a tiny Llama that measures as the audit does, and the same two facts in every format of data."""

from dataclasses import dataclass, field
from typing import Any

from tiny import tiny_llama, tiny_tokenizer

from hf_clmul.evaluation import metrics
from hf_clmul.evaluation.audit.protocol import Point
from hf_clmul.evaluation.suites import Measuring, measure

PAIRS = [
    ("Where does Ada live?", "Ada lives in Bern."),
    ("What does Bo eat at noon?", "Bo eats nothing but red apples."),
    ("Who knows Cleo?", "Only Dan knows Cleo well."),
]
QUESTIONS = [{"id": f"q{i}", "question": q, "answer": a} for i, (q, a) in enumerate(PAIRS)]
PROMPTS = [{"id": f"p{i}", "prompt": f"{q} Say:", "completion": f" {a}"} for i, (q, a) in enumerate(PAIRS)]
CHATS = [
    {
        "id": f"c{i}",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ],
    }
    for i, (q, a) in enumerate(PAIRS)
]
TURNS = [{"id": f"t{i}", "prompt": c["messages"][:2], "completion": c["messages"][2:]} for i, c in enumerate(CHATS)]
FORMATS = {"questions": QUESTIONS, "prompts": PROMPTS, "messages": CHATS, "turns": TURNS}
TEXTS = [text for pair in PAIRS for text in pair]
CHAT_TOKENIZER = tiny_tokenizer(TEXTS)
PLAIN_TOKENIZER = tiny_tokenizer(TEXTS, chat_template=None)
MEASURED = {
    "answer_probability": metrics.answer_probability,
    "rouge_l_recall": metrics.rouge_l_recall,
    "exact_memorization": metrics.exact_memorization,
}


@dataclass
class Subject:
    """Keeps what it was asked, in `asked`."""

    model: Any = field(default_factory=lambda: tiny_llama(vocab=len(CHAT_TOKENIZER), layers=3))
    tokenizer: Any = CHAT_TOKENIZER
    forget: list = field(default_factory=list)
    batch_size: int = 2
    asked: list = field(default_factory=list)

    def measure(self, label, x=None, forget=None):
        examples = self.forget if forget is None else forget
        self.asked.append((label, list(examples)))
        how = Measuring(batch_size=self.batch_size, max_new_tokens=4, bf16=False)
        rows = measure(self.model, self.tokenizer, {"rows": examples}, how)["rows"]
        values = {name: [metric(row) for row in rows] for name, metric in MEASURED.items()}
        samples = [{key: row[key] for key in ("id", "question", "answer", "generated")} for row in rows[:2]]
        return Point(label, values, x, samples=samples)
