"""The table of attacks, in the order in which an audit makes them. It loads no model and imports no torch."""

import inspect
from typing import Any

from hf_clmul.evaluation.audit import picture_attacks
from hf_clmul.evaluation.audit.depth import logit_lens, patching, unlearning_depth
from hf_clmul.evaluation.audit.protocol import AttackEntry
from hf_clmul.evaluation.audit.quantization import quantize
from hf_clmul.evaluation.audit.questions import in_context, paraphrase, prefix, reverse, reworded, role_play, translated
from hf_clmul.evaluation.audit.relearning import benign, relearn, relearn_partly, unrelated
from hf_clmul.evaluation.audit.removal import remove_adapter, remove_direction
from hf_clmul.evaluation.audit.sampling import sample

RWKU = "arXiv 2406.10890"

# fmt: off
ATTACKS: dict[str, AttackEntry] = {
    "remove_adapter": AttackEntry(remove_adapter, "weights", "causal_lm", "-", "switches off the adapter of a filter"),
    "quantize": AttackEntry(quantize, "weights", "causal_lm", "arXiv 2410.16454", "rounds the weights to 8 and to 4 bits"),
    "relearn": AttackEntry(relearn, "weights", "causal_lm", "arXiv 2506.12618", "fine-tunes on what was forgotten"),
    "relearn_partly": AttackEntry(
        relearn_partly, "weights", "causal_lm", "arXiv 2410.08827", "fine-tunes on a half of it, measures the other"),
    "benign": AttackEntry(benign, "weights", "causal_lm", "arXiv 2406.13356", "fine-tunes on what was retained"),
    "unrelated": AttackEntry(
        unrelated, "weights", "causal_lm", "arXiv 2409.18025", "fine-tunes on a few unrelated examples"),
    "remove_direction": AttackEntry(
        remove_direction, "weights", "causal_lm", "arXiv 2406.11717", "takes one direction out of the residual stream"),
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
        patching, "nothing", "causal_lm", "arXiv 2605.24614", "puts its hidden states into the model before unlearning",
        unlearning_depth),
}

PICTURE_ATTACKS: dict[str, AttackEntry] = {
    "quantize": AttackEntry(
        picture_attacks.quantize, "weights", "diffusion", "arXiv 2410.16454", "rounds the weights to 8 and to 4 bits"),
    "relearn": AttackEntry(
        picture_attacks.relearn, "weights", "diffusion", "-", "trains the denoiser on pictures of what was forgotten"),
    "paraphrase": AttackEntry(picture_attacks.paraphrase, "question", "diffusion", "-", "asks in other words"),
    "inversion": AttackEntry(
        picture_attacks.inversion, "question", "diffusion", "arXiv 2308.01508", "fits one new word to pictures of it"),
}
# fmt: on


def attacks_of(family: str) -> dict[str, AttackEntry]:
    """The attacks on models of a family. An attack on texts and one on pictures may have the same name."""
    tables = (ATTACKS, PICTURE_ATTACKS)
    return {name: entry for table in tables for name, entry in table.items() if entry.family == family}


def attack_parameters(name: str, family: str = "causal_lm") -> dict[str, tuple[Any, Any]]:
    """The options of an attack, {name: (type, default)}: its function's keyword-only arguments."""
    signature = inspect.signature(attacks_of(family)[name].function).parameters.values()
    return {p.name: (p.annotation, p.default) for p in signature if p.kind is p.KEYWORD_ONLY}
