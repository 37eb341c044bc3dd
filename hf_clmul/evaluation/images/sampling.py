"""Pictures of a pipeline for prompts and seeds, one fixed noise per seed. Knows pipelines, but neither concepts nor requests.

What is promised: all noise of an image, the initial latent and what the scheduler adds at each step, is drawn on the CPU
by a generator of its own with the image's seed. It does not depend on the prompt, the batch size, the neighbours in a
batch or the device, so that two prompts, or two models, differ by nothing else. The images themselves are the same up to
the rounding of the kernels that another batch size or device brings."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_clmul.errors import NotFinite, RunError
from hf_clmul.evaluation.images.borrowed import evaluating, exchanged, is_main, modules_of


def sample(
    pipeline: Any,
    prompts: Sequence[str] | Sequence[int] | Sequence[None],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    batch_size: int,
    height: int | None = None,
    width: int | None = None,
    title: str = "sampling",
) -> Tensor:
    """Images [P, S, 3, H, W], float32 in [0, 1] on the CPU, for P prompts and S seeds.

    Prompts are texts, class labels where the pipeline takes these, None where it takes nothing. `guidance` is the
    pipeline's own guidance_scale and is ignored where it has none. `height` and `width` in pixels; None is the model's
    own size. A safety checker is left out: it would hide what is to be measured.

    Raises RunError where there is nothing to sample, where the pipeline has no place for what was given and where noise
    comes from elsewhere than the images' generators; NotFinite for images with values that are no numbers.
    """
    if not prompts or not seeds:
        raise RunError(f"nothing to sample: {len(prompts)} prompts, {len(seeds)} seeds")
    jobs = [(prompt, seed) for prompt in prompts for seed in seeds]
    images = []
    with tqdm(total=len(jobs), desc=title, unit="image", leave=False, disable=not is_main()) as bar:
        for start in range(0, len(jobs), batch_size):
            some = jobs[start : start + batch_size]
            images.append(draw(pipeline, some, steps, guidance, height, width))
            bar.update(len(some))
    return torch.cat(images).unflatten(0, (len(prompts), len(seeds)))


def draw(
    pipeline: Any,
    jobs: Sequence[tuple[Any, int]],
    steps: int,
    guidance: float,
    height: int | None = None,
    width: int | None = None,
) -> Tensor:
    """One batch [B, 3, H, W] for B pairs of a prompt and a seed; all else as of `sample`."""
    takes = inspect.signature(pipeline.__call__).parameters
    shared = _shared(pipeline, takes, {"height": height, "width": width}) | {"num_inference_steps": steps}
    if "guidance_scale" in takes:
        shared["guidance_scale"] = guidance
    parts: dict[str, Any] = {
        "scheduler": copy.deepcopy(pipeline.scheduler),  # sampling leaves its times and steps in it
        "_progress_bar_config": {"disable": True},
    }
    if "safety_checker" in pipeline.components:
        parts["safety_checker"] = None
    with exchanged(pipeline, **parts), evaluating(modules_of(pipeline)), torch.no_grad():
        images = _batch(pipeline, takes, jobs, shared)
    if not images.isfinite().all():
        raise NotFinite(
            "some sampled images hold values that are no numbers. A VAE in float16 often does this: load the "
            "pipeline in float32 or bfloat16."
        )
    return images


def _shared(pipeline: Any, takes: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The arguments of every call. Raises RunError for one that the pipeline does not take."""
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given.keys() - takes.keys():
        raise RunError(f"{type(pipeline).__name__} has one size of images: leave out `{name}`")
    return given


def _batch(pipeline: Any, takes: Any, jobs: Sequence[tuple[Any, int]], shared: dict[str, Any]) -> Tensor:
    """Images [B, 3, H, W] of (prompt, seed) pairs."""
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    before = _global_noise()
    found = pipeline(
        **_conditions(pipeline, takes, [prompt for prompt, _ in jobs]),
        **shared,
        generator=generators,
        output_type="pt",
    ).images
    if any(not torch.equal(a, b) for a, b in zip(before, _global_noise(), strict=False)):
        raise RunError(
            f"{type(pipeline).__name__} with {type(pipeline.scheduler).__name__} draws noise that no seed reaches, so that "
            "an image would depend on its neighbours. Give the pipeline a scheduler without noise, such as DDIMScheduler "
            "or FlowMatchEulerDiscreteScheduler(stochastic_sampling=False)."
        )
    return found.detach().float().cpu()


def _conditions(pipeline: Any, takes: Any, prompts: list[Any]) -> dict[str, Any]:
    """What the pipeline is told to draw. Raises RunError if the prompts are of a kind that it cannot take."""
    name, kind, wanted = (
        ("prompt", str, "texts")
        if "prompt" in takes
        else ("class_labels", int, "class labels (numbers)")
        if "class_labels" in takes
        else ("batch_size", type(None), "no prompts (None)")
    )
    for prompt in prompts:
        if not isinstance(prompt, kind):
            raise RunError(f"{type(pipeline).__name__} takes {wanted}, found the prompt {prompt!r}")
    return {name: len(prompts) if name == "batch_size" else prompts}


def _global_noise() -> list[Tensor]:
    """The states of torch's own generators, which nothing should draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
