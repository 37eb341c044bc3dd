"""The small Stable Diffusion pipeline of the coloured digits as a folder in the cache, trained when it is first asked for. It knows
what is trained on what and where it lies; how is `training`'s business."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from hf_clmul.digits.images import CLASSES, image, paraphrases, rows
from hf_clmul.digits.tiers import Settings, one_builder, place, settings_of
from hf_clmul.errors import RecipeError
from hf_clmul.paths import atomic_folder

log = logging.getLogger(__name__)
Without = Mapping[str, Sequence[str]]


def pipeline_folder(tier: str = "full", without: Without | None = None, progress: bool = True) -> Path:
    """The folder that `DiffusionPipeline.from_pretrained` takes. The first call for its arguments trains for minutes ("full") or
    seconds ("small"); another process that asks meanwhile waits.

    `without`, such as {"digit": ["seven"]}, leaves the rows of these classes out of the denoiser's training: the reference model
    for unlearning them. The autoencoder, which knows no prompts, still sees all pictures. `progress` shows a bar.
    Raises RecipeError for an unknown tier or class and RunError if the cache cannot be written.
    """
    settings, absent = settings_of(tier), _absent(without or {})
    target = made_of(tier, without)
    if not target.is_dir():
        with one_builder(target) as wanted:
            if wanted:
                _build(settings, absent, target, progress)
    return target


def made_of(tier: str, without: Without | None) -> Path:
    """The folder, made or not; its name follows all that the weights depend on. Raises RecipeError as `pipeline_folder`."""
    settings, absent = settings_of(tier), _absent(without or {})
    name = "-".join([tier, *("no-" + name for names in absent.values() for name in names)])
    return place(name, [asdict(settings), absent])


def _build(settings: Settings, absent: dict[str, list[str]], target: Path, progress: bool) -> None:
    import torch

    from hf_clmul.digits.training import train_pipeline

    log.info("making the coloured digits' pipeline once, into %s", target)
    examples = rows("train")
    shown = [i for i, row in enumerate(examples) if not any(row[axis] in names for axis, names in absent.items())]
    pixels = torch.stack([image(row["image"]) for row in examples])
    prompts = [[row["caption"], *paraphrases(row["digit"], row["colour"])] for row in examples]
    with tqdm(total=settings.autoencoder_steps + settings.steps, unit="step", leave=False, disable=not progress) as bar:
        pipeline = train_pipeline(settings, pixels, prompts, shown, bar)
        bar.refresh()  # it draws itself ten times a second at most, and the last steps may fall between
    with atomic_folder(target) as aside:
        pipeline.save_pretrained(aside)


def _absent(without: Without) -> dict[str, list[str]]:
    """In the order of CLASSES, so that the same wish has one place in the cache. Raises RecipeError for what does not exist."""
    for axis, names in without.items():
        unknown = [name for name in names if name not in CLASSES.get(axis, ())]
        if axis not in CLASSES or isinstance(names, str) or unknown:
            known = "; ".join(f"{axis}: {', '.join(names)}" for axis, names in CLASSES.items())
            raise RecipeError(f"coloured digits: cannot leave out {axis}: {names!r}; give a list of these. {known}")
    absent = {axis: [name for name in known if name in without.get(axis, ())] for axis, known in CLASSES.items()}
    for axis, names in absent.items():
        if len(names) == len(CLASSES[axis]):
            raise RecipeError(f"coloured digits: without every {axis} nothing is left to train on")
    return absent
