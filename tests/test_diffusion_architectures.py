"""Encoding and calling the networks: what the pipelines themselves compute, and exact choices of layers."""

import re

import pytest
import tiny_pipelines
import torch

from hf_clmul.errors import RecipeError
from hf_clmul.models.diffusion import networks
from hf_clmul.models.diffusion.architectures import ARCHITECTURES, architecture_of, concept_pattern, named
from hf_clmul.models.diffusion.encoding import Encoder

PROMPTS = ["a red seven", "a blue one"]
MAKERS = {
    "StableDiffusionPipeline": tiny_pipelines.stable_diffusion,
    "StableDiffusionXLPipeline": tiny_pipelines.stable_diffusion_xl,
    "StableDiffusion3Pipeline": tiny_pipelines.stable_diffusion_3,
    "FluxPipeline": tiny_pipelines.flux,
    "DDPMPipeline": tiny_pipelines.ddpm,
    "DiTPipeline": tiny_pipelines.dit,
}
PROMPTED = [name for name in MAKERS if name not in ("DDPMPipeline", "DiTPipeline")]


def denoiser(pipeline) -> torch.nn.Module:
    return getattr(pipeline, ARCHITECTURES[type(pipeline).__name__].component)


def noisy_for(pipeline, batch: int = 2) -> torch.Tensor:
    channels = 3 if hasattr(pipeline, "unet") and not hasattr(pipeline, "vae") else 4
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(1))


class Stop(Exception):
    pass


def first_call(pipeline, **arguments) -> tuple[dict, torch.Tensor]:
    """The arguments and the output of the first call that the pipeline makes of its denoiser."""
    model, seen = denoiser(pipeline), {}

    def keep(module, args, kwargs, output):
        seen.update(zip(("noisy", "times"), args, strict=False), **kwargs)
        seen["output"] = output[0] if isinstance(output, tuple) else output.sample
        raise Stop

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            pipeline(**arguments)
    except Stop:
        pass
    finally:
        handle.remove()
    return seen, seen["output"]


@torch.no_grad()
def raw(pipeline, noisy, times, conditioning) -> torch.Tensor:
    return architecture_of(pipeline).call(denoiser(pipeline), noisy, times, conditioning)


def guided(pipeline) -> dict[str, torch.Tensor]:
    """Empty prompts before the others, encoded apart as pipelines do it: another batch size rounds differently."""
    encode = architecture_of(pipeline).encode_prompts
    empty, given = encode(pipeline, ["", ""]), encode(pipeline, PROMPTS)
    return {key: torch.cat([empty[key], given[key]]) for key in given}


# ---- the same as the pipelines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_is_called_as_its_pipeline_calls_it(prediction):
    pipeline = tiny_pipelines.stable_diffusion(prediction)
    noisy = noisy_for(pipeline)
    seen, expected = first_call(pipeline, prompt=PROMPTS, latents=noisy, num_inference_steps=3, guidance_scale=1.0)
    conditioning = architecture_of(pipeline).encode_prompts(pipeline, PROMPTS)
    assert torch.equal(raw(pipeline, noisy, seen["times"].expand(2), conditioning), expected)
    assert torch.equal(conditioning["encoder_hidden_states"], seen["encoder_hidden_states"])


