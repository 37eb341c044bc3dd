"""Built-in recipes, and recipes on the Hub: read, pinned, and kept from naming files of this machine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_recipe import RECIPE, changed

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.recipe import sources as recipe_sources
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.sources import builtin_names, copy_builtin

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_RECIPE = changed("  notes: {path: notes.jsonl}", "  notes: {path: user/notes}")
HUB_FILES = {
    "recipes/good.yaml": HUB_RECIPE,
    "extends.yaml": "extends: recipes/good.yaml\nname: child\n",
    "local.yaml": RECIPE.replace("some/model", "/etc/model"),
    "code.yaml": HUB_RECIPE.replace("{path: some/model}", "{path: some/model, trust_remote_code: true}"),
}


class _Hub(BaseHTTPRequestHandler):
    """Answers /user/repo/resolve/REVISION/FILE as the Hub does, for the revisions `main` and `v1`."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        repo, _, place = self.path.removeprefix("/").partition("/resolve/")
        revision, _, file = place.partition("/")
        if repo != "user/repo" or revision not in ("main", "v1", COMMIT) or file not in HUB_FILES:
            self.send_response(404)
            known = repo == "user/repo" and revision in ("main", "v1", COMMIT)
            codes = {
                True: "EntryNotFound",
                False: "RevisionNotFound" if repo == "user/repo" else "RepoNotFound",
            }
            self.send_header("X-Error-Code", codes[known])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = HUB_FILES[file].encode()
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{abs(hash(file)):x}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LOAD = """
import json, sys
from hf_clmul.errors import RecipeError
from hf_clmul.recipe.load import load_recipe

def load(source, *overrides):
    try:
        recipe = load_recipe(source, overrides)
        return [recipe.name, recipe.source, recipe.source_revision]
    except RecipeError as error:
        return str(error)

print(json.dumps([load(*arguments) for arguments in json.loads(sys.argv[1])]))
"""


def load_from_hub(hub: str, home: Path, *asked: tuple[str, ...], **environment: str) -> list:
    """Name, source and revision of each recipe asked for, or the message. In a new process, because
    huggingface_hub reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    settings["PYTHONPATH"] = str(Path(recipe_sources.__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(asked)],
        capture_output=True, text=True, env={**os.environ, **settings, **environment}, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_recipe_on_the_hub_is_pinned_to_its_commit(hub, tmp_path):
    main, tag, late = (
        "hf://user/repo/recipes/good.yaml",
        "hf://user/repo@v1/recipes/good.yaml",
        "hf://user/repo/recipes/good.yaml@v1",
    )
    found = load_from_hub(hub, tmp_path, (main,), (tag,), (late,))
    assert found == [["small", source, COMMIT] for source in (main, tag, late)]
    # once read, it is in the cache
    assert load_from_hub(hub, tmp_path, (tag,), HF_HUB_OFFLINE="1") == [["small", tag, COMMIT]]


REFUSED = {
    "user/repo/gone.yaml": ": the repository user/repo has no file gone.yaml",
    "user/repo@v9/recipes/good.yaml": ": the Hub did not hand it out (404); check the repository and the ",
    "user/other/recipes/good.yaml": ": the Hub did not hand it out (404); check the repository and the ",
    "user/repo@v1/recipes/good.yaml@v1": ": not an address of a recipe; expected hf://user/repo/file.yaml or",
    "user/repo": ": not an address of a recipe; expected hf://user/repo/file.yaml or",
    "user/repo/extends.yaml": ":1: extends: a recipe from the Hub cannot extend another; push the ",
    "user/repo/local.yaml": ":6: data.notes.path: a recipe from the Hub cannot name a file of this machine; "
    "found 'notes.jsonl'; name data on the Hub, or add data.notes.path=FILE to the command",
    "user/repo/code.yaml": ":3: model.trust_remote_code: a recipe from the Hub cannot switch this on; "
    "if you trust the model's code, add model.trust_remote_code=true to the command",
}


def test_what_a_recipe_on_the_hub_cannot_do(hub, tmp_path):
    messages = load_from_hub(hub, tmp_path, *((f"hf://{address}",) for address in REFUSED))
    for (address, expected), message in zip(REFUSED.items(), messages, strict=True):
        assert f"hf://{address}{expected}" in message
    both = messages[list(REFUSED).index("user/repo/local.yaml")]
    assert both.startswith("hf://user/repo/local.yaml has 2 problems:\n")
    assert ":3: model.path: a recipe from the Hub cannot name a file of this machine; found '/etc/model'" in both


def test_the_command_line_may_name_files_and_trust_code(hub, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("")
    local = ("hf://user/repo/local.yaml", "model.path=some/model", f"data.notes.path={data}")
    code = ("hf://user/repo/code.yaml", "model.trust_remote_code=true")
    assert load_from_hub(hub, tmp_path, local, code) == [["small", source, COMMIT] for source, *_ in (local, code)]


def test_without_a_connection_the_message_says_so(hub, tmp_path):
    (message,) = load_from_hub(hub, tmp_path, ("hf://user/repo/recipes/good.yaml",), HF_HUB_OFFLINE="1")
    assert message == (
        "hf://user/repo/recipes/good.yaml: the Hub cannot be reached and the file is not in the local cache; "
        "check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
    )


@pytest.fixture
def builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Built-in recipes made for the test: one alone, two with a common base and a file beside it."""
    root = tmp_path / "builtin"
    (root / "mini").mkdir(parents=True)
    (root / "accelerate").mkdir()
    (root / "alone.yaml").write_text("# A recipe alone\n" + HUB_RECIPE)
    (root / "mini/_base.yaml").write_text(HUB_RECIPE + "evaluation: {reference: figures/reference.json}\n")
    (root / "mini/figures").mkdir()
    (root / "mini/figures/reference.json").write_text("{}")
    (root / "mini/npo.yaml").write_text("extends: _base.yaml\nname: npo\n")
    (root / "mini/simnpo.yaml").write_text("extends: _base.yaml\nunlearning: {forget: simnpo}\n")
    (root / "accelerate/ddp.yaml").write_text("num_processes: 2\n")
    monkeypatch.setattr(recipe_sources, "builtin_recipes", lambda: root)
    monkeypatch.chdir(tmp_path)
    return root


