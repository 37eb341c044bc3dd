"""Whole pipelines from and to folders and the Hub, safetensors only, with every check that can be made before training.
It knows files and components; nothing of adapters' files, requests or training."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_clmul.errors import RecipeError, RunError, reason
from hf_clmul.models.diffusion.architectures import Architecture, architecture_of, named
from hf_clmul.models.diffusion.noising import noising_of
from hf_clmul.paths import atomic_folder

log = logging.getLogger(__name__)
INDEX = "model_index.json"
ALIGNMENT = 64  # bytes, of what torch allocates
ADAPTER_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")
_ORIGIN = ("_name_or_path", "is_local", "local_files_only")  # how it was loaded, which configs remember
_SETTINGS: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "requires_safety_checker": False},
    "StableDiffusionXLPipeline": {"add_watermarker": False},
}
"""What would alter images after sampling: a blacked-out or marked image measures something else than the network."""
_MAY_LACK = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}
"""Components that a pipeline works without, but that its class loads without only if told so."""


def load_pipeline(
    path: str, dtype: str | torch.dtype = "float32", revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The pipeline of a folder or Hub id, checked, in evaluation mode and without progress bars or safety checker.

    Raises RecipeError if it is not there, incomplete, or of a kind that is not known.
    """
    from diffusers import DiffusionPipeline

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    options = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    with _quiet(), explained(path):
        architecture, index = checked_index(path, revision)
        absent = (name for name in _MAY_LACK.get(architecture.name, ()) if name not in _classes(index))
        settings = _SETTINGS.get(architecture.name, {}) | dict.fromkeys(absent)
        unwanted = {name: None for name in ("safety_checker",) if name in settings}
        if index.get("safety_checker", (None, None))[1] is not None:
            log.info("%s: its safety checker is left out, which would blacken images before they are judged", path)
        folder = path
        if not Path(path).is_dir():
            folder = DiffusionPipeline.download(path, revision=revision, **options, **unwanted)
        _check_files(path, Path(folder), {name: kind for name, kind in _classes(index).items() if name not in unwanted})
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options, **settings)
        _check_whole(path, Path(folder), _modules(pipeline))
    pipeline.set_progress_bar_config(disable=True)
    make_ready(pipeline, path)
    for module in _modules(pipeline).values():
        align(module)
    return pipeline


def make_ready(pipeline: Any, path: str = "the pipeline") -> Architecture:
    """Checks a pipeline in memory and switches off a DiT's own dropping of labels, which draws numbers that nothing records.

    Raises RecipeError as `load_pipeline`.
    """
    from diffusers.models.embeddings import LabelEmbedding

    architecture = architecture_of(pipeline)
    parts = {name: part for name, part in pipeline.components.items() if part is not None}
    _check(
        path, architecture, {name: tuple(kind.__name__ for kind in type(part).__mro__) for name, part in parts.items()}
    )
    noising_of(pipeline.scheduler)
    for module in getattr(pipeline, architecture.component).modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return architecture


def align(module: nn.Module) -> None:
    """Moves weights that lie askew in a mapped file into memory of their own.

    The CPU's kernels round by the alignment of their operands, which in a file depends on the length of its header: the
    same weights would give other last digits after saving and loading.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def save_pipeline(pipeline: Any, folder: str | Path) -> None:
    """Writes the whole pipeline, in safetensors, so that `folder` holds all of it or what it held before.

    Where it was loaded from is left out: that is a path of this machine. Raises RunError if an adapter is still attached
    (its layers would be saved under names that no loader knows) or the folder cannot be written.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedTokenizerFast

    for name, module in _modules(pipeline).items():
        if any(isinstance(part, BaseTunerLayer) for part in module.modules()):
            raise RunError(
                f"{folder}: the {name} still has an adapter attached, with which no whole pipeline can be saved. "
                "Merge it first (merge_and_unload), or save the adapter alone."
            )
    for part in pipeline.components.values():
        if isinstance(part, PreTrainedTokenizerFast):  # its file would tell the padding of the last prompts
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    with _quiet(), atomic_folder(folder) as aside:
        pipeline.save_pretrained(aside, safe_serialization=True)
        for file in sorted(aside.rglob("*.json")):
            if file.name in (INDEX, "config.json", "tokenizer_config.json"):
                config = json.loads(file.read_text(encoding="utf-8"))
                plain = {key: value for key, value in config.items() if key not in _ORIGIN}
                file.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def checked_index(path: str, revision: str | None) -> tuple[Architecture, dict[str, Any]]:
    """The content of model_index.json, its components checked, and whose it is. Raises RecipeError as `load_pipeline`."""
    index = _index(path, revision)
    architecture = named(_class_name(index))
    _check(path, architecture, {name: (kind,) for name, kind in _classes(index).items()})
    return architecture, index