def test_the_empty_prompt_is_stable_diffusions_unconditional_branch():
    pipeline = tiny_pipelines.stable_diffusion()
    noisy = noisy_for(pipeline)
    seen, expected = first_call(pipeline, prompt=PROMPTS, latents=noisy, num_inference_steps=3, guidance_scale=3.0)
    assert torch.equal(raw(pipeline, torch.cat([noisy, noisy]), seen["times"].expand(4), guided(pipeline)), expected)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_sdxl_is_called_as_its_pipeline_calls_it(force_zeros):
    pipeline = tiny_pipelines.stable_diffusion_xl(force_zeros)
    noisy = noisy_for(pipeline)
    seen, expected = first_call(pipeline, prompt=PROMPTS, latents=noisy, num_inference_steps=3, guidance_scale=3.0)
    conditioning = guided(pipeline)
    assert torch.equal(raw(pipeline, torch.cat([noisy, noisy]), seen["times"].expand(4), conditioning), expected)
    assert bool(conditioning["text_embeds"][:2].any()) is not force_zeros and conditioning["text_embeds"][2:].any()
    assert conditioning["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 4


def test_sd3_is_called_as_its_pipeline_calls_it():
    pipeline = tiny_pipelines.stable_diffusion_3()
    noisy = noisy_for(pipeline)
    seen, expected = first_call(
        pipeline, prompt=PROMPTS, latents=noisy, num_inference_steps=3, guidance_scale=3.0, height=16, width=16
    )
    conditioning = guided(pipeline)
    assert torch.equal(raw(pipeline, torch.cat([noisy, noisy]), seen["timestep"], conditioning), expected)
    assert seen["timestep"].tolist() == [1000.0] * 4


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_is_called_as_its_pipeline_calls_it(guidance):
    pipeline = tiny_pipelines.flux(guidance)
    noisy = noisy_for(pipeline)
    packed = pipeline._pack_latents(noisy, 2, 4, 8, 8)
    seen, expected = first_call(
        pipeline, prompt=PROMPTS, latents=packed, num_inference_steps=3, sigmas=[0.75, 0.5, 0.25], height=16, width=16
    )
    conditioning = architecture_of(pipeline).encode_prompts(pipeline, PROMPTS)
    assert ("guidance" in conditioning) is guidance
    output = raw(pipeline, noisy, seen["timestep"] * 1000, conditioning)
    expected = pipeline._unpack_latents(expected, 16, 16, pipeline.vae_scale_factor)
    torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    if guidance:  # which is an input like others
        other = raw(pipeline, noisy, seen["timestep"] * 1000, conditioning | {"guidance": torch.full((2,), 1.0)})
        assert conditioning["guidance"].tolist() == [3.5, 3.5] and (output - other).abs().max() > 1e-4


@pytest.mark.parametrize("resolution", [None, 32])
def test_sdxl_is_told_the_size_of_the_pictures_as_its_pipeline_tells_it(resolution):
    pipeline = tiny_pipelines.stable_diffusion_xl()
    told = Encoder(pipeline, resolution).prompt(PROMPTS[0])["time_ids"]
    seen, _ = first_call(
        pipeline, prompt=PROMPTS[0], height=resolution, width=resolution, num_inference_steps=3, guidance_scale=1.0
    )
    assert torch.equal(told[None], seen["added_cond_kwargs"]["time_ids"])
    assert told[0] == (resolution or 16)


def test_a_resolution_that_the_pipeline_cannot_draw_is_refused():
    for make, side, said in (
        (tiny_pipelines.stable_diffusion, 4, "4 is no multiple of 8, as this pipeline needs; such as 8"),
        (tiny_pipelines.stable_diffusion_3, 18, "18 is no multiple of 4"),  # patches of 2 x 2, two pixels each
        (tiny_pipelines.flux, 22, "22 is no multiple of 4"),
        (tiny_pipelines.dit, 32, "32, and a DiTPipeline draws 16 x 16 pixels alone"),
        (tiny_pipelines.ddpm, 16, "16, and a DDPMPipeline draws 8 x 8 pixels alone"),
    ):
        pipeline = make()
        with pytest.raises(RecipeError, match=rf"diffusion.resolution: {said}"):
            Encoder(pipeline, side)
        own = Encoder(pipeline).size
        assert Encoder(pipeline, own[0]).size == own
    assert Encoder(tiny_pipelines.stable_diffusion_3(), 20).size == (20, 20)


def test_patches_are_packed_as_flux_packs_them():
    pipeline = tiny_pipelines.flux()
    latents = torch.arange(2 * 4 * 6 * 8, dtype=torch.float32).reshape(2, 4, 6, 8)
    packed = networks.pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 4, 6, 8))
    assert torch.equal(networks.unpack(packed, 6, 8), latents)
    assert packed[0, 1, :4].tolist() == [2, 3, 10, 11]  # second patch, first channel: two pixels of each of two rows
    ids = pipeline._prepare_latent_image_ids(2, 3, 4, torch.device("cpu"), torch.float32)
    assert torch.equal(networks.image_ids(6, 8).float(), ids)


def test_an_unconditional_unet_is_called_as_its_pipeline_calls_it():
    pipeline = tiny_pipelines.ddpm()
    architecture = architecture_of(pipeline)
    seen, expected = first_call(pipeline, batch_size=2, num_inference_steps=3)
    assert not architecture.conditional and architecture.encode_prompts(pipeline, PROMPTS) == {}
    assert torch.equal(raw(pipeline, seen["noisy"], seen["times"].expand(2), {}), expected)