def test_built_in_recipes_are_found_by_name(builtin):
    assert list(builtin_names()) == ["alone", "mini/npo", "mini/simnpo"]
    assert load_recipe("mini/npo").name == "npo"
    assert load_recipe("mini/npo").evaluation.reference == str(builtin / "mini/figures/reference.json")


def test_a_file_of_the_same_name_comes_first(builtin):
    Path("alone").write_text(HUB_RECIPE.replace("name: small", "name: mine"))
    assert load_recipe("alone").name == "mine"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("alon", "alone"), ("recipes/mini/npo.yaml", "mini/npo"), ("simnpo", "mini/simnpo")],
)
def test_unknown_names_are_answered_with_the_nearest(builtin, name, meant):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    assert str(caught.value) == (
        f"{name}: no such file, and no built-in recipe of that name; "
        f"there are: alone, mini/npo, mini/simnpo; did you mean '{meant}'?"
    )


def test_problems_in_a_built_in_recipe_name_its_file(builtin):
    (builtin / "mini/_base.yaml").write_text("recipe_versio: 1\n")
    with pytest.raises(RecipeError, match=r"(?m)^built-in recipe mini/_base.yaml:1: recipe_versio: unknown key"):
        load_recipe("mini/npo")


def test_copies_bring_their_base_and_what_it_names(builtin):
    copies = copy_builtin("mini/npo", "new/")
    assert [str(path) for path in copies] == ["new/npo.yaml", "new/_base.yaml", "new/figures/reference.json"]
    assert Path("new/_base.yaml").read_bytes() == (builtin / "mini/_base.yaml").read_bytes()
    assert load_recipe("new/npo.yaml").name == "npo"
    assert copy_builtin("mini/simnpo", "new/mine.yaml")[0] == Path("new/mine.yaml")  # the same base may stay
    assert load_recipe("new/mine.yaml").unlearning.forget == {"simnpo": {}}


def test_copies_overwrite_nothing_and_then_write_nothing(builtin):
    Path("here").mkdir()
    Path("here/_base.yaml").write_text("mine")
    with pytest.raises(RunError, match="here/_base.yaml already exists and is not overwritten"):
        copy_builtin("mini/npo", "here")
    assert [path.name for path in Path("here").iterdir()] == ["_base.yaml"]
    copy_builtin("alone", "here")
    with pytest.raises(RunError, match="here/alone.yaml already exists"):
        copy_builtin("alone", "here")


def test_unreadable_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(RecipeError, match=r"^latin.yaml: not a text file in UTF-8 \(byte 9\); save it as UTF-8$"):
        load_recipe("latin.yaml")
    with pytest.raises(RecipeError, match=r"^\.: is a folder; give the recipe file in it$"):
        load_recipe(".")
