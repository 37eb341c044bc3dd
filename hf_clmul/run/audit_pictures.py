"""What an audit of a diffusion run works with: its forgotten prompts, pictures of them, the judge, and how an exported pipeline is
opened, a LoRA over its base. Knows recipes and files; nothing of attacks."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hf_clmul.data.pictures import GENERATED, known
from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.evaluation.audit.protocol import Absent, AuditData
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.plan.columns import Evaluated, evaluated, groups, shown
from hf_clmul.plan.steps import Step
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.audit_families import Prepared
from hf_clmul.run.audit_scope import scope_of

Row = Mapping[str, Any]
DRAWN = ", which the unmodified model drew: the run has none of its own"
BY_PICTURES = ("relearn", "inversion")


def pictures_of(recipe: Recipe, steps: Sequence[Step], device: Any) -> Prepared:
    """Raises RunError where nothing was to be forgotten, or nothing can see whether it was."""
    images, axis = recipe.evaluation.images, recipe.evaluation.images.axis
    if images.classifier is None or axis is None:
        raise RunError(
            "nothing tells what is seen in a picture, so that an audit could not see what came back: name "
            "evaluation.images.classifier and its axis in the recipe, and run it again."
        )
    as_asked = shown(recipe, steps)
    whole = groups(recipe, as_asked)
    found = evaluated(recipe, as_asked, whole)
    forget = [known(found.rows[text]) for text in found.groups.get("forget", ())]
    forget = [row for row in forget if row.get(axis) is not None]
    if not forget:
        raise RunError(
            f"the run forgets no prompt with a value in the column {axis!r}, so that there is nothing to bring back: no unlearn "
            "request, no evaluation.forget, or an evaluation.images.axis of something else."
        )
    scope = scope_of(recipe, as_asked, forget, "prompts")
    forget = scope.rows
    data, real = AuditData(forget), _real(steps, forget, axis)
    concepts = {row[axis] for row in forget}
    own = real.keys() >= concepts
    about = {
        "images": images.model_dump(exclude={"shown", "near"}), "dtype": recipe.model.dtype,
        "diffusion": recipe.diffusion.model_dump(),
        "pictures": {name: [row["image"] for row in rows] for name, rows in real.items()} if own else recipe.model.path,
        "paraphrases": _paraphrases(recipe, found), "begin_as": images.near,
    }  # fmt: skip
    opening = _Opening(recipe, data, real if own else None, found, device)
    notes = {} if own else dict.fromkeys(BY_PICTURES, DRAWN)
    return Prepared(data, opening.open, about, notes, scope.said, scope.held)


class _Opening:
    """Opens pipelines as subjects. The judge, and pictures that are drawn, are the same for all of them."""

    def __init__(
        self, recipe: Recipe, data: AuditData, real: Mapping[str, list[Row]] | None, found: Evaluated, device: Any
    ) -> None:
        self.recipe, self.data, self.real, self.found, self.device = recipe, data, real, found, device
        self.drawn, self.judge = cache(self._drawn), cache(self._judge)

    def open(self, folder: Path, is_run: bool) -> Any:
        """A fresh one, of a folder. Raises RunError if there is no pipeline."""
        return self._subject(opened(folder, self.recipe).to(self.device))

    def _subject(self, pipeline: Any) -> Any:
        from hf_clmul.data.images import pixels
        from hf_clmul.evaluation.audit.picture_subject import Network, PictureSubject
        from hf_clmul.evaluation.images.concepts import Sampling
        from hf_clmul.models.diffusion.architectures import architecture_of
        from hf_clmul.models.diffusion.encoding import image_size
        from hf_clmul.models.diffusion.noising import noising_of

        recipe, images, architecture = self.recipe, self.recipe.evaluation.images, architecture_of(pipeline)
        resolution = recipe.diffusion.resolution
        size = image_size(pipeline, architecture) if resolution is None else (resolution, resolution)
        side = size if "tokenizer" in architecture.needs else ()
        sampling = Sampling(
            tuple(range(images.per_prompt)), images.steps, images.guidance, images.batch_size, *side
        )  # as the run measured
        network = Network(
            architecture,
            noising_of(pipeline.scheduler, density=recipe.diffusion.density or architecture.density),
            lambda row: pixels(row, size, recipe.diffusion.resize, f"the audit, example {row['id']}"),
        )
        gone = {row[images.axis] for row in self.data.forget}
        near = images.near or [name for name in self.judge().CLASSES[images.axis] if name not in gone]
        return PictureSubject(
            pipeline, self.data, self.judge(), images.axis, sampling, network, self.pictures,
            _paraphrases(recipe, self.found), frozenset(row["caption"] for row in self.found.rows.values()),
            near[0].replace("_", " ") if near else None,
        )  # fmt: skip

    def pictures(self, concept: str, count: int, seed: int) -> list[Row]:
        """So many pictures of a concept, or fewer; the same for every model."""
        if self.real is not None:
            return fixed_sample(self.real[concept], count, derived_seed(seed, "audit", concept))
        return self.drawn(concept, count, seed)

    def _judge(self) -> Any:
        import torch

        from hf_clmul.evaluation.images.classifiers import judge_of

        found = judge_of(self.recipe.evaluation.images)
        return found.to(self.device) if isinstance(found, torch.nn.Module) else found

    def _drawn(self, concept: str, count: int, seed: int) -> list[Row]:
        """Of the unmodified model, those in which the judge sees the concept. Raises Absent for none."""
        from hf_clmul.evaluation.images.concepts import judge
        from hf_clmul.evaluation.images.sampling import sample

        axis = self.recipe.evaluation.images.axis
        subject = self._subject(unmodified(self.recipe).to(self.device))
        how, prompts = subject.sampling, [row for row in self.data.forget if row[axis] == concept]
        seeds = [derived_seed(seed, "audit", number) for number in range(-(-count // len(prompts)))]
        asked = [row.get("class_label", row["caption"]) for row in subject._conditioned(prompts)]
        drawn = sample(
            subject.pipeline, asked, seeds, how.steps, how.guidance, how.batch_size, how.height, how.width, "drawing"
        )
        seen, _ = judge(drawn.flatten(0, 1), self.judge(), how.batch_size)
        rows = [
            {**prompt, "id": f"{prompt['caption']}/{k}", "image": drawn[i, k] * 2 - 1}
            for k in range(len(seeds))
            for i, prompt in enumerate(prompts)
            if seen[i * len(seeds) + k][axis] == concept
        ]
        if not rows:
            raise Absent(
                f"there are no pictures of {concept}: the run has none of its own, and of those that the unmodified model drew the "
                "judge sees it in none"
            )
        return rows[:count]


def opened(folder: Path, recipe: Recipe) -> Any:
    """The pipeline of an export as a user loads it; a LoRA is merged into its base in memory, so that attacks on weights meet the
    weights that draw. Raises RunError for a folder with neither."""
    from hf_clmul.models.diffusion.architectures import architecture_of
    from hf_clmul.models.diffusion.loading import INDEX, load_pipeline
    from hf_clmul.models.diffusion.lora_files import FILE, load_lora

    if (folder / INDEX).is_file():
        return load_pipeline(str(folder), recipe.model.dtype)
    if not (folder / FILE).is_file():
        raise RunError(
            f"{folder} holds no pipeline: there is neither {INDEX} nor {FILE}. Give a run, or a pipeline's folder."
        )
    pipeline = unmodified(recipe)
    load_lora(pipeline, folder)
    denoiser = getattr(pipeline, architecture_of(pipeline).component)
    denoiser.fuse_lora()
    denoiser.unload_lora()
    return pipeline


def unmodified(recipe: Recipe) -> Any:
    """The pipeline that the recipe begins with."""
    from hf_clmul.models.diffusion.loading import load_pipeline
    from hf_clmul.models.diffusion.sources import base_folder

    model = recipe.model
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    return load_pipeline(base_folder(model.path), model.dtype, **options)


def _real(steps: Sequence[Step], forget: Sequence[Row], axis: str) -> dict[str, list[Row]]:
    """{concept: rows with a picture that is no model's}, under the prompts that are to be forgotten."""
    captions, found = {row["caption"] for row in forget}, {}
    for step in steps:
        for row in step.roles.get("forget", ()):
            image = row.get("image")
            drawn = isinstance(image, str) and image.startswith(GENERATED)
            if image is not None and not drawn and row.get("caption") in captions and row.get(axis) is not None:
                found.setdefault(row[axis], {})[str(image)] = row
    return {name: list(rows.values()) for name, rows in found.items()}


def _paraphrases(recipe: Recipe, found: Evaluated) -> list[Row]:
    """Those that the recipe gives; of the built-in digits those that go with them, else none."""
    from hf_clmul.digits import CLASSES
    from hf_clmul.digits.images import paraphrases
    from hf_clmul.evaluation.images.paraphrases import GROUP
    from hf_clmul.models.diffusion.sources import DIGITS

    axis = recipe.evaluation.images.axis
    given = [known(found.rows[text]) for text in found.groups.get(GROUP, ())]
    if given or recipe.model.path.partition("/")[0] != DIGITS:
        return given
    forget = [found.rows[text] for text in found.groups["forget"]]
    taken = {row["caption"] for row in found.rows.values()}
    return [
        {"id": text, "caption": text, axis: row[axis]}
        for row in forget
        if all(row.get(name) is not None for name in CLASSES)
        for text in paraphrases(*(row[name] for name in CLASSES))
        if text not in taken
    ]
