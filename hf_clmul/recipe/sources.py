"""Where recipes and the files that they name lie: on disk, among the built-in ones, or on the Hub. It knows
paths and which keys hold them; of the rest of a recipe it knows nothing."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.paths import BUILTIN_PICTURES, atomic_write, builtin_data, builtin_recipes
from hf_clmul.recipe.problems import Key, Place, Problems, suggestion
from hf_clmul.recipe.tree import Tree, parse_yaml

DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet")
AUTO = "auto"
"""As `evaluation.reference`: what `hf-clmul reference` trained, as null is, for a recipe whose base names a file."""
BUILTIN_LABEL = "built-in recipe "
_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<file>[^@]+)(?:@(?P<late>[^/@]+))?")
_NOT_RECIPES = ("accelerate",)  # launch configurations lie beside the recipes


@dataclass(frozen=True)
class Source:
    """The text of a recipe, a label for messages, the folder that its relative paths start from (None on the
    Hub) and the commit that it was read from."""

    text: str
    label: str
    folder: Path | None
    revision: str | None = None


def builtin_names() -> dict[str, Path]:
    """Name -> file of the built-in recipes; `_base.yaml` and the like are parts and not recipes."""
    root = builtin_recipes()
    files = {file.relative_to(root): file for file in sorted(root.rglob("*.yaml"))}
    return {
        relative.with_suffix("").as_posix(): file
        for relative, file in files.items()
        if not relative.name.startswith("_") and relative.parts[0] not in _NOT_RECIPES
    }


def find_recipe(source: str | Path) -> Source:
    """Reads a file, a built-in recipe by name, or hf://user/repo[@revision]/file.yaml. Raises RecipeError."""
    name = os.fspath(source)
    if name.startswith("hf://"):
        return _from_hub(name)
    if os.path.isdir(name) and name not in builtin_names():
        raise RecipeError(f"{name}: is a folder; give the recipe file in it")
    if os.path.isfile(name):
        return Source(_read(Path(name), name), name, Path(os.path.abspath(name)).parent)
    return _builtin(name)


def read_base(source: Source, base: str) -> Source:
    """The recipe that `source` extends. Raises RecipeError."""
    file = Path(os.path.normpath(source.folder / Path(base).expanduser()))
    builtin = BUILTIN_LABEL * source.label.startswith(BUILTIN_LABEL)
    beside = os.path.dirname(source.label.removeprefix(builtin))
    label = builtin + os.path.normpath(os.path.join(beside, os.path.expanduser(base)))
    return Source(_read(file, label), label, file.parent)


def _builtin(name: str) -> Source:
    names = builtin_names()
    if name not in names:
        # `recipes/quickstart.yaml` is what the file is called in a clone, and in messages about it
        plain = name.removesuffix(".yaml").removeprefix("recipes/")
        meant = f"did you mean '{plain}'?" if plain in names else suggestion(name, names)
        known = f"no such file, and no built-in recipe of that name; there are: {', '.join(names)}"
        raise RecipeError("; ".join(part for part in (f"{name}: {known}", meant) if part))
    label = BUILTIN_LABEL + names[name].relative_to(builtin_recipes()).as_posix()
    return Source(_read(names[name], label), label, names[name].parent)


def _read(file: Path, label: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{label}: is a folder; a recipe is a YAML file") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{label}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{label}: cannot be read: {error.strerror}") from None


