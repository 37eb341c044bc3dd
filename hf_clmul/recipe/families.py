"""Settings of a recipe that the other family has: refused where they would do nothing, or fail only after hours. It works on the plain
tree. What stands at its default says nothing, since a recipe that was written out has all defaults in it."""

from typing import Any

from hf_clmul.evaluation.options import LmEval
from hf_clmul.families.options import Diffusion
from hf_clmul.models import TEXT_ENCODER
from hf_clmul.recipe.problems import Key, Problems, one_of, shown
from hf_clmul.recipe.schema import Images
from hf_clmul.recipe.training import requests
from hf_clmul.recipe.tree import Tree

SUITES_OF = {"causal_lm": ("basic", "tofu", "mia", "continual"), "diffusion": ("concepts", "continual")}
SCORES_OF = {
    "causal_lm": ("rouge_l_recall", "answer_probability", "exact_memorization", "extraction_strength"),
    "diffusion": ("prompt_accuracy",),
}
MODELS = {"causal_lm": "language models", "diffusion": "diffusion models"}
NOT_OF_DIFFUSION: tuple[tuple[Key, Any, str, str], ...] = (
    (("model", "scratch"), None, "makes a language model", "name a pipeline in `model.path`"),
    (
        ("memory", "top_k"), None, "keeps a language model's likeliest tokens, and pictures have none",
        "remove it, and replay with terms such as `memory: {denoising: {}}`",
    ),
    (("evaluation", "groups"), {}, "names further groups of texts", "remove it"),
    (("evaluation", "max_length"), None, "counts tokens of texts", "remove it"),
    (("evaluation", "bf16"), None, "is how answers of language models are scored", "remove it"),
    (("evaluation", "gradient_norms"), False, "is read by the suite mia, of language models", "remove it"),
    (("evaluation", "lm_eval"), LmEval().model_dump(), "is a suite of language models", "remove it"),
    (
        ("adapter", "layers"), "all", "chooses among the numbered layers of a language model",
        "remove it, and name modules in `adapter.target_modules`",
    ),
)  # fmt: skip


def check_family(tree: Tree, family: Any, problems: Problems) -> None:
    """Adds a problem for each setting that has no meaning for the recipe's family, or was never tried there."""
    if not isinstance(family, str) or family not in SUITES_OF:  # said of the family itself
        return
    (other,) = (name for name in SUITES_OF if name != family)
    suites = tree.get("evaluation", "suites")
    for i, name in enumerate(suites if isinstance(suites, list) else []):
        if name in SUITES_OF[other] and name not in SUITES_OF[family]:
            _refuse(tree, ("evaluation", "suites", i), f"is for {MODELS[other]}", SUITES_OF[family], problems)
    if tree.get("evaluation", "score") in SCORES_OF[other]:
        _refuse(tree, ("evaluation", "score"), f"is a metric of {MODELS[other]}", SCORES_OF[family], problems)
    if family == "diffusion":
        for key, default, what, hint in NOT_OF_DIFFUSION:
            if tree.get(*key, default=default) != default:
                problems.at(tree, key, what, hint=hint)
        if tree.get("adapter", "strategy") == "slao":
            what = "was never tried on diffusion models"
            problems.at(tree, ("adapter", "strategy"), what, "stacked or single", "'slao'")
        _check_text_encoder(tree, problems)
        return
    for section, known in ((("diffusion",), Diffusion), (("evaluation", "images"), Images)):
        defaults = known().model_dump()
        for name, value in tree.section(*section).items():
            if name in defaults and value != defaults[name]:  # the schema knows the others
                hint = "remove it, or set `family: diffusion`"
                problems.at(tree, (*section, name), "is for diffusion models", hint=hint)


def _check_text_encoder(tree: Tree, problems: Problems) -> None:
    """One part of a pipeline trains in all requests of a run, and no adapter is for that one."""
    used = dict.fromkeys({"learn": "learning", "unlearn": "unlearning"}[kind] for _, kind in requests(tree))
    chosen = {section: tree.get(section, "trainable") == TEXT_ENCODER for section in used}
    for section in (section for section, wanted in chosen.items() if wanted):
        key = (section, "trainable")
        if not all(chosen.values()):
            other = next(name for name, wanted in chosen.items() if not wanted)
            what = f"'{TEXT_ENCODER}' trains that part of the pipeline, and the `{other}` requests the denoiser"
            problems.at(
                tree, key, what, hint=f"add `trainable: {TEXT_ENCODER}` to `{other}` as well, or remove it here"
            )
        if tree.get("adapter") is not None:
            what = f"'{TEXT_ENCODER}' trains the whole of it, and an adapter is for the denoiser"
            problems.at(tree, key, what, hint="remove `adapter`, or remove it here")


def _refuse(tree: Tree, key: Key, what: str, valid: tuple[str, ...], problems: Problems) -> None:
    problems.at(tree, key, what, one_of(valid), shown(tree.get(*key)), "leave it out for the family's own")
