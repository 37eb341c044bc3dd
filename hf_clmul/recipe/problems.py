"""What is wrong with a recipe, where, and in which words. It collects, so that a user sees all problems at
once; it knows nothing of files or of what a recipe means."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hf_clmul.errors import RecipeError

Key = tuple[str | int, ...]
SHOWN_NAMES = 17  # longer lists of valid names hide the sentence they stand in
SHOWN_TEXT = 60


@dataclass(frozen=True)
class Place:
    """Where a key was written. Relative paths written there start from `folder`; None means a recipe on the
    Hub, which must not name files of this machine."""

    label: str
    line: int | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        return self.label if self.line is None else f"{self.label}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One line of the message: place, key, what is wrong, what was expected and found, what to do."""

    place: Place
    key: str = ""
    what: str = ""
    expected: str = ""
    found: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [
            self.what,
            self.expected and f"expected {self.expected}",
            self.found and f"found {self.found}",
            self.hint,
        ]
        start = f"{self.place}: {self.key}: " if self.key else f"{self.place}: "
        return start + "; ".join(part for part in parts if part)


class Placed(Protocol):
    """What knows where its keys were written, such as a recipe's tree."""

    def place(self, *key: str | int) -> Place: ...


class Problems:
    """The problems of one recipe."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._found: dict[Problem, None] = {}  # a set that keeps the order

    def add(
        self, place: Place, key: Key = (), what: str = "", expected: str = "", found: str = "", hint: str = ""
    ) -> None:
        self._found[Problem(place, dotted(key), what, expected, found, hint)] = None

    def at(self, tree: Placed, key: Key, what: str = "", expected: str = "", found: str = "", hint: str = "") -> None:
        self.add(tree.place(*key), key, what, expected, found, hint)

    def raise_if_any(self) -> None:
        """Raises one RecipeError with all problems, in the order of the files; the command line comes
        last."""
        if not self._found:
            return
        ordered = sorted(self._found, key=lambda p: (p.place.line is None, p.place.label, p.place.line or 0))
        count = "1 problem" if len(ordered) == 1 else f"{len(ordered)} problems"
        raise RecipeError("\n".join([f"{self.title} has {count}:", *map(str, ordered)]))


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


def first_problem(error: ValidationError) -> str:
    """Where a record is not of its type and why, in one line: "stages.0.kind: Field required (and 2 more)"."""
    first = error.errors(include_url=False)[0]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{dotted(first['loc'])}: {first['msg']}{more}"


def nearest(name: object, valid: Iterable[str]) -> str | None:
    """The valid name that was probably meant, or None."""
    word, names = str(name).lower(), list(valid)
    # People remember a part of a long name: `adamw` of `adamw_torch`, `epochs` of `num_train_epochs`.
    is_part = len(word) >= 4
    starting = [candidate for candidate in names if is_part and candidate.startswith(word)]
    ending = [candidate for candidate in names if is_part and candidate.endswith(word)]
    close = get_close_matches(word, names, n=1, cutoff=0.6)
    holding = [candidate for candidate in names if is_part and word in candidate]
    return next(iter([*starting, *ending, *close, *holding]), None)


def suggestion(name: object, valid: Iterable[str]) -> str:
    meant = nearest(name, valid)
    return f"did you mean '{meant}'?" if meant else ""


def did_you_mean(name: object, valid: Iterable[str]) -> str:
    """The suggestion as a sentence behind others."""
    hint = suggestion(name, valid)
    return f" {hint[0].upper()}{hint[1:]}" if hint else ""


def one_of(names: Iterable[str]) -> str:
    """`one of a, b, c`; a long list is cut."""
    names = list(names)
    if len(names) == 1:
        return names[0]
    rest = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return f"one of {', '.join(names[:SHOWN_NAMES])}{rest}" if names else "a name that the recipe defines"


def shown(value: object) -> str:
    """A value as a reader of YAML knows it, with its kind where the kind may be the mistake."""
    if value is None or isinstance(value, bool):
        return {None: "nothing (null)", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"the text '{_cut(value)}'"
    if isinstance(value, Mapping):
        return f"a section with the keys {_cut(', '.join(map(str, value)))}" if value else "an empty section"
    if isinstance(value, Sequence):
        return f"the list {_cut(str(list(value)))}" if value else "an empty list"
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_TEXT else text[: SHOWN_TEXT - 3] + "..."


# What a value had to be, for each kind of pydantic error that strict validation can give here.
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section (key: value)",
    "model_type": "a section (key: value)",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "string_pattern_mismatch": "lower-case letters, digits, - and _ only",
    "string_too_short": "text that is not empty",
    "too_short": "a list that is not empty",
    "union_tag_not_found": "one of `learn: {{...}}` and `unlearn: {{...}}`",
    "union_tag_invalid": "one of `learn: {{...}}` and `unlearn: {{...}}`",
    "expected": "{words}",
}


def value_problem(annotation: Any, value: object) -> dict[str, str]:
    """What was expected and found where a value does not fit its annotation, nothing converted; empty where it does."""
    try:
        TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        return explained(error.errors()[0])
    return {}


def explained(error: Mapping[str, Any]) -> dict[str, str]:
    """Expected, found and hint of one entry of pydantic's `ValidationError.errors()`."""
    kind, value = error["type"], error["input"]
    if kind == "literal_error":
        words = error["ctx"]["expected"]
        names = re.findall(r"'([^']*)'", words)
        hint = suggestion(value, names) if isinstance(value, str) else ""
        return {"expected": one_of(names) if names else words, "found": shown(value), "hint": hint}
    if kind == "union_tag_invalid":
        hint = suggestion(error["ctx"]["tag"], ("learn", "unlearn"))
        return {"expected": _EXPECTED[kind].format(), "found": shown(value), "hint": hint}
    expected = _EXPECTED[kind].format(**error.get("ctx", {})) if kind in _EXPECTED else error["msg"]
    return {"expected": expected, "found": shown(value), "hint": quoting_hint(kind, value)}


def quoting_hint(kind: str, value: object) -> str:
    """Most wrong types are quotes too many or too few."""
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "remove the quotes" if _is_number(value) else ""
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "on", "no", "off", "true", "false"):
        return f"write {str(value.lower() in ('yes', 'on', 'true')).lower()}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return "put it in quotes"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
