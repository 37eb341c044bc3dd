"""The table of attacks, in the order in which an audit makes them. It loads no model and imports no torch."""

from hf_clmul.evaluation.audit.depth import logit_lens, patching
from hf_clmul.evaluation.audit.protocol import AttackEntry
from hf_clmul.evaluation.audit.questions import in_context, paraphrase, prefix, reverse, reworded, role_play, translated
from hf_clmul.evaluation.audit.sampling import sample

RWKU = "arXiv 2406.10890"

# fmt: off
ATTACKS: dict[str, AttackEntry] = {
    "prefix": AttackEntry(prefix, "question", "causal_lm", RWKU, "makes the answer begin with \"Sure, here is the answer:\""),
    "role_play": AttackEntry(role_play, "question", "causal_lm", RWKU, "asks someone who is said to know everything"),
    "reverse": AttackEntry(reverse, "question", "causal_lm", RWKU, "gives the answer and asks for the question"),
    "in_context": AttackEntry(in_context, "question", "causal_lm", RWKU, "shows other questions with their answers first"),
    "paraphrase": AttackEntry(
        paraphrase, "question", "causal_lm", "arXiv 2401.06121", "asks in other words, which the data bring"),
    "reworded": AttackEntry(reworded, "question", "causal_lm", RWKU, "asks with any probes that the data bring"),
    "translated": AttackEntry(
        translated, "question", "causal_lm", "arXiv 2601.06675", "asks in other languages, which the data bring"),
    "sample": AttackEntry(
        sample, "nothing", "causal_lm", "arXiv 2410.03523", "draws many answers and bounds what leaks"),
    "logit_lens": AttackEntry(logit_lens, "nothing", "causal_lm", "-", "reads the answer off the layers in between"),
    "patching": AttackEntry(
        patching, "nothing", "causal_lm", "arXiv 2605.24614", "puts its hidden states into the model before unlearning"),
}
# fmt: on
