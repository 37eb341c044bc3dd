"""Checks of `training` sections against the table of TrainingArguments fields, and of the settings that a
request ends up with. It knows the table's small type language; it never builds a TrainingArguments, which
probes devices."""

import ast
from collections.abc import Iterator
from functools import cache
from typing import Any

from hf_clmul.gradients.conflict import DEFAULT_RULE
from hf_clmul.recipe.problems import Key, Problems, one_of, quoting_hint, shown, suggestion
from hf_clmul.recipe.training_fields import ADDED, FIELDS, OURS, REMOVED, TRANSFORMERS_VERSION
from hf_clmul.recipe.tree import Tree

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "dict": "a section (key: value)",
    "list[str]": "a list of texts",
    "None": "null",
}
_JSON: dict[str, dict[str, Any]] = {
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "str": {"type": "string"},
    "dict": {"type": "object"},
    "list[str]": {"type": "array", "items": {"type": "string"}},
    "None": {"type": "null"},
}
_KINDS = {"int": "int_type", "float": "float_type", "bool": "bool_type", "str": "string_type"}
TYPES = FIELDS | ADDED
# These step inside the backward pass and keep no gradient that could be combined or clipped afterwards.
_STEPS_IN_BACKWARD = ("lomo", "adalomo")
_NO_EVAL = (
    "the training of a request has no data to evaluate on: what is measured before and after each request stands in the section "
    "`evaluation`"
)
# Fields with one value that the trainer can honour, and why (the trainer itself refuses the others too).
_ONLY: dict[str, tuple[Any, str]] = {
    "eval_strategy": ("no", _NO_EVAL),
    "eval_on_start": (False, _NO_EVAL),
    "load_best_model_at_end": (False, _NO_EVAL),
    "label_smoothing_factor": (0, "it has no meaning for terms other than nll"),
    "train_sampling_strategy": (
        "random",
        "the order of examples is fixed by the seed, so that a resume is exact",
    ),
}
# Choices of a field that the trainer cannot honour, and why.
_NEVER: dict[str, tuple[Any, str, str]] = {
    "save_strategy": ("best", f"there is nothing to choose a best checkpoint of: {_NO_EVAL}", "no, steps or epoch"),
}


def training_keys(tree: Tree) -> Iterator[Key]:
    """Key paths of all `training` sections of a recipe."""
    yield from (("training",), ("learning", "training"), ("unlearning", "training"))
    for i, kind in requests(tree):
        yield ("requests", i, kind, "training")


def requests(tree: Tree) -> Iterator[tuple[int, str]]:
    """Index and kind of the requests that can be told apart; the others are reported by the schema."""
    entries = tree.get("requests")
    for i, entry in enumerate(entries if isinstance(entries, list) else []):
        if isinstance(entry, dict) and len(entry) == 1 and isinstance(next(iter(entry.values())), dict):
            kind = next(iter(entry))
            if kind in ("learn", "unlearn"):
                yield i, kind


def check_training(tree: Tree, problems: Problems) -> None:
    """Adds a problem for each unknown, removed, refused or wrongly typed field, and for settings at odds."""
    for section in training_keys(tree):
        for name, value in tree.section(*section).items():
            _check_field(tree, (*section, name), name, value, problems)
    for i, kind in requests(tree):
        _check_together(tree, i, kind, problems)


def _check_field(tree: Tree, key: Key, name: str, value: Any, problems: Problems) -> None:
    if name in OURS:
        problems.at(tree, key, "cannot be set in a recipe", hint=OURS[name])
    elif name in REMOVED:
        what = f"no longer a field in transformers {TRANSFORMERS_VERSION}"
        problems.at(tree, key, what, hint=REMOVED[name])
    elif name not in TYPES:
        fields = [field for field in TYPES if field not in OURS]
        expected = f"a field of TrainingArguments (transformers {TRANSFORMERS_VERSION})"
        problems.at(tree, key, "unknown training field", expected, f"'{name}'", suggestion(name, fields))
    elif not any(_accepts(member, value) for member in _members(TYPES[name])):
        problems.at(tree, key, "", *_explanation(TYPES[name], value))
    elif name in _ONLY and value != _ONLY[name][0]:
        only, reason = _ONLY[name]
        problems.at(tree, key, reason, str(only).lower(), shown(value), "leave it out")
    elif name in _NEVER and value == _NEVER[name][0]:
        _, reason, others = _NEVER[name]
        problems.at(tree, key, reason, others, shown(value), "leave it out")


