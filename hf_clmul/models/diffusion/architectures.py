"""The table of pipeline classes that can be trained: what their denoiser is called, where concepts live in it, and how it is
fed. It knows names and shapes; nothing of files, adapters in memory or training."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from hf_clmul.errors import RecipeError
from hf_clmul.models import TEXT_ENCODER
from hf_clmul.models.diffusion import conditioning, networks
from hf_clmul.models.diffusion.conditioning import Conditioning
from hf_clmul.recipe.problems import nearest

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Adapter

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
_VAE = {"vae": ("AutoencoderKL",)}
_PROJECTED = ("CLIPTextModelWithProjection",)  # its first output is the pooled one, that of a CLIPTextModel the states
_WORDS = ("CLIPTokenizer", "CLIPTokenizerFast")
_ONE_CLIP = _VAE | {"text_encoder": ("CLIPTextModel",), "tokenizer": _WORDS}
_TWO_CLIPS = _ONE_CLIP | {"text_encoder_2": _PROJECTED, "tokenizer_2": _WORDS}
_CLIP_AND_T5 = _ONE_CLIP | {"text_encoder_2": ("T5EncoderModel",), "tokenizer_2": ("T5Tokenizer", "T5TokenizerFast")}
_FULL = {"full": ".*"}
_CROSS = _FULL | {
    "cross_attention_kv": r".*\.attn2\.to_[kv]\..*",
    "cross_attention": r".*\.attn2\..*",
    "all_but_cross_attention": r"(?!.*\.attn2\.).*",
}
_ADDED = _FULL | {"added_kv": r".*\.attn\.add_[kv]_proj\..*"}


@dataclass(frozen=True)
class Architecture:
    """One class of pipelines. `concept_layers` maps names to regular expressions for the whole name of a parameter of the bare
    denoiser; `density` is the usual one of its times (see `noising_of`)."""

    name: str
    component: Literal["unet", "transformer"]
    denoiser: str
    """The class that the component must be of."""
    adapter_targets: tuple[str, ...]
    concept_layers: Mapping[str, str]
    conditional: bool
    encode_images: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    """(pipeline, pixels [B, 3, H, W] in [-1, 1]) -> mean and standard deviation of the latents, each [B, C, h, w]."""
    encode_prompts: Callable[[Any, Sequence[str]], Conditioning]
    """(pipeline, B prompts) -> what `call` takes. The empty prompt is the unconditional branch of the pipeline."""
    call: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    """(model, noisy [B, C, h, w], times [B], conditioning) -> the raw output [B, C, h, w]."""
    needs: Mapping[str, tuple[str, ...]]
    """The components, besides denoiser and scheduler, that it cannot do without, and of which classes they may be."""
    density: str = "uniform"
    part: str = ""
    """The component that trains in the denoiser's place, see `part_of`."""

    @property
    def trained(self) -> str:
        """The component that trains."""
        return self.part or self.component

    @property
    def has_empty_prompt(self) -> bool:
        """Whether it was trained to work without a prompt as well. A UNet2DModel with classes has no class for none."""
        return self.conditional and self.denoiser != "UNet2DModel"

    @property
    def prefix(self) -> str:
        """What the names in its LoRA files begin with."""
        return self.component

    def adapter(self, chosen: "Adapter") -> "Adapter":
        """A recipe's adapter with the names of the modules that `attention` stands for."""
        if chosen.target_modules != "attention":
            return chosen
        return chosen.model_copy(update={"target_modules": list(self.adapter_targets)})


def _unconditional(name: str) -> Architecture:
    return Architecture(
        name=name, component="unet", denoiser="UNet2DModel", adapter_targets=_ATTENTION, concept_layers=_FULL,
        conditional=False, encode_images=conditioning.pixels_as_latents, encode_prompts=conditioning.unconditional,
        call=networks.unconditional_unet, needs={},
    )  # fmt: skip