def test_a_class_conditional_unet_takes_numbers():
    pipeline = tiny_pipelines.ddpm(classes=10)
    architecture, noisy, times = architecture_of(pipeline), noisy_for(pipeline), torch.tensor([5, 900])
    conditioning = architecture.encode_prompts(pipeline, ["7", "0"])
    with torch.no_grad():
        expected = pipeline.unet(noisy, times, class_labels=torch.tensor([7, 0])).sample
    assert architecture.conditional and torch.equal(raw(pipeline, noisy, times, conditioning), expected)
    for prompt in ("", "10", "-1", "seven"):
        with pytest.raises(
            RecipeError, match=f"prompt '{prompt}' names no class: the network takes a number from 0 to 9"
        ):
            architecture.encode_prompts(pipeline, ["1", prompt])


def test_dit_is_called_as_its_pipeline_calls_it():
    pipeline = tiny_pipelines.dit()
    seen, expected = first_call(pipeline, class_labels=[7, 3], num_inference_steps=3, guidance_scale=2.0)
    encode = architecture_of(pipeline).encode_prompts
    conditioning = encode(pipeline, ["lucky seven", "3", "", ""])
    assert torch.equal(conditioning["class_labels"], seen["class_labels"])
    output = raw(pipeline, seen["noisy"], seen["timestep"], conditioning)
    assert output.shape == (4, 4, 8, 8) and torch.equal(output, expected[:, :4])  # the other four are the variance
    with pytest.raises(RecipeError, match="from 0 to 999, or one of its 1001 labels, such as 'class 0'"):
        encode(pipeline, ["eight"])


@pytest.mark.parametrize("name", MAKERS)
def test_an_output_has_the_shape_of_the_samples_and_heeds_all_it_is_given(name):
    pipeline = MAKERS[name](classes=10) if name == "DDPMPipeline" else MAKERS[name]()
    noisy, times = noisy_for(pipeline), torch.tensor([400, 700])
    encode = architecture_of(pipeline).encode_prompts
    prompts = PROMPTS if name in PROMPTED else ["7", "1"]
    output = raw(pipeline, noisy, times, encode(pipeline, prompts))
    assert output.shape == noisy.shape and torch.isfinite(output).all()
    others = {
        "prompts": raw(pipeline, noisy, times, encode(pipeline, prompts[::-1])),
        "times": raw(pipeline, noisy, times.flip(0), encode(pipeline, prompts)),
        "samples": raw(pipeline, noisy.flip(2), times, encode(pipeline, prompts)),
    }
    assert all((output - other).abs().amax(dim=(1, 2, 3)).gt(1e-5).all() for other in others.values())
    alone = raw(pipeline, noisy[1:], times[1:], encode(pipeline, prompts[1:]))
    torch.testing.assert_close(alone, output[1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MAKERS)
def test_a_network_in_bfloat16_takes_samples_in_float32(name):
    pipeline = MAKERS[name]()
    denoiser(pipeline).to(torch.bfloat16)
    conditioning = architecture_of(pipeline).encode_prompts(pipeline, PROMPTS if name in PROMPTED else ["7", "1"])
    output = raw(pipeline, noisy_for(pipeline), torch.tensor([400, 700]), conditioning)
    assert output.dtype == torch.bfloat16 and torch.isfinite(output).all()


# ---- images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "offset"), [(None, 0.0), (0.1, 0.1)])
def test_latents_are_scaled_as_the_pipelines_undo_it(shift, offset):
    pipeline = tiny_pipelines.stable_diffusion(vae_shift=shift)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, deviation = architecture_of(pipeline).encode_images(pipeline, pixels)
    with torch.no_grad():
        found = pipeline.vae.encode(pixels).latent_dist
    assert mean.shape == deviation.shape == (2, 4, 8, 8) and not mean.requires_grad
    torch.testing.assert_close(mean / 0.7 + offset, found.mean)
    torch.testing.assert_close(deviation / 0.7, found.std)


def test_a_half_precision_autoencoder_that_overflows_encodes_in_float32():
    pipeline = tiny_pipelines.stable_diffusion_xl()
    encode, pixels = architecture_of(pipeline).encode_images, torch.ones(1, 3, 16, 16)
    pipeline.vae.to(torch.float16)
    before = {key: value.clone() for key, value in pipeline.vae.state_dict().items()}
    mean, _ = encode(pipeline, pixels)
    after = pipeline.vae.state_dict()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == torch.float16 for key in before)
    pipeline.vae.to(torch.float32)
    assert mean.dtype == torch.float32 and torch.equal(mean, encode(pipeline, pixels)[0])


