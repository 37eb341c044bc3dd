"""The JSON schema of recipes, so that editors complete and check them: the types of `schema.py`, with
the names of terms, rules, suites and training fields filled in from their tables."""

import json
from typing import Any

from pydantic import TypeAdapter

from hf_clmul.evaluation import IN_RECIPES
from hf_clmul.evaluation.audit.attacks import attack_parameters, attacks_of
from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_parameters
from hf_clmul.models import FAMILIES, TEACHERS
from hf_clmul.objectives import TERMS, term_parameters
from hf_clmul.recipe.schema import Recipe, Weight
from hf_clmul.recipe.training import TYPES, type_schema
from hf_clmul.recipe.training_fields import OURS


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, with or without `extends`."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    sections = schema["$defs"]
    entries = schema["properties"]["requests"]["items"]["oneOf"]
    requests = [section for entry in entries for section in entry["properties"].values()]
    training = _training()
    for section in (schema, sections["Learning"], sections["Unlearning"], *requests):
        section["properties"]["training"] = training
    sections["Learning"]["properties"]["learn"] = _terms("learn")
    sections["Unlearning"]["properties"]["forget"] = _terms("forget")
    sections["Unlearning"]["properties"]["retain"] = _terms("retain")
    sections["Unlearning"]["properties"]["conflict"] |= _rules()
    sections["Audit"]["properties"]["attacks"] = _attacks()
    sections["Evaluation"]["properties"]["suites"]["items"]["enum"] = list(IN_RECIPES)
    schema["properties"]["family"]["enum"] = list(FAMILIES)
    schema["properties"]["teacher"]["enum"] = list(TEACHERS)
    schema["properties"]["extends"] = {"type": "string", "description": "a recipe file that this one changes"}
    # What a recipe leaves out may stand in its base.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return json.loads(json.dumps(schema))  # defaults may be tuples


def _training() -> dict[str, Any]:
    properties = {name: type_schema(text) for name, text in TYPES.items() if name not in OURS}
    return {
        "type": "object",
        "description": "fields of transformers.TrainingArguments",
        "properties": properties,
        "additionalProperties": False,
    }


def _rules() -> dict[str, Any]:
    """The name of a conflict rule, or the rule with its parameters."""
    properties = {
        name: {**_values(rule_parameters(name)), "description": rule.summary} for name, rule in CONFLICT_RULES.items()
    }
    one = {"additionalProperties": False, "minProperties": 1, "maxProperties": 1}
    table = {"type": "object", "properties": properties, **one}
    return {"anyOf": [{"type": "string", "enum": list(CONFLICT_RULES)}, table]}


def _attacks() -> dict[str, Any]:
    """A table of attacks, the name of one, or null for all. Where families have attacks of one name, the options of any of them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for family in FAMILIES:
        for name, entry in attacks_of(family).items():
            one = {**_values(attack_parameters(name, family)), "description": f"{family}: {entry.summary}"}
            found.setdefault(name, []).append(one)
    properties = {name: each[0] if len(each) == 1 else {"anyOf": each} for name, each in found.items()}
    table = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return {"anyOf": [table, {"type": "string", "enum": list(found)}]}


def _terms(role: str) -> dict[str, Any]:
    """A table of terms, or the name of one."""
    terms = {name: term for name, term in TERMS.items() if role in term.roles}
    table = {
        "type": "object",
        "properties": {name: {**_parameters(name), "description": term.summary} for name, term in terms.items()},
        "additionalProperties": False,
    }
    return {"anyOf": [table, {"type": "string", "enum": list(terms)}]}


def _parameters(term: str) -> dict[str, Any]:
    return _values(({} if TERMS[term].edit else {"weight": (Weight, 1.0)}) | term_parameters(term))


def _values(parameters: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    properties = {
        name: {**TypeAdapter(annotation).json_schema(), "default": default}
        for name, (annotation, default) in parameters.items()
    }
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
