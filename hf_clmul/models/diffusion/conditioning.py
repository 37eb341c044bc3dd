"""Images to latents and prompts to what a network is given, by the encoders of a pipeline. Without gradient; what comes out
has the names of the network's arguments. It knows neither noise nor the network's call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_clmul.errors import RecipeError

Conditioning = dict[str, Tensor]
"""Each [B, ...]: `encoder_hidden_states` [B, T, D], `pooled_projections`, `text_embeds` [B, P], `time_ids` [B, 6], `guidance`
[B] or `class_labels` [B], integers; of a text encoder that trains `input_ids` [B, T]."""

GUIDANCE = 3.5
"""What a guidance-distilled FLUX is told, as by its pipeline; the same with the empty prompt."""


@torch.no_grad()
def latents(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, C, h, w], float32, of the scaled latents of pixels [B, 3, H, W] in [-1, 1]."""
    vae, config = pipeline.vae, pipeline.vae.config
    stored = vae.dtype
    upcast = stored == torch.float16 and config.force_upcast  # those overflow; to float32 and back loses nothing
    try:
        if upcast:
            vae.to(torch.float32)
        found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    finally:
        if upcast:
            vae.to(stored)
    mean, deviation = found.mean.float(), found.std.float()
    return (mean - (config.shift_factor or 0.0)) * config.scaling_factor, deviation * config.scaling_factor


def pixels_as_latents(pipeline: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels themselves, for networks that work on them: mean [B, 3, H, W] and a deviation of 0."""
    return pixels.float(), torch.zeros_like(pixels, dtype=torch.float32)


@torch.no_grad()
def stable_diffusion(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """The last hidden states of the text encoder, as the pipeline makes them."""
    states, _ = pipeline.encode_prompt(list(prompts), pipeline.text_encoder.device, 1, False)
    return {"encoder_hidden_states": states}


def token_ids(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """What the text encoder reads, for one that trains: what it says changes with each step. With a mask where it takes
    one."""
    words = pipeline.tokenizer
    most = words.model_max_length
    found = words(list(prompts), padding="max_length", max_length=most, truncation=True, return_tensors="pt")
    if not pipeline.text_encoder.config.to_dict().get("use_attention_mask"):  # as the pipeline asks
        del found["attention_mask"]
    return dict(found)


@torch.no_grad()
def stable_diffusion_xl(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Both encoders' states, the pooled ones of the second, and the ids of an uncropped image of the pipeline's own size.

    An empty prompt is what the pipeline takes when no negative prompt is given: zeros, if its config says so.
    """
    device = pipeline.text_encoder_2.device
    states, _, pooled, _ = pipeline.encode_prompt(
        list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    if pipeline.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([prompt == "" for prompt in prompts], device=device)
        states, pooled = states.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=states.dtype, device=device)
    return {
        "encoder_hidden_states": states,
        "text_embeds": pooled,
        "time_ids": ids.repeat(len(prompts), 1),
    }


@torch.no_grad()
def stable_diffusion_3(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """The states of two or three text encoders, and the pooled ones of the first two."""
    texts = list(prompts)
    states, _, pooled, _ = pipeline.encode_prompt(
        texts, texts, texts, device=pipeline.text_encoder.device, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


@torch.no_grad()
def flux(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """T5's states and CLIP's pooled ones; a network that takes a guidance scale gets `GUIDANCE`."""
    states, pooled, _ = pipeline.encode_prompt(list(prompts), device=pipeline.text_encoder_2.device)
    found = {"encoder_hidden_states": states, "pooled_projections": pooled}
    if pipeline.transformer.config.guidance_embeds:
        found["guidance"] = torch.full((len(prompts),), GUIDANCE, device=states.device)
    return found


def unconditional(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Nothing; of a network with classes their numbers. Raises RecipeError for a prompt that names no class."""
    classes = pipeline.unet.config.num_class_embeds
    if classes is None:
        return {}
    return {"class_labels": torch.tensor([_class(prompt, {}, classes) for prompt in prompts])}


def labelled(pipeline: Any, prompts: Sequence[str]) -> Conditioning:
    """Classes by number or by a name that the pipeline knows; an empty prompt is the class of none.

    Raises RecipeError for a prompt that is neither.
    """
    classes = pipeline.transformer.config.num_embeds_ada_norm
    found = [classes if prompt == "" else _class(prompt, pipeline.labels, classes) for prompt in prompts]
    return {"class_labels": torch.tensor(found)}


def _class(prompt: str, labels: dict[str, int], classes: int) -> int:
    if prompt in labels:
        return labels[prompt]
    if prompt.isdecimal() and int(prompt) < classes:
        return int(prompt)
    named = f", or one of its {len(labels)} labels, such as {next(iter(labels))!r}" if labels else ""
    remedy = "" if prompt else " This network was trained without an unconditional class: use no term that needs one."
    raise RecipeError(
        f"prompt {prompt!r} names no class: the network takes a number from 0 to {classes - 1}{named}.{remedy}"
    )