def test_networks_on_pixels_have_pixels_for_latents():
    pipeline, pixels = tiny_pipelines.ddpm(), torch.full((1, 3, 8, 8), 0.25)
    mean, deviation = architecture_of(pipeline).encode_images(pipeline, pixels)
    assert torch.equal(mean, pixels) and deviation.shape == pixels.shape and not deviation.any()


# ---- concept layers, adapter targets ---------------------------------------------------------------------------


def chosen(pipeline, name: str) -> set[str]:
    pattern = re.compile(concept_pattern(architecture_of(pipeline), name))
    return {key for key, _ in denoiser(pipeline).named_parameters() if pattern.fullmatch(key)}


@pytest.mark.parametrize("make", [tiny_pipelines.stable_diffusion, tiny_pipelines.stable_diffusion_xl])
def test_cross_attention_is_chosen_to_the_last_parameter(make):
    pipeline = make()
    parts = {key: key.split(".") for key, _ in pipeline.unet.named_parameters()}
    cross = {key for key, found in parts.items() if "attn2" in found}
    kv = {key for key in cross if "to_k" in parts[key] or "to_v" in parts[key]}
    assert chosen(pipeline, "cross_attention_kv") == kv and len(kv) == 2 * 4  # mid, one down, two up
    assert chosen(pipeline, "cross_attention") == cross and len(cross) == 5 * 4  # q, k, v, and the output with a bias
    assert chosen(pipeline, "all_but_cross_attention") == set(parts) - cross
    assert chosen(pipeline, "full") == set(parts)


@pytest.mark.parametrize(("make", "blocks"), [(tiny_pipelines.stable_diffusion_3, 2), (tiny_pipelines.flux, 1)])
def test_added_keys_and_values_are_chosen_to_the_last_parameter(make, blocks):
    pipeline = make()
    assert chosen(pipeline, "added_kv") == {
        f"transformer_blocks.{block}.attn.add_{part}_proj.{kind}"
        for block in range(blocks) for part in "kv" for kind in ("weight", "bias")
    }  # fmt: skip
    assert chosen(pipeline, "full") == {key for key, _ in pipeline.transformer.named_parameters()}


def test_layers_that_an_architecture_lacks_are_refused():
    messages = {}
    for kind, name in (("FluxPipeline", "cross_attention_kv"), ("DDPMPipeline", "all_but_cross_attention"),
                       ("StableDiffusionPipeline", "added_kv"), ("StableDiffusionPipeline", "cross_attention_k")):  # fmt: skip
        with pytest.raises(RecipeError) as caught:
            concept_pattern(ARCHITECTURES[kind], name)
        messages[kind, name] = str(caught.value)
    assert list(messages.values()) == [
        "concept layers 'cross_attention_kv': a FluxTransformer2DModel has no cross-attention. Possible are: added_kv, full.",
        "concept layers 'all_but_cross_attention': a UNet2DModel has no cross-attention. Possible are: full.",
        "concept layers 'added_kv': a StableDiffusionPipeline has no such layers. Possible are: all_but_cross_attention, "
        "cross_attention, cross_attention_kv, full.",
        "concept layers 'cross_attention_k': a StableDiffusionPipeline has no such layers. Possible are: "
        "all_but_cross_attention, cross_attention, cross_attention_kv, full.",
    ]


@pytest.mark.parametrize("name", MAKERS)
def test_every_adapter_target_is_there(name):
    modules = [key for key, _ in denoiser(MAKERS[name]()).named_modules()]
    for target in ARCHITECTURES[name].adapter_targets:
        assert any(key.endswith(f".{target}") for key in modules), target


@pytest.mark.parametrize("name", MAKERS)
def test_the_table_says_what_the_pipelines_are(name):
    pipeline, architecture = MAKERS[name](), ARCHITECTURES[name]
    assert type(denoiser(pipeline)).__name__ == architecture.denoiser
    assert all(getattr(pipeline, part) is not None for part in architecture.needs)
    assert architecture.prefix == getattr(pipeline, f"{architecture.component}_name", architecture.component)
    assert architecture.density == ("logit_normal" if name == "StableDiffusion3Pipeline" else "uniform")


def test_an_unknown_pipeline_class_is_answered_with_the_nearest():
    with pytest.raises(RecipeError) as caught:
        named("StableDifusionPipeline")
    assert str(caught.value).startswith(
        "model.path: its pipeline class is 'StableDifusionPipeline', which is not known. Did you mean "
        "StableDiffusionPipeline? Known are: StableDiffusionPipeline, "
    )