@cache
def _members(type_text: str) -> tuple[str | tuple[Any, ...], ...]:
    """The members of a type text: names as they stand, a Literal as the tuple of its choices."""

    def walk(node: ast.expr) -> Iterator[str | tuple[Any, ...]]:
        if isinstance(node, ast.BinOp):
            yield from (*walk(node.left), *walk(node.right))
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            choices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            yield tuple(ast.literal_eval(choice) for choice in choices)
        else:
            yield ast.unparse(node)

    return tuple(walk(ast.parse(type_text, mode="eval").body))


def _accepts(member: str | tuple[Any, ...], value: Any) -> bool:
    if isinstance(member, tuple):
        return any(value is choice or (isinstance(choice, str) and value == choice) for choice in member)
    is_flag = isinstance(value, bool)  # in Python a bool is an int too
    match member:
        case "int":
            return isinstance(value, int) and not is_flag
        case "float":  # neither .nan nor .inf
            return isinstance(value, int | float) and not is_flag and abs(value) < float("inf")
        case "bool":
            return is_flag
        case "str":
            return isinstance(value, str)
        case "dict":
            return isinstance(value, dict)
        case "list[str]":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case "None":
            return value is None
        case _:  # Any: a type that the table cannot express
            return True


def _explanation(type_text: str, value: Any) -> tuple[str, str, str]:
    """Expected, found and hint for a value of the wrong type."""
    words, hint = [], ""
    for member in _members(type_text):
        if isinstance(member, tuple):
            names = [str(choice) if isinstance(choice, str) else str(choice).lower() for choice in member]
            words.append(one_of(names))
            hint = hint or (suggestion(value, names) if isinstance(value, str) else "")
        else:
            words.append(_WORDS[member])
            hint = hint or quoting_hint(_KINDS.get(member, ""), value)
    return " or ".join(words), shown(value), hint


def type_schema(type_text: str) -> dict[str, Any]:
    """The JSON schema of a field's type."""
    members = _members(type_text)
    if "Any" in members:
        return {}
    return {"anyOf": [{"enum": list(m)} if isinstance(m, tuple) else _JSON[m] for m in members]}


def _check_together(tree: Tree, i: int, kind: str, problems: Problems) -> None:
    """Settings of one request that exclude each other, reported where the later-read one was written."""
    defaults: Key = ("learning", "training") if kind == "learn" else ("unlearning", "training")
    chain: list[Key] = [("training",), defaults, ("requests", i, kind, "training")]
    where = {name: (*section, name) for section in chain for name in tree.section(*section)}
    value = {name: tree.get(*key) for name, key in where.items()}

    def report(name: str, what: str, hint: str) -> None:
        problems.at(tree, where[name], what, hint=hint)

    for flags in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if all(value.get(flag) is True for flag in flags):
            report(flags[1], f"{flags[0]} and {flags[1]} exclude each other", "set one of them to false")
    optimizer = str(value.get("optim", ""))
    if optimizer in _STEPS_IN_BACKWARD or optimizer.endswith("_layerwise"):
        what = f"'{optimizer}' updates the weights during the backward pass and leaves no gradient to combine"
        report("optim", what, "choose another optimizer, such as adamw_torch")
    rule = tree.get("unlearning", "conflict", default=DEFAULT_RULE)
    rule = next(iter(rule), "") if isinstance(rule, dict) else rule
    if kind == "unlearn" and value.get("deepspeed") is not None and rule != "sum":
        what = f"the conflict rule '{rule}' needs whole gradients, which DeepSpeed does not give"
        report("deepspeed", what, "use FSDP, or `unlearning.conflict: sum`")