def _from_hub(name: str) -> Source:
    match = _HUB.fullmatch(name)
    if match is None or (match["revision"] and match["late"]):
        raise RecipeError(
            f"{name}: not an address of a recipe; expected hf://user/repo/file.yaml or "
            "hf://user/repo@revision/file.yaml"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    revision = match["revision"] or match["late"]
    try:
        file = hf_hub_download(match["repo"], match["file"], revision=revision)
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"{name}: the Hub cannot be reached and the file is not in the local cache; "
            "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from None
    except EntryNotFoundError:
        raise RecipeError(f"{name}: the repository {match['repo']} has no file {match['file']}") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise RecipeError(
            f"{name}: the Hub did not hand it out ({status}); check the repository and the revision, "
            "and for a private repository log in with `hf auth login`"
        ) from None
    except (HFValidationError, OSError) as error:
        raise RecipeError(f"{name}: {' '.join(str(error).split())}") from None
    # The cache keeps files under snapshots/COMMIT/, whatever branch or tag was asked for.
    commit = Path(file).parts[-1 - len(Path(match["file"]).parts)]
    return Source(_read(Path(file), name), name, None, commit)


def is_local_data(path: str, folder: Path | None) -> bool:
    """Whether it is a file or a folder and no Hub id; as of models, a folder below that of the recipe comes first."""
    if not path or path == "generated" or path.startswith("builtin:"):
        return False
    return (
        _is_explicit(path) or path.lower().endswith(DATA_ENDINGS) or (folder is not None and (folder / path).is_dir())
    )


def is_local_model(path: str, folder: Path | None) -> bool:
    """Whether it is a file or a folder and no Hub id: `name` and `owner/name` may be either, and a folder below that of
    the recipe comes first."""
    if not path or path.startswith("package:"):
        return False
    return _is_explicit(path) or path.lower().endswith(".gguf") or (folder is not None and (folder / path).is_dir())


def _is_explicit(path: str) -> bool:
    return path in (".", "..") or path.startswith(("./", "../", "~")) or os.path.isabs(path)


def local_keys(tree: Tree) -> Iterator[Key]:
    """Key paths whose value is a file or folder of this machine."""
    for name in tree.section("data"):
        path = tree.get("data", name, "path")
        if isinstance(path, str) and is_local_data(path, tree.place("data", name, "path").folder):
            yield ("data", name, "path")
    folder = tree.place("model", "path").folder
    if isinstance(path := tree.get("model", "path"), str) and is_local_model(path, folder):
        yield ("model", "path")
    if tree.get("evaluation", "reference") != AUTO and isinstance(tree.get("evaluation", "reference"), str):
        yield ("evaluation", "reference")


def resolve_paths(tree: Tree, problems: Problems) -> dict[Key, str]:
    """Makes local paths absolute, and adds a problem for each that does not exist and for unknown built-in
    data. Returns them as they were written."""
    written = {}
    for name in tree.section("data"):
        key: Key = ("data", name, "path")
        path = tree.get(*key)
        if isinstance(path, str) and path.startswith("builtin:"):
            try:
                if path.removeprefix("builtin:") not in BUILTIN_PICTURES:
                    builtin_data(path.removeprefix("builtin:"))
            except RecipeError as error:
                problems.at(tree, key, str(error))
    for key in list(local_keys(tree)):
        place, path = tree.place(*key), tree.get(*key)
        if place.folder is None:
            problems.add(
                place,
                key,
                f"a recipe from the Hub cannot name a file of this machine; found '{path}'",
                hint=f"name data on the Hub, or add {'.'.join(map(str, key))}=FILE to the command",
            )
            continue
        absolute = os.path.normpath(place.folder / Path(path).expanduser())
        _check_exists(absolute, path, place, key, problems)
        tree.put(key, Tree(absolute, {(): place}))
        written[key] = path
    return written


def _check_exists(absolute: str, path: str, place: Place, key: Key, problems: Problems) -> None:
    is_data = key[0] == "data" and not os.path.isdir(absolute)
    is_file = key[0] == "evaluation" or (is_data and absolute.lower().endswith(DATA_ENDINGS))
    if not os.path.exists(absolute):
        problems.add(
            place,
            key,
            "no such file" if is_file else "no such file or folder",
            found=f"'{path}'",
            hint=f"looked for {absolute}",
        )
    elif is_data and not absolute.lower().endswith(DATA_ENDINGS):
        problems.add(place, key, "", f"a folder, or a file ending in {', '.join(DATA_ENDINGS)}", f"'{path}'")
    elif (
        key[0] == "evaluation"
        and os.path.isdir(absolute)
        and not os.path.isfile(os.path.join(absolute, "results.json"))
    ):
        expected = f"a JSON file, a run folder, or {AUTO}"
        problems.add(place, key, "", expected, f"the folder '{path}'", "a run folder has a results.json")


def copy_builtin(name: str, destination: str | Path = ".") -> list[Path]:
    """Copies a built-in recipe, and what it extends and refers to, to a file or into a folder; returns the
    new files.

    A file that is already there with the same content is left alone. Raises RecipeError for an unknown name,
    and RunError before anything is written if another file is in the way.
    """
    source = _builtin(name)
    origin = builtin_names()[name]
    is_folder = os.path.isdir(destination) or os.fspath(destination).endswith(("/", os.sep))
    target = Path(destination) / origin.name if is_folder else Path(destination)
    copies = {target: origin}
    for file in _named_files(source):
        copies[target.parent / os.path.relpath(file, origin.parent)] = file
    for new, old in copies.items():
        is_same = new.is_file() and new.read_bytes() == old.read_bytes()
        if new.exists() and (new == target or not is_same):
            raise RunError(f"{new} already exists and is not overwritten; choose another destination")
    for new, old in copies.items():
        if not new.exists():
            atomic_write(new, old.read_bytes())
    return list(copies)


def _named_files(source: Source) -> Iterator[Path]:
    """The base of a built-in recipe, and the files beside them that they name."""
    tree = parse_yaml(source.text, source.label, source.folder, Problems(source.label))
    base = tree.get("extends") if tree else None
    if isinstance(base, str):
        yield source.folder / base
        yield from _named_files(read_base(source, base))
    for key in local_keys(tree) if tree else ():
        yield source.folder / tree.get(*key)
