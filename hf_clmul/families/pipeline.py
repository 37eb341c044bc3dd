"""A diffusion pipeline in memory with what goes with it: what a run asks of it beside training. Knows files and loaders; nothing
of recipes or requests."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from hf_clmul.data.noisy import NOISE_SEED
from hf_clmul.data.roles import derived_seed
from hf_clmul.evaluation.images.borrowed import exchanged
from hf_clmul.evaluation.images.classifiers import check_near, judge_of
from hf_clmul.evaluation.images.clip import Clip, clip_of
from hf_clmul.evaluation.images.concepts import Classifier, Sampling, labels_of, picture_rows
from hf_clmul.evaluation.images.neighbours import EMBEDDINGS, RECIPE, Near, candidates, nearest, similarities
from hf_clmul.evaluation.images.prompts import Row, aggregate, told
from hf_clmul.families.diffusion import DiffusionFamily
from hf_clmul.hashes import tensors_sha256
from hf_clmul.models.diffusion.encoding import latent_shape
from hf_clmul.models.diffusion.loading import load_pipeline, save_pipeline
from hf_clmul.models.diffusion.lora_files import FILE, load_lora, save_lora

if TYPE_CHECKING:
    from hf_clmul.families.options import Diffusion
    from hf_clmul.recipe.schema import Adapter, Images

log = logging.getLogger(__name__)


@dataclass
class LoadedPipeline:
    """`base` is the Hub id or folder to load it from again; `options` are the arguments of `load_pipeline` for that."""

    pipeline: Any
    base: str
    settings: "Diffusion"
    images: "Images"
    options: dict[str, Any] = field(default_factory=dict)
    trainable: str | None = None
    tokenizer = None
    adapter_files = (FILE,)

    def __post_init__(self) -> None:
        self._family = DiffusionFamily(self.pipeline, self.settings, self.trainable)
        self._judges: dict[tuple[str | None, str | None], Classifier | None] = {}
        self._clips: dict[str | None, Clip | None] = {}
        self.near = Near() if self.images.near is None else Near(tuple(self.images.near), RECIPE)

    @property
    def model(self) -> torch.nn.Module:
        """What trains: the denoiser or the text encoder."""
        return self._family.trained

    @property
    def revision(self) -> str | None:
        """Of the base, on the Hub."""
        return self.options.get("revision")

    def to(self, device: torch.device) -> torch.nn.Module:
        """Takes the whole pipeline there; returns what trains."""
        self.pipeline.to(device)
        return self.model

    def family(self, max_length: int | None) -> DiffusionFamily:
        """What a trainer asks: one for all requests, so that latents and prompts are encoded once."""
        return self._family

    def adapter(self, chosen: "Adapter") -> "Adapter":
        """With the names of the modules that `attention` stands for."""
        return self._family.architecture.adapter(chosen)

    @property
    def about(self) -> dict[str, Any]:
        """What the record says of the pipeline beside the size of its denoiser: class, what trains, and the Hub's name of what
        it does. One that takes class labels has none of its own there."""
        architecture = self._family.architecture
        task = "text-to-image" if "tokenizer" in architecture.needs else "unconditional-image-generation"
        return {"pipeline": architecture.name, "component": architecture.trained, "task": task}

    def hashes(self, model: Any) -> dict[str, str]:
        """Of the weights of what trains, bare, and of what encodes its data: all other components."""
        others = {name: part for name, part in self.pipeline.components.items() if part is not None}
        del others[self._family.architecture.trained]
        weights = {
            f"{name}.{key}": value
            for name, part in others.items()
            if isinstance(part, torch.nn.Module)
            for key, value in part.state_dict().items()
        }
        words = [
            sorted(part.get_vocab().items()) for name, part in sorted(others.items()) if name.startswith("tokenizer")
        ]
        encodes = sha256(repr([tensors_sha256(weights), words]).encode()).hexdigest()
        return {"weights_sha256": tensors_sha256(model.state_dict()), "tokenizer_sha256": encodes}

    def blank(self, model: Any) -> Any:
        """Its like without weights."""
        with torch.device("meta"):
            if self._family.architecture.part:
                return type(model)(deepcopy(model.config))
            return type(model).from_config(deepcopy(dict(model.config)))

    def arguments(self, model: Any) -> dict[str, Any]:
        return {}

    # ---- what is measured ----------------------------------------------------------------------------------------

    def judge(self, how: "Images") -> Classifier | None:
        """The classifier, loaded once and where the pipeline is. Raises RecipeError as `judge_of`."""
        key = (how.classifier, how.axis)
        if key not in self._judges:
            found = judge_of(how)
            self._judges[key] = found.to(self.model.device) if isinstance(found, torch.nn.Module) else found
        return self._judges[key]

    def clip(self, how: "Images") -> Clip | None:
        """The CLIP, loaded once and where the pipeline is. Raises RecipeError as `clip_of`."""
        if how.clip not in self._clips:
            found = clip_of(how)
            self._clips[how.clip] = None if found is None else found.to(self.model.device)
        return self._clips[how.clip]

    def check_judge(self, rows: Sequence[Row], forgotten: Sequence[Row] = ()) -> None:
        """Raises RecipeError for a classifier or a CLIP that cannot be loaded, or does not know what it is asked for, and for a
        prompt that would be cut. Chooses near neighbours of `forgotten` among the rows where the recipe names none."""
        self._family.encoder.check_prompts([row["caption"] for row in rows], "evaluation")
        judge, _ = self.judge(self.images), self.clip(self.images)
        if judge is None:
            return
        check_near(self.images, judge.CLASSES)
        for row in rows:
            labels_of(row, judge.CLASSES)
        if self.images.near is None and self.images.axis is not None:
            self.near = self._chosen(*candidates(rows, forgotten, self.images.axis))

    def _chosen(self, gone: Sequence[str], others: Sequence[str]) -> Near:
        if not gone or not others:
            return Near()
        shown = ", ".join(gone)
        states = self._family.encoder.text_states([*gone, *others])
        if states is None:
            log.info("no near neighbours of %s are chosen: this pipeline reads no text", shown)
            return Near()
        found = dict(zip(others, similarities(states[: len(gone)], states[len(gone) :]), strict=True))
        names = nearest(found)
        log.info("near neighbours of %s, by the pipeline's text embeddings: %s", shown, ", ".join(names))
        ordered = sorted(found, key=lambda name: (name not in names, -found[name], name))
        return Near(names, EMBEDDINGS, {name: round(found[name], 4) for name in ordered})

    @property
    def judged(self) -> dict[str, Any]:
        """What the record says of how pictures are judged."""
        how = self.images
        near = {"near": list(self.near.names), "near_from": self.near.source, "similarity": self.near.similarity}
        return {"classifier": how.classifier, "clip": how.clip, "axis": how.axis, **near}

    def measure(self, model: Any, rows: Sequence[Row], how: "Images", title: str) -> list[Row]:
        """Pictures of each prompt and what the classifier sees in them, complete on every rank. They are made with whatever
        adapters are active in the live denoiser."""
        encoder, text = self._family.encoder, "tokenizer" in self._family.architecture.needs
        side = encoder.size if text else ()
        if not text:  # pipelines of classes take their numbers
            rows = [{**row, "class_label": int(encoder.prompt(row["caption"])["class_labels"])} for row in rows]
        sampling = Sampling(tuple(range(how.per_prompt)), how.steps, how.guidance, how.batch_size, *side)
        return picture_rows(self.pipeline, rows, self.judge(how), sampling, title, how.shown, self.clip(how))

    def summary(
        self, groups: Mapping[str, Sequence[Row]], first: Mapping[str, Sequence[Row]], samples: int
    ) -> dict[str, Any]:
        """{group: {"examples", "metrics", "samples"}}, as of language models; what is "generated" is what is seen, in words."""
        forgotten = groups.get("forget", ())
        return {
            group: {
                "examples": len(rows),
                "metrics": aggregate(rows, group, forgotten, self.images.axis, self.near.names, first.get(group, ())),
                "samples": [
                    {"question": row["caption"], "answer": "", "generated": told(row)} for row in rows[:samples]
                ],
            }
            for group, rows in groups.items()
            if rows
        }

    # ---- what is exported ----------------------------------------------------------------------------------------

    def probe(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Noise at random times, under the prompts of these rows."""
        encoder = self._family.encoder
        shape = latent_shape(self.pipeline, encoder.architecture, encoder.size)
        examples = [
            {"mean": torch.zeros(shape), "std": torch.ones(shape), NOISE_SEED: derived_seed("probe", i),
             "conditioning": encoder.prompt(row["caption"]) if self._family.architecture.conditional else {}}
            for i, row in enumerate(rows)
        ]  # fmt: skip
        return self._family.collator().collate(examples)

    @torch.no_grad()
    def outputs(self, model: Any, probe: Mapping[str, Any]) -> torch.Tensor:
        """The raw outputs [B, C, h, w]."""
        device = next(model.parameters()).device
        moved = {name: value.to(device) if torch.is_tensor(value) else value for name, value in probe.items()}
        moved["conditioning"] = {name: value.to(device) for name, value in probe["conditioning"].items()}
        return self._family.predict(model, moved, frozenset()).output

    def write_adapter(self, model: PeftModel, name: str, folder: Path) -> None:
        save_lora(type(self.pipeline), folder, model, name)

    def write_merged(self, model: PeftModel, name: str, folder: Path) -> None:
        """The whole pipeline with this adapter merged into its denoiser. The live model stays as it is."""
        self.write_whole(deepcopy(model).merge_and_unload(adapter_names=[name]), folder)

    def write_whole(self, model: Any, folder: Path) -> None:
        with exchanged(self.pipeline, **{self._family.architecture.trained: model}):
            save_pipeline(self.pipeline, folder)

    def write_rest(self, folder: Path) -> None:
        """A pipeline is written whole, and a LoRA file needs nothing."""

    def load_back(self, folder: Path, like: Any, whole: bool) -> Any:
        """What trains, of what a user would load, where `like` is and in its precision."""
        first = next(like.parameters())
        if whole:
            pipeline = load_pipeline(str(folder), first.dtype)
        else:
            pipeline = load_pipeline(self.base, first.dtype, **self.options)
            load_lora(pipeline, folder)
        return getattr(pipeline.to(first.device), self._family.architecture.trained).eval()


def load(
    path: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    settings: "Diffusion",
    images: "Images",
    trainable: str | None = None,
) -> LoadedPipeline:
    """Loads, or makes, the pipeline. Raises RecipeError as `load_pipeline`."""
    from hf_clmul.models.diffusion.sources import base_folder

    base, options = base_folder(path), {"revision": revision, "trust_remote_code": trust_remote_code}
    return LoadedPipeline(load_pipeline(base, dtype, **options), base, settings, images, options, trainable)
