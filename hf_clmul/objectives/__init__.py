"""The table of terms: every named loss, what it needs and where it comes from. It knows nothing of models or
trainers, and importing it does not import torch, so that a recipe can be checked in a moment."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hf_clmul.objectives import (
    concepts,
    contrast,
    denoising,
    distillation,
    distribution,
    edits,
    key_value_edits,
    likelihood,
    preference,
    preparation,
    representation,
)

LEARN, FORGET, RETAIN, MEMORY = "learn", "forget", "retain", "memory"
ROLES = (LEARN, FORGET, RETAIN, MEMORY)
ALTERNATIVES = ("refusal", "column", "generated")
"""Where second answers come from; one of them for all terms of a role."""


BESIDE = frozenset({"keys_values", "partner"})
"""Needs of forget terms that the data to retain may serve, even where no term retains."""


@dataclass(frozen=True)
class Term:
    """One named loss, for models of one `family`.

    `unit` names what its count counts, a key of `counts.COUNTS`. `needs` says what the family must predict for it:
    "logps" [N], "logits" [N, V], "targets" [N], "hidden" [N, H] at the layer that its parameter `layer` names;
    "teacher": the same from the teacher; "incompetent": the same from a teacher that knows nothing; "alternative": the
    same for a second answer, which is, of `ALTERNATIVES`, a "refusal" of the built-in ones, each example's own from a
    "column" of the data, or "generated" by the model before it is trained; "contexts": the teacher's logits behind
    further texts; "reinforced": its logits after more training on the same data; "stored": a teacher's answers that
    were kept with the examples; "classes": every example has one. An `edit` changes the weights instead of training:
    its function takes and returns values of one parameter, or of all that read prompts ("keys_values": the keys and
    values of cross-attention, and what they read); it has no unit and no weight, and it stands alone. `preparation`
    holds the parameters of what it needs beside the batch, where that has any. A `coupled` term compares the examples
    of a batch, so that it means the same only where a role's whole batch is in one place: no accumulation, one rank.

    Terms of denoisers need "output" [B, ...]; "empty", "anchor": the output under these prompts, of the teacher where
    the term needs one, else of the student without gradient; "attention" [B]; "partner": the same for a second image of
    each pair; "image": what the data's image says that the output should be; "apartness" [B].
    """

    function: Callable[..., Any]
    roles: tuple[str, ...]
    unit: str
    needs: frozenset[str]
    paper: str
    summary: str
    preparation: type | None = None
    edit: bool = False
    coupled: bool = False
    family: str = "causal_lm"


def _term(
    function: Callable[..., Any], roles: tuple[str, ...], unit: str, needs: str, paper: str, summary: str,
    preparation: type | None = None, edit: bool = False, coupled: bool = False,
) -> Term:  # fmt: skip
    return Term(function, roles, unit, frozenset(needs.split()), paper, summary, preparation, edit, coupled)


def _denoiser(
    function: Callable[..., Any], roles: tuple[str, ...], needs: str, paper: str, summary: str,
    preparation: type | None = None, edit: bool = False,
) -> Term:  # fmt: skip
    needed, unit = (frozenset(needs.split()), "-") if edit else (frozenset(["output", *needs.split()]), "samples")
    return Term(function, roles, unit, needed, paper, summary, preparation, edit, family="diffusion")


KEPT, REPLAYED, GONE = (LEARN, RETAIN, MEMORY), (RETAIN, MEMORY), (FORGET,)

# fmt: off
TERMS: dict[str, Term] = {
    "nll": _term(likelihood.nll, KEPT, "tokens", "logps", "-",
        "negative log-likelihood of the answer"),
    "kl": _term(distillation.kl, KEPT, "tokens", "logits teacher", "arXiv 2401.06121",
        "KL to the teacher, forward or reverse"),
    "js": _term(distillation.js, KEPT, "tokens", "logits teacher", "arXiv 2509.02820",
        "Jensen-Shannon divergence to the teacher"),
    "logit_mse": _term(distillation.logit_mse, KEPT, "tokens", "logits teacher", "arXiv 2004.07211",
        "squared distance of logits to the teacher's"),
    "confident_mse": _term(distillation.confident_mse, REPLAYED, "tokens", "logits targets teacher", "arXiv 2408.11374",
        "as logit_mse, where the teacher is sure of the right token (UniCLUN)"),
    "contrastive_distill": _term(contrast.contrastive_distill, REPLAYED, "sequences", "hidden teacher",
        "arXiv 2408.11374", "answers lie to each other as the teacher's do (UniCLUN)", coupled=True),
    "sup_con": _term(contrast.sup_con, (LEARN, MEMORY), "sequences", "hidden classes", "arXiv 2004.11362",
        "answers of a class lie close together", coupled=True),
    "der": _term(distillation.der, (MEMORY,), "tokens", "logits stored", "arXiv 2004.07211",
        "KL to what a teacher said of the memory's examples when they were stored"),
    "hidden_mse": _term(representation.hidden_mse, KEPT, "tokens", "hidden teacher", "arXiv 2403.03218",
        "squared distance of a layer's hidden states to the teacher's"),
    "answer_preservation": _term(preference.answer_preservation, (RETAIN,), "sequences",
        "logps alternative refusal", "arXiv 2410.08109", "prefers the answer to a refusal"),
    "grad_ascent": _term(likelihood.grad_ascent, GONE, "tokens", "logps", "arXiv 2210.01504",
        "raises the negative log-likelihood; collapses if trained long"),
    "wga": _term(likelihood.wga, GONE, "tokens", "logps", "arXiv 2502.19301",
        "gradient ascent that lets unlikely tokens go"),
    "satimp": _term(likelihood.satimp, GONE, "tokens", "logps", "arXiv 2505.11953",
        "gradient ascent weighted by saturation and importance"),
    "npo": _term(preference.npo, GONE, "sequences", "logps teacher", "arXiv 2404.05868",
        "negative preference optimisation against the teacher"),
    "simnpo": _term(preference.simnpo, GONE, "sequences", "logps", "arXiv 2410.07163",
        "length-normalised NPO without a teacher"),
    "idk": _term(preference.idk, GONE, "sequences", "logps teacher alternative refusal",
        "arXiv 2401.06121", "prefers a refusal to the answer (DPO)"),
    "dpo": _term(preference.dpo, GONE, "sequences", "logps teacher alternative column", "arXiv 2305.18290",
        "prefers each example's own second answer, from the data"),
    "altpo": _term(preference.altpo, GONE, "sequences", "logps teacher alternative generated", "arXiv 2409.13474",
        "prefers invented answers that the model wrote itself", preparation.Generated),
    "idk_nll": _term(likelihood.idk_nll, GONE, "alternative tokens", "logps alternative refusal",
        "arXiv 2401.06121", "learns a refusal as the answer"),
    "jensun": _term(distribution.jensun, GONE, "alternative tokens", "logps alternative refusal",
        "arXiv 2509.02820", "Jensen-Shannon divergence to a refusal"),
    "jensun_uniform": _term(distribution.jensun_uniform, GONE, "tokens", "logits", "arXiv 2509.02820",
        "Jensen-Shannon divergence to the uniform distribution"),
    "max_entropy": _term(distribution.max_entropy, GONE, "tokens", "logits", "arXiv 2410.08109",
        "KL to the uniform distribution"),
    "ce_u": _term(distribution.ce_u, GONE, "later tokens", "logits targets", "arXiv 2503.01224",
        "distils the student without the right token"),
    "inverted_hinge": _term(distribution.inverted_hinge, GONE, "tokens", "logits targets", "arXiv 2408.06621",
        "the right token falls below the runner-up"),
    "logit_margin": _term(distribution.logit_margin, GONE, "tokens", "logits", "arXiv 2506.05314",
        "flattens the logits (PDU's forget loss)"),
    "undial": _term(distillation.undial, GONE, "tokens", "logits targets teacher", "arXiv 2402.10052",
        "self-distillation with the right token's logit lowered"),
    "bad_teacher": _term(distillation.bad_teacher, GONE, "tokens", "logits incompetent", "arXiv 2205.08096",
        "KL to a teacher that knows nothing", preparation.Incompetent),
    "elm": _term(distillation.elm, GONE, "tokens", "logits teacher contexts", "arXiv 2410.02760",
        "distils the teacher as one that has never heard of it", preparation.Contexts),
    "scrub": _term(distillation.scrub, GONE, "tokens", "logits teacher", "arXiv 2302.09880",
        "raises the KL to the teacher; unbounded"),
    "whp": _term(distillation.whp, GONE, "tokens", "logits teacher reinforced", "arXiv 2310.02238",
        "distils the teacher less what more training on the data raises", preparation.Reinforced),
    "rmu": _term(representation.rmu, GONE, "tokens", "hidden", "arXiv 2403.03218",
        "steers a layer's hidden states to a random direction"),
    "task_vector": _term(edits.task_vector, GONE, "-", "reinforced", "arXiv 2212.04089",
        "an edit: takes back what more training on the data changes", preparation.FineTuned, edit=True),
    # ---- diffusion -----------------------------------------------------------------------------------------
    "denoising": _denoiser(denoising.denoising, KEPT, "image", "arXiv 2006.11239",
        "the diffusion or flow matching loss on images"),
    "distill": _denoiser(denoising.distill, KEPT, "teacher", "arXiv 2405.15234",
        "squared distance to the teacher's output"),
    "latent_anchoring": _denoiser(denoising.latent_anchoring, (RETAIN,), "teacher apartness", "arXiv 2312.16145",
        "as distill, prompts unlike the concept's counting more (SPM)", preparation.Apartness),
    "confident_distill": _denoiser(denoising.confident_distill, REPLAYED, "teacher image", "arXiv 2408.11374",
        "as distill, where the teacher denoises well (after UniCLUN)"),
    "esd": _denoiser(concepts.esd, GONE, "teacher empty", "arXiv 2303.07345",
        "guides away from the concept's prompt", preparation.Sampled),
    "concept_ablation": _denoiser(concepts.concept_ablation, GONE, "teacher anchor", "arXiv 2303.13516",
        "the concept's prompt becomes what the anchor's was", preparation.Anchor),
    "relabel": _denoiser(concepts.relabel, GONE, "anchor", "arXiv 2310.12508",
        "towards its own output for the anchor's prompt (SalUn, EraseDiff)", preparation.Anchor),
    "surrogate": _denoiser(denoising.surrogate, GONE, "partner image", "arXiv 2305.10120",
        "learns other images for the prompt; with ewc it is Selective Amnesia"),
    "duo": _denoiser(concepts.duo, GONE, "teacher partner image", "arXiv 2407.21035",
        "prefers the other image of each pair (diffusion DPO)"),
    "incompetent": _denoiser(concepts.incompetent, GONE, "incompetent", "arXiv 2205.08096",
        "squared distance to a network that knows nothing", preparation.IncompetentDenoiser),
    "attention_suppression": _denoiser(concepts.attention_suppression, GONE, "attention", "arXiv 2303.17591",
        "no cross-attention for the concept's tokens", preparation.Words),
    "ascent": _denoiser(denoising.ascent, GONE, "image", "arXiv 2310.12508",
        "raises the denoising loss; unbounded, collapses if trained long"),
    "uce": _denoiser(key_value_edits.uce, GONE, "keys_values", "arXiv 2308.14761",
        "an edit: keys and values read the concept as its anchor", preparation.KeyValues, edit=True),
    "rece": _denoiser(key_value_edits.rece, GONE, "keys_values", "arXiv 2407.12383",
        "an edit: uce, and again of what still reaches the concept", preparation.KeyValues, edit=True),
}
# fmt: on


COUNTERPARTS = {
    "nll": "denoising", "kl": "distill", "js": "distill", "logit_mse": "distill", "confident_mse": "confident_distill",
    "grad_ascent": "ascent", "bad_teacher": "incompetent", "dpo": "duo", "elm": "esd",
}  # fmt: skip
"""Terms of language models, and what comes nearest to them for denoisers."""


def terms_of(family: str) -> dict[str, Term]:
    """The part of the table that models of this family can be trained with."""
    return {name: term for name, term in TERMS.items() if term.family == family}


def term_parameters(name: str) -> dict[str, tuple[Any, Any]]:
    """The parameters of a term, {name: (type, default)}: the keyword-only arguments of its function, then those of its
    preparation."""
    return keywords(TERMS[name].function) | keywords(TERMS[name].preparation)


def keywords(function: Callable[..., Any] | None) -> dict[str, tuple[Any, Any]]:
    """The keyword-only arguments of a function or class, {name: (type, default)}; none of None."""
    parameters = inspect.signature(function).parameters.values() if function is not None else ()
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
