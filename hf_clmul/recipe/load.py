"""From YAML and overrides to a `Recipe`: reads, merges, checks, and reports all problems at once. It never
opens the model or the data, runs no code that a recipe names, and does not import torch."""

import io
import os
from collections.abc import Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from hf_clmul.paths import shared_path
from hf_clmul.recipe.audits import ATTACK_TABLE
from hf_clmul.recipe.checks import RULE, TERM_TABLES, check_recipe
from hf_clmul.recipe.problems import Key, Place, Problems, dotted, shown
from hf_clmul.recipe.schema import Data, Learn, Recipe, Unlearn, validated
from hf_clmul.recipe.schema_json import recipe_schema
from hf_clmul.recipe.sources import Source, find_recipe, read_base, resolve_paths
from hf_clmul.recipe.tree import Tree, parse_yaml

__all__ = ["Data", "Learn", "Recipe", "Unlearn", "dump_recipe", "load_recipe", "recipe_schema"]

COMMAND_LINE = "command line"


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe.

    `source` is a file, the name of a built-in recipe, or hf://user/repo[@revision]/file.yaml. Each override,
    `key.path=value` with a YAML value, is set after the recipe's base (`extends`) and the recipe were merged.
    Raises RecipeError with all problems, each with file, line and key.
    """
    found = find_recipe(source)
    problems = Problems(found.label)
    tree = _merged(found, problems)
    if tree is None:
        problems.raise_if_any()
    for override in overrides:
        _override(tree, override, problems)
    written = resolve_paths(tree, problems)
    recipe = validated(tree, problems)
    check_recipe(tree, problems)
    problems.raise_if_any()
    recipe._source, recipe._source_revision, recipe._written = os.fspath(source), found.revision, written
    return recipe


def dump_recipe(recipe: Recipe, shared: bool = False) -> str:
    """The recipe as self-contained YAML: no `extends`, absolute local paths, defaults filled in.

    Equal recipes give the same text, and loading the text gives an equal recipe. A term's own parameters stay
    as they were given. `shared` gives the text for other people, which names no folder of this machine.
    """
    plain = recipe.model_dump(mode="json", by_alias=True)
    if shared:
        for key, path in recipe.written.items():
            *around, last = key
            reduce(getitem, around, plain)[last] = shared_path(path)
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # The classes' order is the order to read in.
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.width = 2**16  # a folded line would be hard to compare
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(plain, out)
    return out.getvalue()


def _read(source: Source, problems: Problems) -> Tree | None:
    tree = parse_yaml(source.text, source.label, source.folder, problems)
    if tree is not None and not isinstance(tree.value, dict):
        found = "an empty file" if tree.value is None else shown(tree.value)
        problems.add(
            tree.place(),
            (),
            "not a recipe",
            "keys such as `recipe_version: 1` and `requests:`",
            found,
            "`hf-clmul cp quickstart` gives one to start from",
        )
        return None
    if tree is not None:
        _expand_terms(tree)
    return tree


def _merged(source: Source, problems: Problems) -> Tree | None:
    """The recipe's tree on top of its base's."""
    tree = _read(source, problems)
    if tree is None or "extends" not in tree.value:
        return tree
    place, base_name = tree.place("extends"), tree.value.pop("extends")
    if source.folder is None:
        problems.add(
            place,
            ("extends",),
            "a recipe from the Hub cannot extend another",
            hint="push the resolved recipe (`hf-clmul show RECIPE`)",
        )
        return None
    if not isinstance(base_name, str):
        problems.add(place, ("extends",), "", "the file of one other recipe", shown(base_name))
        return None
    if not os.path.isfile(source.folder / Path(base_name).expanduser()):
        problems.add(
            place,
            ("extends",),
            "no such file",
            found=f"'{base_name}'",
            hint="the path starts at this recipe's folder",
        )
        return None
    base = _read(read_base(source, base_name), problems)
    if base is None:
        return None
    if "extends" in base.value:
        problems.add(
            base.place("extends"),
            ("extends",),
            "a base cannot extend another recipe",
            hint="write what it needs into this file",
        )
        return None
    _overlay(base, tree)
    return base


def _overlay(base: Tree, top: Tree, key: Key = ()) -> None:
    """Writes `top` over `base`: sections key by key, values and lists whole.

    Tables of terms and of attacks, and the conflict rule, are replaced whole too: naming `forget: simnpo` chooses it instead
    of the base's term, not beside it.
    """
    base.places[key] = top.place(*key)
    for name, value in top.section(*key).items():
        child = (*key, name)
        whole = child in (*TERM_TABLES, RULE, ATTACK_TABLE)
        if isinstance(value, dict) and isinstance(base.get(*child), dict) and not whole:
            _overlay(base, top, child)
        else:
            base.put(child, top.branch(*child))


def _override(tree: Tree, override: str, problems: Problems) -> None:
    """Sets `key.path=value`; a number in the path is an index into a list."""
    place = Place(COMMAND_LINE, folder=Path.cwd())
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        expected = "key.path=value, such as training.max_steps=10"
        problems.add(place, (), "not an override", expected, f"'{override}'")
        return
    value = parse_yaml(text, COMMAND_LINE, place.folder, problems, tuple(parts))
    if value is None:
        return
    key: Key = ()
    for depth, part in enumerate(parts, start=1):
        around = tree.get(*key)
        if isinstance(around, list):
            if not part.isdecimal() or int(part) >= len(around):
                expected = f"a number from 0 to {len(around) - 1}" if around else "a list that is not empty"
                problems.add(place, tuple(parts), f"`{dotted(key)}` is a list", expected, f"'{part}'")
                return
            key = (*key, int(part))
        elif isinstance(around, dict):
            key = (*key, part)
            if around.get(part) is None and depth < len(parts):
                tree.put(key, Tree({}, {(): place}))
        else:
            problems.add(place, tuple(parts), f"`{dotted(key)}` is not a section", found=shown(around))
            return
    tree.put(key, value)
    _expand_terms(tree)


def _expand_terms(tree: Tree) -> None:
    """`forget: npo` stands for `forget: {npo: {}}`, and `npo:` with nothing behind it for `npo: {}`; so with attacks. The
    conflict rule becomes a name where it has no parameters."""
    for name, parameters in tree.section(*RULE).items():
        if parameters in (None, {}) and len(tree.section(*RULE)) == 1:
            tree.put(RULE, Tree(name, {(): tree.place(*RULE, name)}))
    for table in (*TERM_TABLES, ATTACK_TABLE):
        terms: Any = tree.get(*table, default={})
        place = tree.place(*table)
        if isinstance(terms, str):
            tree.put(table, Tree({terms: {}}, {(): place, (terms,): place}))
        elif terms is None and table != ATTACK_TABLE:  # which stands for all attacks
            tree.put(table, Tree({}, {(): place}))
        for name, parameters in tree.section(*table).items():
            if parameters is None:
                tree.put((*table, name), Tree({}, {(): tree.place(*table, name)}))
