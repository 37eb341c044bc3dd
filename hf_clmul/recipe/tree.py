"""YAML text to plain values that remember where they were written. It knows YAML 1.2 and nothing of
recipes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from hf_clmul.recipe.problems import Key, Place, Problems

_TAG = "tag:yaml.org,2002:"
_VALUES = {_TAG + name for name in ("null", "bool", "int", "float")}
# A date, `<<` and `=` have tags of their own in YAML; in a recipe they are text.
_TEXTS = {_TAG + name for name in ("str", "timestamp", "merge", "value")}
_COLLECTIONS = {_TAG + "map", _TAG + "seq"}
_MAX_NODES = 20_000  # aliases of aliases grow exponentially, and a recipe may come from a stranger


@dataclass
class Tree:
    """Plain nested values, and for each key path the place where it was written."""

    value: Any
    places: dict[Key, Place] = field(default_factory=dict)

    def get(self, *key: str | int, default: Any = None) -> Any:
        """The value at `key`, or `default` where the path does not exist."""
        value = self.value
        for part in key:
            if isinstance(value, list) and isinstance(part, int):
                value = dict(enumerate(value))
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def section(self, *key: str | int) -> dict[str, Any]:
        """The mapping at `key`; empty where there is none, so that checks can go on after a wrong type."""
        value = self.get(*key)
        return value if isinstance(value, dict) else {}

    def place(self, *key: str | int) -> Place:
        """Where `key` was written, or the nearest section around it."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def put(self, key: Key, new: "Tree") -> None:
        """Puts `new` in the place of whatever stood at `key`; the section around it must exist."""
        self.get(*key[:-1])[key[-1]] = new.value
        self.places = {k: p for k, p in self.places.items() if k[: len(key)] != key}
        self.places |= {key + k: p for k, p in new.places.items()}

    def branch(self, *key: str | int) -> "Tree":
        """The part below `key`."""
        places = {k[len(key) :]: p for k, p in self.places.items() if k[: len(key)] == key}
        return Tree(self.get(*key), {(): self.place(*key), **places})


def parse_yaml(text: str, label: str, folder: Path | None, problems: Problems, key: Key | None = None) -> Tree | None:
    """The tree of a YAML text, or None (and a problem) if it is not YAML at all.

    `key` is set for a value from the command line, which has no lines. Tags, duplicate keys and keys that are
    not scalars become problems; nothing is ever constructed but text, numbers, booleans, lists and mappings.
    """
    yaml = YAML(typ="safe", pure=True)
    where = Place(label, folder=folder)
    try:
        root = yaml.compose(text)
        return Tree(None, {(): where}) if root is None else _Reader(yaml, where, key, problems).tree(root)
    except MarkedYAMLError as error:
        problems.add(*_syntax_problem(error, where, key))
    except (YAMLError, RecursionError, _TooLarge) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        problems.add(where, key or (), f"not valid YAML: {reason}")
    return None


def _syntax_problem(error: MarkedYAMLError, where: Place, key: Key | None) -> tuple[Place, Key, str, str, str, str]:
    reason = error.problem or error.context
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    if key is not None:
        return where, key, f"not valid YAML: {reason}", "", "", "put the value in quotes"
    what = f"not valid YAML at column {mark.column + 1}: {reason}"
    if opened is not None and opened.line != mark.line:
        what += f" ({error.context}, which begins on line {opened.line + 1})"
    hint = "check the indentation (spaces, no tabs), colons, quotes and brackets here and just before"
    return Place(where.label, mark.line + 1, where.folder), (), what, "", "", hint


class _TooLarge(Exception):
    """The text expands to more than a recipe can hold."""


class _Reader:
    """Walks YAML nodes once, filling one tree."""

    def __init__(self, yaml: YAML, where: Place, key: Key | None, problems: Problems) -> None:
        self.yaml, self.where, self.key, self.problems = yaml, where, key, problems
        self.nodes = 0
        self.places: dict[Key, Place] = {}

    def tree(self, root: Node) -> Tree:
        self.places[()] = self.place(root)
        return Tree(self.read(root, ()), self.places)

    def place(self, node: Node) -> Place:
        line = None if self.key is not None else node.start_mark.line + 1
        return Place(self.where.label, line, self.where.folder)

    def report(self, node: Node, key: Key, what: str, hint: str) -> None:
        self.problems.add(self.place(node), (self.key or ()) + key, what, hint=hint)

    def read(self, node: Node, key: Key) -> Any:
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            raise _TooLarge(f"more than {_MAX_NODES} values, or an alias inside itself")
        if node.tag not in _VALUES | _TEXTS | _COLLECTIONS:
            tag = str(node.tag).replace(_TAG, "!!")
            self.report(
                node,
                key,
                f"the tag {tag} is not allowed",
                "a recipe holds plain values and never runs code: write the value itself",
            )
            return None
        if isinstance(node, ScalarNode):
            return self.scalar(node, key)
        if isinstance(node, MappingNode):
            return self.mapping(node, key)
        items = []
        for i, item in enumerate(node.value):
            self.places[(*key, i)] = self.place(item)
            items.append(self.read(item, (*key, i)))
        return items

    def scalar(self, node: ScalarNode, key: Key) -> Any:
        if node.tag in _TEXTS:
            return node.value
        try:
            return self.yaml.constructor.construct_object(node)
        except (ValueError, KeyError):
            kind = str(node.tag).removeprefix(_TAG)
            self.report(node, key, f"'{node.value}' does not fit its tag !!{kind}", "remove the tag")
            return None

    def mapping(self, node: MappingNode, key: Key) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, ScalarNode):
                self.report(name_node, key, "a key must be a single word", "put it in quotes if it holds brackets")
                continue
            name = name_node.value
            child = (*key, name)
            if name in values:
                first = self.places[child].line
                where = "" if first is None else f", first on line {first}"
                self.report(name_node, child, f"this key is given twice{where}", "remove one of the two")
                continue
            self.places[child] = self.place(name_node)
            values[name] = self.read(value_node, child)
        return values
