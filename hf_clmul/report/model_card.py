"""The model card that travels with the model to the Hub. It knows the record, the recipe, and the tables of
terms and conflict rules. It loads no model and shows no examples: some of them are to be forgotten."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_name
from hf_clmul.objectives import TERMS
from hf_clmul.report.card_audit import NEXT, TITLE
from hf_clmul.report.claims import MEANINGS, claims
from hf_clmul.report.headlines import headline
from hf_clmul.report.markdown import as_text, linked
from hf_clmul.report.tables import DASH, group_tables, has_unlearned
from hf_clmul.report.words import checks, request_name, summary

Kind = Literal["adapter", "combined", "merged", "full"]
Citation = tuple[str, str, str]

_TEMPLATE, _MEASURED_TEMPLATE = "model_card.md.j2", "model_card_measured.md.j2"
_SUMMARY = re.compile(r"(\n# [^\n]*\n\n)[^\n]*(\n\n## Load it\n)")
_MEASURED = re.compile(rf"(?<=\n)## What was measured\n.*?(?=\n(?:{re.escape(TITLE)}|{re.escape(NEXT)})\n)", re.DOTALL)
_LIBRARY = {"causal_lm": ("peft", "transformers"), "diffusion": ("diffusers", "diffusers")}
"""By family: of adapters, and of whole models."""
_LORA = ("LoRA", "low-rank adapters", "arXiv 2106.09685")
_LUR = ("LUR", "the gradient of one role taken where a step on another leads", "arXiv 2503.06339")
_SAM = (
    "SAM",
    "the forget gradient taken where the forget loss is highest nearby",
    "arXiv 2010.01412, arXiv 2502.05374",
)
_SALIENCY = {
    "train": ("SalUn", "trains only the weights that matter most for the forget data", "arXiv 2310.12508"),
    "trim": ("SNIP", "the score by which weights were drawn anew", "arXiv 1810.02340"),
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(results: Mapping[str, Any], recipe_text: str, kind: Kind, base_model: str | None) -> str:
    """The README.md of a model folder: metadata for the Hub, then what was asked, done and measured.

    `recipe_text` is the resolved recipe (YAML). `base_model` is the Hub id or the folder of the base, or
    None; only a Hub id gets into the metadata, as a folder means nothing on another machine.
    """
    from ruamel.yaml import YAML

    recipe = YAML(typ="safe", pure=True).load(recipe_text)
    hub_id = base_model if base_model is not None and _HUB_ID.fullmatch(base_model) else None
    revision = recipe["model"].get("revision")
    family, adapter = results["model"].get("family", "causal_lm"), kind not in ("merged", "full")
    return _rendered(
        _TEMPLATE,
        **_measured(results),
        kind=kind,
        adapter=adapter,
        loading=f"model_card_{family}.md.j2",
        said=headline(results),
        hub_id=hub_id,
        library=_LIBRARY[family][0 if adapter else 1],
        task=results["model"].get("task", "text-generation"),
        base=results["model"]["path"],
        revision_argument=f", revision={json.dumps(revision)}" if hub_id and revision else "",
        requests=[stage for stage in results["stages"] if stage["kind"] != "base"],
        claims=claims(results),
        meanings=MEANINGS,
        summary=summary(results),
        pictures=family == "diffusion",
        citations=citations(recipe),
        recipe=recipe_text.rstrip("\n"),
    )


def with_results(card: str, results: Mapping[str, Any]) -> str:
    """The card with the summary and the figures of this record, in place of those that it was written with; all else stays as it
    was, and a card without these headings is somebody's own."""
    said = as_text(" ".join(summary(results)))
    card = _SUMMARY.sub(lambda found: f"{found[1]}{said}{found[2]}", card, count=1)
    measured = _rendered(_MEASURED_TEMPLATE, **_measured(results))
    return _MEASURED.sub(lambda found: measured, card, count=1)


def _measured(results: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "results": results,
        "unlearned": has_unlearned(results),
        "checks": checks(results),
        "tables": group_tables(results),
    }


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # this is Markdown: the filter `text` escapes what comes from elsewhere
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: DASH if value is None else value,
    )
    environment.filters.update(text=as_text, json=json.dumps)
    environment.globals.update(fence=_fence, request_name=request_name, counts=_counts)
    return environment.get_template(template).render(**values)


def citations(recipe: Mapping[str, Any]) -> list[Citation]:
    """(name, what it is, paper as Markdown) of each method that the requests use, if it has a paper."""
    kinds = {kind for request in recipe["requests"] for kind in request}
    learning, unlearning = recipe["learning"], recipe["unlearning"]
    terms = list(learning["learn"]) if "learn" in kinds else []
    rules = []
    if "unlearn" in kinds:
        terms += [*unlearning["forget"], *unlearning["retain"]]
        rules = [rule_name(unlearning["conflict"])]
    used: list[Citation] = [_LORA] if recipe["adapter"] is not None else []
    used += [(name, TERMS[name].summary, TERMS[name].paper) for name in dict.fromkeys(terms)]
    used += [(name, CONFLICT_RULES[name].summary, CONFLICT_RULES[name].paper) for name in rules]
    if "unlearn" in kinds and unlearning.get("lookahead") is not None:
        used.append(_LUR)
    if "unlearn" in kinds and unlearning.get("sharpness") is not None:
        used.append(_SAM)
    saliency = (unlearning.get("saliency") or {}) if "unlearn" in kinds else {}
    used += [citation for option, citation in _SALIENCY.items() if saliency.get(option) is not None]
    return [(name, what, linked(paper)) for name, what, paper in used if paper != "-"]


def _counts(stage: Mapping[str, Any]) -> str:
    return ", ".join(f"{count} {role}" for role, count in stage["examples"].items()) or DASH


def _fence(text: str) -> str:
    """A code fence longer than any run of backticks in the text."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", text))])