def _index(path: str, revision: str | None) -> dict[str, Any]:
    """The content of model_index.json."""
    from diffusers import DiffusionPipeline

    folder = Path(path)
    if folder.is_file():
        raise RecipeError(
            f"model.path: {path!r} is a single file. Load it once with the pipeline class's from_single_file, save that "
            "with save_pretrained, and give the folder."
        )
    if folder.is_dir() and not (folder / INDEX).is_file():
        held = {file.name for file in folder.iterdir()}
        if any(name in held for name in ADAPTER_FILES):
            found = "is an adapter and not a whole pipeline. Give the pipeline that it belongs to"
        elif "config.json" in held:
            found = "is a single model and not a whole pipeline. Give the folder above, with the scheduler and the rest"
        else:
            found = f"has no {INDEX}. Give a folder made by a pipeline's save_pretrained"
        raise RecipeError(f"model.path: {path!r} {found}.")
    return dict(DiffusionPipeline.load_config(path, revision=revision))


def _class_name(index: Mapping[str, Any]) -> str:
    """Of a pipeline with code of its own, [module, class]."""
    name = index.get("_class_name")
    return name[-1] if isinstance(name, list | tuple) else str(name)


def _classes(index: Mapping[str, Any]) -> dict[str, str]:
    """The class of each component that is there."""
    pairs = {name: pair for name, pair in index.items() if isinstance(pair, list | tuple) and not name.startswith("_")}
    return {name: pair[1] for name, pair in pairs.items() if len(pair) == 2 and isinstance(pair[1], str)}


def _check(path: str, architecture: Architecture, found: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses missing components and those of a wrong class. `found` has the classes, the most special first."""
    wanted = {architecture.component: (architecture.denoiser,), "scheduler": None, **architecture.needs}
    for name, classes in wanted.items():
        if name not in found:
            remedy = "Every pipeline needs one, such as the DDPMScheduler that its network was trained with"
            if name != "scheduler":
                remedy = f"It needs one of class {' or '.join(classes or ())}"
            raise RecipeError(
                f"model.path: {path!r}, a {architecture.name}, has no {name}. {remedy}: add it and save the pipeline anew."
            )
        if classes is not None and not set(classes) & set(found[name]):
            raise RecipeError(
                f"model.path: {path!r}: its {name} is a {found[name][0]}; a {architecture.name} needs a "
                f"{' or '.join(classes)}. Put the right one in and save the pipeline anew."
            )


def _check_files(path: str, folder: Path, classes: Mapping[str, str]) -> None:
    """Each component has its folder (without one diffusers makes an empty tokenizer, without a word) and no pickled weights
    only."""
    for name, kind in classes.items():
        place = folder / name
        held = sorted(file.name for file in place.iterdir()) if place.is_dir() else []
        if not held:
            raise RecipeError(
                f"model.path: {path!r} has no files for its {name}, a {kind}. Give a folder made by save_pretrained, whole."
            )
        if any(file.endswith((".bin", ".ckpt", ".pt", ".pth")) for file in held) and not any(
            file.endswith(".safetensors") for file in held
        ):
            raise RecipeError(
                f"model.path: {path!r}: the weights of its {name} are pickled ({', '.join(held)}), which can run code when "
                "they are read. Convert them to safetensors: load the pipeline where you trust it and save it with "
                "save_pretrained."
            )


def _check_whole(path: str, folder: Path, modules: Mapping[str, nn.Module]) -> None:
    """No component has more weights than its files: the loaders leave missing ones random, or empty, and only warn.

    Names cannot be compared, since loaders rename; files with more than is needed are fine.
    """
    for name, module in modules.items():
        stored = 0
        for file in (folder / name).glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                stored += len(opened.keys())
        needed = sum(1 for _ in module.parameters())
        if stored < needed:
            raise RecipeError(
                f"model.path: {path!r}: the files of its {name} hold {stored} tensors, and a {type(module).__name__} of its "
                f"config has {needed}. Get them anew, or save the pipeline once more."
            )


def _modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Turns a failure to read a pipeline into a RecipeError that says what can be given."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise RecipeError(
            f"model.path: {path!r} could not be loaded: {reason(error)}\nGive a Hub id or a folder made by a pipeline's "
            "save_pretrained; without network, a folder on this machine."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of diffusers and transformers while files are read or written."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [x for x in (diffusers_logging, transformers_logging) if x.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
