"""The family of diffusion models, made from a pipeline. The trainer sees what trains alone, the denoiser or the text encoder; the
rest stays in the pipeline. How architectures differ is `models.diffusion`; here is only what the trainer asks."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard
from peft import PeftModel
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as SAFE_WEIGHTS_OF_SEVERAL
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_clmul.data.noisy import NoisyCollator
from hf_clmul.data.roles import RoleDataset, derived_seed
from hf_clmul.errors import RunError
from hf_clmul.families.options import Diffusion
from hf_clmul.gradients.options import Protect
from hf_clmul.models import adapters
from hf_clmul.models.diffusion import attention, key_values, similarity
from hf_clmul.models.diffusion.architectures import concept_pattern, trained_pattern
from hf_clmul.models.diffusion.encoding import BATCH, Encoded, Encoder, anchored, check_images, latent_shape
from hf_clmul.models.diffusion.lora_files import check_precision, save_lora
from hf_clmul.models.diffusion.noising import noising_of
from hf_clmul.models.diffusion.partial import half_way
from hf_clmul.models.diffusion.prompts import check_apart
from hf_clmul.models.teachers import random_like, zero
from hf_clmul.objectives import FORGET, MEMORY, RETAIN
from hf_clmul.objectives.active import VARIANTS, ActiveTerm, is_sampled
from hf_clmul.objectives.prediction import Denoised
from hf_clmul.objectives.preparation import Sampled

DEFAULTS = Diffusion()
OF_TRANSFORMERS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_OF_SEVERAL)
Asked = tuple[Mapping[str, Any], Mapping[str, Tensor]]
"""Noisy samples at their times, and prompts for them."""


class DiffusionFamily:
    """What goes with the denoiser is in the pipeline, which checkpoints need not repeat. With `trainable` "text_encoder" that
    trains, through the denoiser, which gets no gradient from then on (`requires_grad_(False)`)."""

    name = "diffusion"
    own_files = True

    def __init__(self, pipeline: Any, options: Diffusion = DEFAULTS, trainable: str | None = None) -> None:
        self.pipeline, self.options = pipeline, options
        self.encoder = Encoder(pipeline, options.resolution, options.resize, trainable)
        self.architecture = self.encoder.architecture
        self.noising = noising_of(
            pipeline.scheduler, options.min_snr_gamma, options.density or self.architecture.density
        )
        self.mixed: torch.dtype | None = None

    @property
    def denoiser(self) -> nn.Module:
        return getattr(self.pipeline, self.architecture.component)

    @property
    def trained(self) -> nn.Module:
        """The part of the pipeline that trains."""
        return getattr(self.pipeline, self.architecture.trained)

    def check(self, model: nn.Module) -> None:
        check_precision(model)
        if self.options.prompt_drop and not self.architecture.has_empty_prompt:
            raise ValueError(
                f"prompt_drop={self.options.prompt_drop} shows images without their prompt, for which this "
                f"{self.architecture.name} was not made: leave it out."
            )
        if isinstance(model, PeftModel) and self.architecture.part:
            raise ValueError(
                "trainable='text_encoder' trains the whole text encoder, and an adapter is for the denoiser: leave one of the two out."
            )
        if isinstance(model, PeftModel) and model.peft_config[adapters.trained(model)].modules_to_save:
            raise ValueError(
                "peft_config.modules_to_save trains whole layers beside the adapter, which the LoRA files of diffusers cannot "
                "hold: name them in target_modules instead."
            )

    def bind(self, model: nn.Module, checkpointing: bool = False, mixed: torch.dtype | None = None) -> None:
        """Trainer and its callbacks know transformers' names: a config that can tell its text, and the method that switches
        checkpointing on. Models of diffusers have neither."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.main_input_name = "noisy"
        if self.architecture.part:
            self.mixed = mixed
            self.denoiser.requires_grad_(False)
            if checkpointing:
                self.denoiser.enable_gradient_checkpointing()
            return
        base._internal_dict = Readable(base.config)
        if checkpointing:
            base.activation_checkpointing_enable = lambda **kwargs: base.enable_gradient_checkpointing()

    def pattern(self, trainable: str | None) -> str | None:
        """Names of concept layers, of whatever architecture, are no expressions."""
        return trained_pattern(self.architecture, trainable)

    def encoded(self, data: Any, what: str) -> list[Encoded]:
        return self.encoder.encode(data, what)

    def roles(self, data: Mapping[str, Any], terms: Mapping[str, Sequence[ActiveTerm]], seed: int) -> RoleDataset:
        found = {}
        for role, active in terms.items():
            rows = self.encoded(data[role], role)
            if any(is_sampled(t) for t in active):
                rows = self._to_sample(rows, active, role)
            else:
                check_images(rows, role)
            asked = frozenset().union(*(term.term.needs for term in active))
            self._check_prompts(role, active)
            if "anchor" in asked:
                anchors = next(t.preparation.anchor for t in active if "anchor" in t.term.needs)
                rows = self.encoder.with_anchors(rows, anchors, role)
            if "attention" in asked:
                rows = self._attended(rows, next(t for t in active if "attention" in t.term.needs), role)
            found[role] = rows
        asked = frozenset().union(*(active.term.needs for of_role in terms.values() for active in of_role))
        if "apartness" in asked:
            how = next(t for t in terms[RETAIN] if "apartness" in t.term.needs)
            found[RETAIN] = similarity.of_examples(
                found[RETAIN], found.get(FORGET, ()), how.preparation.alpha, f"{RETAIN}/{how.name}"
            )
        wanted = [role for role in (RETAIN, MEMORY) if role in data and role not in found]
        beside = {role: self.encoded(data[role], role) for role in wanted}
        if "keys_values" in asked:
            key_values.pattern(self.architecture)  # refused before anything trains
        partners: Sequence[Encoded] = ()
        if "partner" in asked:
            own = self.encoder.with_partners(found[FORGET], FORGET)
            if own is None:
                partners = [{name: e[name] for name in ("mean", "std")} for e in {**found, **beside}.get(RETAIN, ())]
            found[FORGET] = found[FORGET] if own is None else own
            if own is None and not partners:
                raise ValueError(
                    "forget: a second image is needed for each example: give the data a column `partner`, or data to "
                    "retain, "
                    "whose images are taken then."
                )
        if self.architecture.conditional and FORGET in found:
            captions = {role: [e["row"]["caption"] for e in rows if "row" in e] for role, rows in found.items()}
            check_apart(self.pipeline, self.architecture, captions.pop(FORGET), captions)
        return RoleDataset(found, next(iter(terms)), seed, noisy=True, beside=beside, partners=partners)

    def _to_sample(self, rows: list[Encoded], active: Sequence[ActiveTerm], role: str) -> list[Encoded]:
        """So many examples of each prompt as are sampled before training, then with their noisy samples."""
        how = next(t for t in active if is_sampled(t))
        odd = [t.name for t in active if "image" in t.term.needs]
        if odd:
            raise ValueError(
                f"{role}/{how.name}: `sampled` trains on noisy samples that no image belongs to, and {odd[0]} needs "
                "the "
                "image: leave one of the two out."
            )
        prompts = {row["row"]["caption"]: row for row in rows}
        plain = [{k: v for k, v in row.items() if k not in ("mean", "std")} for row in prompts.values()]
        return [{**row, "sample": i} for row in plain for i in range(how.preparation.sampled)]

    def sampled(self, model: nn.Module, examples: Sequence[Encoded], how: Sampled, seed: int) -> list[Encoded]:
        """The examples with a noisy sample of their own, which the model makes as it is: a pure function of its weights
        and the seed."""
        device = next(model.parameters()).device
        empty, found = self.encoder.prompt(""), []
        shape = latent_shape(self.pipeline, self.architecture, self.encoder.size)
        for start in range(0, len(examples), BATCH):
            some = examples[start : start + BATCH]

            def guided(noisy: Tensor, times: Tensor, which: list[int], some: Sequence[Encoded] = some) -> Tensor:
                shown = {name: [some[k]["conditioning"][name] for k in which] for name in empty}
                prompts = {name: torch.stack(values).to(device) for name, values in shown.items()}
                nothing = {name: torch.stack([empty[name]] * len(which)).to(device) for name in empty}
                batch = {"noisy": noisy, "times": times}
                conditional, unconditional = self._call(model, [(batch, prompts), (batch, nothing)])
                return unconditional + how.guidance * (conditional - unconditional)

            seeds = [derived_seed(seed, "sampled", e["row"]["caption"], e["sample"]) for e in some]
            noisy, times = half_way(guided, self.noising, shape, seeds, how.sampling_steps, device)
            found += [{**e, "noisy": n, "time": t} for e, n, t in zip(some, noisy, times, strict=True)]
        return found

    def _attended(self, rows: list[Encoded], active: ActiveTerm, role: str) -> list[Encoded]:
        """With the places of the words that get no attention."""
        concept_pattern(self.architecture, "cross_attention")  # refused where there is none
        if not active.preparation.words:
            raise ValueError(f"{role}/{active.name}: which words name the concept? Give `words`, such as [seven].")
        return self.encoder.with_concept_tokens(rows, active.preparation.words, role)

    def readers(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return key_values.matrices(self.architecture, model)

    def read(self, data: RoleDataset, how: Protect) -> tuple[Tensor, Tensor]:
        prompts = how.prompts if how.prompts is not None else kept_captions(data)
        if not prompts:
            raise ValueError("protect: nothing is retained, so that there are no captions to protect: give `prompts`.")
        forgotten = [example["row"]["caption"] for example in data.roles[FORGET]]
        return (
            key_values.read_all(self.encoder, prompts, how.tokens), key_values.read_all(self.encoder, forgotten, "all")
        )  # fmt: skip

    def edited(self, model: nn.Module, active: ActiveTerm, data: RoleDataset) -> dict[str, Tensor]:
        """Worked out in float64, whatever the weights are."""
        how, rows = active.preparation, [example["row"] for example in data.roles[FORGET]]
        pairs = [(row["caption"], anchored(row, how.anchor, FORGET)) for row in rows]
        preserved = how.preserve if how.preserve is not None else kept_captions(data)
        read = key_values.to_be_read(self.encoder, pairs, ["", *preserved], how.tokens)
        weights = key_values.matrices(self.architecture, model)
        device = next(iter(weights.values())).device
        new = active.term.function(
            [p.detach() for p in weights.values()], *(one.to(device) for one in read), **active.parameters
        )
        return dict(zip(weights, new, strict=True))

    def _check_prompts(self, role: str, active: Sequence[ActiveTerm]) -> None:
        """Raises ValueError for a term that compares prompts where the model takes none: it would compare an output with
        itself."""
        possible = {"empty": self.architecture.has_empty_prompt, "anchor": self.architecture.conditional}
        for term in active:
            for name in sorted(term.term.needs & VARIANTS):
                if not possible[name]:
                    raise ValueError(
                        f"{role}/{term.name} asks what the model says under another prompt ({name}), which this "
                        f"{self.architecture.name} cannot be given: take a term that needs none, such as ascent or incompetent."
                    )

    def collator(self) -> NoisyCollator:
        empty = self.encoder.prompt("") if self.architecture.has_empty_prompt else {}
        return NoisyCollator(self.noising, empty, self.options.prompt_drop)

    def predict(
        self, model: nn.Module, batch: Mapping[str, Any], needs: frozenset[str], layers: Collection[float] = ()
    ) -> Denoised:
        """The output for the batch's own prompts, for their partners under the same ones, and those of VARIANTS that
        are asked for at the same noisy samples and times, without gradient. Where nothing needs a gradient, all of it
        is one forward pass."""
        wanted = sorted(needs & VARIANTS)
        own: list[Asked] = [(batch, batch["conditioning"])]
        if "partner" in needs:
            own.append((batch["partner"], batch["conditioning"]))
        others: list[Asked] = [(batch, batch["contexts"][name]) for name in wanted]
        watched = batch["concept_tokens"] if "attention" in needs else None
        with attention.measured(model, watched) as found:
            apart = torch.is_grad_enabled() and bool(others)
            said = self._call(model, own if apart else [*own, *others])
        if apart:
            with torch.no_grad():
                said += self._call(model, others)
        output, *rest = said
        return Denoised(
            output, batch["target"], batch["weights"],
            variants=dict(zip(wanted, rest[len(own) - 1 :], strict=True)) or None,
            attention=torch.stack(found).mean(0) if found else None,
            partner=Denoised(rest[0], *(batch["partner"][name] for name in ("target", "weights"))) if own[1:] else None,
            apartness=batch.get("apartness"),
        )  # fmt: skip

    def _call(self, model: nn.Module, asked: Sequence[Asked]) -> list[Tensor]:
        """The outputs, in float32, for each of several sets of noisy samples under their prompts, from one forward
        pass."""
        torch.clear_autocast_cache()  # its copies of weights may be older than the weights
        noisy, at = (torch.cat([batch[name] for batch, _ in asked]) for name in ("noisy", "times"))
        conditioning = {name: torch.cat([prompts[name] for _, prompts in asked]) for name in asked[0][1]}
        if not self.architecture.part:
            return list(self.architecture.call(model, noisy, at, conditioning).float().chunk(len(asked)))
        said = {"encoder_hidden_states": model(**conditioning)[0]}
        denoiser = self.denoiser.to(noisy.device)
        # Accelerate's mixed precision is of what trains, and ends there.
        with torch.autocast(noisy.device.type, self.mixed) if self.mixed is not None else nullcontext():
            return list(self.architecture.call(denoiser, noisy, at, said).float().chunk(len(asked)))

    def likelihood(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Minus the denoising loss, of all samples of the batch."""
        return -self._errors(self.predict(model, batch, frozenset())).sum()

    def _errors(self, found: Denoised) -> Tensor:
        return (found.output - found.target).square().flatten(1).mean(1) * found.weights

    def knows_nothing(self, student: Denoised) -> Denoised:
        return zero(student)

    def random_like(self, model: nn.Module, seed: int) -> nn.Module:
        if self.architecture.part:
            return random_like(model, seed)
        return random_like(model, seed, lambda base: type(base).from_config(deepcopy(dict(base.config))))

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return self._errors(self.predict(model, batch, frozenset())).mean()

    def save(self, model: nn.Module, folder: Path) -> None:
        """A LoRA also in the format that pipelines load: of PEFT's own they take nothing, and stay as they were."""
        if not isinstance(model, PeftModel):
            model.save_pretrained(folder)
        elif hasattr(type(self.pipeline), "save_lora_weights"):
            save_lora(type(self.pipeline), folder, model, adapters.trained(model))

    def load(self, model: nn.Module, folder: Path) -> None:
        """Of a model with more than 10 GB, diffusers writes several files and an index."""
        options = (
            {"dtype": model.dtype}
            if self.architecture.part
            else {"torch_dtype": model.dtype, "low_cpu_mem_usage": False}
        )
        names = OF_TRANSFORMERS if self.architecture.part else (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        if not any((Path(folder) / name).is_file() for name in names):
            raise RunError(f"{folder} holds no {names[0]}: it is not a checkpoint of this trainer.")
        saved = type(model).from_pretrained(folder, **options)
        model.load_state_dict(saved.state_dict())

    def label(self, card: Path) -> None:
        """Whose library loads the model decides which code the Hub shows for it."""
        found = ModelCard.load(card)
        found.data.library_name = "diffusers"
        found.save(card)


def kept_captions(data: RoleDataset) -> list[str]:
    """Of what is to be retained and of the memory, whether terms act on it or not."""
    others = {**data.roles, **data.beside}
    return [example["row"]["caption"] for role in (RETAIN, MEMORY) for example in others.get(role, ())]


class Readable(FrozenDict):
    """A diffusers config that answers as those of transformers do."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        import json

        return json.dumps(dict(self), indent=2, sort_keys=True, default=str) + "\n"