_TABLE = (
    Architecture(
        name="StableDiffusionPipeline", component="unet", denoiser="UNet2DConditionModel", adapter_targets=_ATTENTION,
        concept_layers=_CROSS, conditional=True, encode_images=conditioning.latents,
        encode_prompts=conditioning.stable_diffusion, call=networks.unet, needs=_ONE_CLIP,
    ),
    Architecture(
        name="StableDiffusionXLPipeline", component="unet", denoiser="UNet2DConditionModel",
        adapter_targets=_ATTENTION, concept_layers=_CROSS, conditional=True, encode_images=conditioning.latents,
        encode_prompts=conditioning.stable_diffusion_xl, call=networks.unet,
        needs=_TWO_CLIPS,
    ),
    Architecture(
        name="StableDiffusion3Pipeline", component="transformer", denoiser="SD3Transformer2DModel",
        adapter_targets=_JOINT, concept_layers=_ADDED, conditional=True, encode_images=conditioning.latents,
        encode_prompts=conditioning.stable_diffusion_3, call=networks.sd3, density="logit_normal",
        needs=_TWO_CLIPS | {"text_encoder": _PROJECTED},
    ),
    Architecture(
        name="FluxPipeline", component="transformer", denoiser="FluxTransformer2DModel",
        adapter_targets=(*_JOINT, *_FEED_FORWARD), concept_layers=_ADDED, conditional=True,
        encode_images=conditioning.latents, encode_prompts=conditioning.flux, call=networks.flux,
        needs=_CLIP_AND_T5,
    ),
    _unconditional("DDPMPipeline"),
    _unconditional("DDIMPipeline"),
    Architecture(
        name="DiTPipeline", component="transformer", denoiser="DiTTransformer2DModel", adapter_targets=_ATTENTION,
        concept_layers=_FULL, conditional=True, encode_images=conditioning.latents,
        encode_prompts=conditioning.labelled, call=networks.dit, needs=_VAE,
    ),
)  # fmt: skip
ARCHITECTURES = {architecture.name: architecture for architecture in _TABLE}
"""By the name of the pipeline's class."""


def named(pipeline_class: str) -> Architecture:
    """The architecture of a pipeline class. Raises RecipeError, with the nearest name, for one that is not known."""
    if pipeline_class in ARCHITECTURES:
        return ARCHITECTURES[pipeline_class]
    meant = nearest(pipeline_class, ARCHITECTURES)
    raise RecipeError(
        f"model.path: its pipeline class is {pipeline_class!r}, which is not known."
        f"{f' Did you mean {meant}?' if meant else ''} Known are: {', '.join(ARCHITECTURES)}."
    )


def architecture_of(pipeline: Any) -> Architecture:
    """The architecture of a pipeline in memory. Raises RecipeError as `named`."""
    found = named(type(pipeline).__name__)
    if found.denoiser == "UNet2DModel":
        return replace(found, conditional=pipeline.unet.config.num_class_embeds is not None)
    return found


def part_of(architecture: Architecture, trainable: str | None) -> Architecture:
    """The architecture with what trains in it: with `trainable` "text_encoder" that and not the denoiser, which stays as it is and
    is given what the text encoder says of token ids. Raises RecipeError where there is not exactly one text encoder."""
    if trainable != TEXT_ENCODER:
        return architecture
    if architecture.name != "StableDiffusionPipeline":
        count = sum(name.startswith(TEXT_ENCODER) for name in architecture.needs)
        raise RecipeError(
            f"trainable: a {architecture.name} has {f'{count} text encoders' if count else 'no text encoder'}, and "
            f"{TEXT_ENCODER!r} trains the only one of a StableDiffusionPipeline: train layers of the {architecture.component}. "
            f"Possible are: {', '.join(sorted(architecture.concept_layers))}."
        )
    return replace(
        architecture, part=TEXT_ENCODER, concept_layers={TEXT_ENCODER: ".*"}, encode_prompts=conditioning.token_ids
    )


def trained_pattern(architecture: Architecture, trainable: str | None) -> str | None:
    """The regular expression of what a recipe lets train, which may be the name of concept layers. Raises as `concept_pattern`,
    and for a word that is nearly such a name."""
    names = {TEXT_ENCODER, *(name for other in ARCHITECTURES.values() for name in other.concept_layers)}
    if trainable in names:
        return concept_pattern(architecture, trainable)
    if trainable is not None and re.fullmatch(r"\w+", trainable) and (meant := nearest(trainable, sorted(names))):
        raise RecipeError(
            f"trainable: no layers are called {trainable!r}; did you mean {meant!r}? Of this {architecture.name} there are: "
            f"{', '.join(sorted(architecture.concept_layers))}; or give a regular expression for whole names of parameters."
        )
    return trainable


def concept_pattern(architecture: Architecture, name: str) -> str:
    """The regular expression of concept layers. Raises RecipeError for a name that this architecture does not have."""
    if name in architecture.concept_layers:
        return architecture.concept_layers[name]
    possible = ", ".join(sorted(architecture.concept_layers))
    if architecture.part:
        reason = f"the text encoder of this {architecture.name} trains, and the {architecture.component} stays as it is"
    elif name == TEXT_ENCODER:
        reason = "it was not chosen when the family was made: DiffusionFamily(pipeline, trainable='text_encoder')"
    elif "cross_attention" in name and "cross_attention" not in architecture.concept_layers:
        reason = f"a {architecture.denoiser} has no cross-attention"
    else:
        reason = f"a {architecture.name} has no such layers"
    raise RecipeError(f"concept layers {name!r}: {reason}. Possible are: {possible}.")
