"""The text encoder of a pipeline as what trains: the denoiser stays as it is, and prompts are read anew in every step."""

import copy
import json
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusion_bed import Draw, lora, make, rows, two_roles
from pipeline_probe import probe
from small_run import at_step, execute, in_process, outcome
from test_picture_recipes import RECIPE
from trainer_bed import Gradients, Nudge, Stop, distance, lines, nudge, same, weights
from transformers import CLIPTextModel

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.families.diffusion import DiffusionFamily
from hf_clmul.models.diffusion.architectures import architecture_of
from hf_clmul.models.diffusion.loading import load_pipeline
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.runner import plan_recipe
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

SD = tiny_pipelines.stable_diffusion
TEXT = {"trainable": "text_encoder"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
ANCHOR = {"anchor": {"seven": "eight"}}
TERMS = {"forget": {"esd": {}, "relabel": ANCHOR}, "retain": {"denoising": {}, "distill": {"weight": 0.5}}}


def parts(pipeline):
    return {name: weights(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_the_text_encoder_alone_moves_and_outputs_change(tmp_path, rule):
    pipeline = SD()
    before, said = parts(pipeline), probe(pipeline)
    trainer = make(pipeline, two_roles(pipeline), tmp_path, max_steps=3, conflict=rule, **TERMS, **TEXT, **ADAM)
    assert trainer.model is pipeline.text_encoder
    trainer.train()
    after = parts(pipeline)
    assert {name for name in before if not same(before[name], after[name])} == {"text_encoder"}
    assert all(p.grad is None and not p.requires_grad for p in pipeline.unet.parameters())
    assert (probe(pipeline) - said).abs().max() > 1e-3


def test_gradients_are_those_of_the_whole_pipeline_by_hand(tmp_path):
    """The losses of esd, relabel, denoising and distillation, in float64, through the pipeline's own reading of the prompts."""
    pipeline, saw = SD(), Gradients()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, callbacks=[Nudge(), saw], conflict="sum", **TERMS, **TEXT)
    teacher, student = copy.deepcopy(pipeline).to(torch.float64), copy.deepcopy(pipeline)
    nudge(student.text_encoder)
    student.to(torch.float64)
    window = [trainer.train_dataset[i] for i in range(4)]
    trainer.train()

    def states(who, text):
        ids = who.tokenizer(
            [text], padding="max_length", max_length=tiny_pipelines.LENGTH, return_tensors="pt"
        ).input_ids
        return {"encoder_hidden_states": who.text_encoder(ids)[0][0]}

    total = 0.0
    for role in ("forget", "retain"):
        for row in window:
            draw, text = Draw(trainer.family.pipeline, row[role]), row[role]["row"]["caption"]
            own = draw.output(student.unet, states(student, text))
            with torch.no_grad():
                kept = draw.output(teacher.unet, states(teacher, text))
                if role == "forget":
                    free = draw.output(teacher.unet, states(teacher, ""))
                    eight = draw.output(student.unet, states(student, text.replace("seven", "eight")))
                    targets = [(1.0, kept - 2.0 * (kept - free)), (1.0, eight)]
                else:
                    targets = [(1.0, draw.target), (0.5, kept)]
            total = total + sum(weight * ((own - target) ** 2).mean() for weight, target in targets) / len(window)
    named = dict(student.text_encoder.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    expected = {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)
    }
    (step,) = saw.steps
    assert distance(step, expected) < 1e-5 and max(float(g.abs().max()) for g in expected.values()) > 0


@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_is_never_remembered_as_it_was_read(tmp_path, masked):
    """The batch holds what the text encoder reads; what it says is that of the pipeline at each moment."""
    pipeline = SD()
    pipeline.text_encoder.config.use_attention_mask = masked  # as Stable Diffusion's variants may
    trainer = make(pipeline, two_roles(pipeline), tmp_path, max_steps=2, **TERMS, **TEXT, **ADAM)
    family, text = trainer.family, "a red seven"
    plain = DiffusionFamily(pipeline)
    batch = family.collator().collate(family.encoded(rows(pipeline, [text]), "here"))
    assert set(batch["conditioning"]) == {"input_ids", *(["attention_mask"] if masked else [])}
    assert batch["conditioning"]["input_ids"].dtype == torch.int64

    def both():
        live = architecture_of(pipeline).encode_prompts(pipeline, [text] * 4)
        with torch.no_grad():
            direct = plain._call(pipeline.unet, [(batch, live)])[0]
            return family.predict(pipeline.text_encoder.eval(), batch, frozenset()).output, direct

    first = both()
    trainer.train()
    later = both()
    assert torch.equal(*first) and torch.equal(*later) and not torch.equal(first[0], later[0])


@pytest.mark.parametrize(
    "more", [{}, {"ema": 0.5}, {"saliency": {"train": 0.5}}, {"lookahead": {"mode": "cross"}}], ids=str
)
def test_resume_is_exact(tmp_path, more):
    def trainer(name, callbacks=()):
        pipeline = SD()
        return make(pipeline, two_roles(pipeline, 7, 5), tmp_path / name, callbacks=list(callbacks), max_steps=5,
                    save_strategy="steps", save_steps=1, prompt_drop=0.3, **TERMS, **TEXT, **ADAM, **more)  # fmt: skip

    through = trainer("through")
    through.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("killed", [Stop(3)]).train()
    again = trainer("killed")
    again.train(resume_from_checkpoint=True)
    assert same(weights(again.model), weights(through.model)) and lines(again) == lines(through)
    folder = tmp_path / "killed" / "checkpoint-3"
    assert type(CLIPTextModel.from_pretrained(folder)) is type(again.model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(RunError, match="holds no model.safetensors: it is not a checkpoint"):
        trainer("killed").train(resume_from_checkpoint=str(folder))


def test_mixed_precision_and_checkpointing_reach_the_denoiser(tmp_path):
    seen = []

    def gradient(**more):
        pipeline, saw = SD(), Gradients()
        pipeline.unet.conv_in.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
        make(pipeline, two_roles(pipeline), tmp_path, callbacks=[saw], conflict="sum", **TERMS, **TEXT, **more).train()
        return saw.steps[0]

    plain = gradient()
    assert set(seen) == {torch.float32}
    again = gradient(activation_checkpointing=True)
    assert all(torch.allclose(again[name], plain[name], atol=1e-6) for name in plain)
    seen.clear()
    mixed = gradient(bf16=True)
    assert set(seen) == {torch.bfloat16} and distance(mixed, plain) < 0.1


def test_an_incompetent_teacher_has_a_random_text_encoder(tmp_path):
    pipeline = SD()
    forget = {"incompetent": {"weights": "random"}}
    trainer = make(pipeline, two_roles(pipeline), tmp_path, forget=forget, retain={"denoising": {}}, **TEXT)
    other = trainer.family.random_like(trainer.model, 3)
    assert type(other) is type(trainer.model) and not same(weights(other), weights(trainer.model))
    before = parts(pipeline)
    trainer.train()
    assert {name for name, was in before.items() if not same(was, parts(pipeline)[name])} == {"text_encoder"}


def test_an_adapter_or_a_hook_of_either_part_is_refused(tmp_path):
    pipeline = SD()
    pipeline.unet._hf_hook = object()
    with pytest.raises(ValueError, match="the pipeline's unet has a hook of accelerate"):
        make(pipeline, two_roles(pipeline), tmp_path, **TERMS, **TEXT)
    pipeline = SD()
    pipeline.unet.add_adapter(lora(pipeline))
    with pytest.raises(ValueError, match="the pipeline's unet has an adapter already"):
        make(pipeline, two_roles(pipeline), tmp_path, **TERMS, **TEXT)


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    SD().save_pretrained(tmp_path / "pipeline")
    text = RECIPE.replace("unlearning:\n", "unlearning:\n  trainable: text_encoder\n")
    (tmp_path / "r.yaml").write_text(text.replace("max_steps: 2", "max_steps: 3, save_steps: 1, learning_rate: 1e-2"))
    return tmp_path / "r.yaml"


def test_a_run_exports_the_whole_pipeline_and_a_killed_one_ends_the_same(recipe, tmp_path):
    execute(recipe, tmp_path / "whole")
    assert in_process(at_step, ("00-unlearn-cats", 3), recipe, tmp_path / "killed") != 0
    execute(recipe, tmp_path / "killed")
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["model"]["component"] == "text_encoder" and results["export"]["max_difference"] == 0.0
    before, after = (load_pipeline(str(tmp_path / name)) for name in ("pipeline", "whole/model"))
    one, other = parts(before), parts(after)
    assert {name for name in one if not same(one[name], other[name])} == {"text_encoder"}
    assert (probe(before) - probe(after)).abs().max() > 1e-4
    configs = [
        json.loads((tmp_path / name / "text_encoder" / "config.json").read_text())
        for name in ("pipeline", "whole/model")
    ]
    assert {**configs[0], "use_cache": False} == configs[1]  # Trainer writes that into any config of transformers


def test_near_neighbours_are_chosen_by_what_it_says():
    names, (plain, own) = ["red_seven", "one"], (DiffusionFamily(SD(), trainable=t) for t in (None, "text_encoder"))
    assert torch.equal(own.encoder.text_states(names), plain.encoder.text_states(names))
    nudge(own.trained)
    assert not torch.allclose(own.encoder.text_states(names), plain.encoder.text_states(names), atol=1e-3)


def test_the_plan_counts_what_trains(recipe):
    (entry,) = plan_recipe(load_recipe(recipe))
    assert entry["trainable_parameters"] == sum(p.numel() for p in SD().text_encoder.parameters())


@pytest.mark.parametrize(("added", "line"), [
    (("data:\n", "adapter: {r: 2}\ndata:\n"), "unlearning.trainable: 'text_encoder' trains the whole of it, and an adapter"),
    (("requests:\n", "requests:\n  - learn: {task: a, data: others}\n"),
     "unlearning.trainable: 'text_encoder' trains that part of the pipeline, and the `learning` requests the denoiser"),
])  # fmt: skip
def test_recipes_in_which_something_else_trains_too_are_refused(recipe, added, line):
    recipe.write_text(recipe.read_text().replace(*added, 1))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert line in str(caught.value)


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pipeline", "reason"), [
    (tiny_pipelines.stable_diffusion_xl, "a StableDiffusionXLPipeline has 2 text encoders"),
    (tiny_pipelines.stable_diffusion_3, "a StableDiffusion3Pipeline has 2 text encoders"),
    (tiny_pipelines.flux, "a FluxPipeline has 2 text encoders"),
    (tiny_pipelines.dit, "a DiTPipeline has no text encoder"),
    (tiny_pipelines.ddpm, "a DDPMPipeline has no text encoder"),
])  # fmt: skip
def test_pipelines_without_exactly_one_are_refused(tmp_path, pipeline, reason):
    with pytest.raises(RecipeError, match=f"trainable: {reason}, and 'text_encoder' trains the only one"):
        make(pipeline(), None, tmp_path, **TEXT)


@pytest.mark.parametrize(("options", "reason"), [
    ({"forget": {"uce": ANCHOR}, "retain": {}}, "concept layers 'cross_attention_kv': the text encoder of this"),
    ({"forget": {"attention_suppression": {"words": ["seven"]}}}, "concept layers 'cross_attention': the text encoder of this"),
    ({"forget": "esd", "protect": {}}, "the text encoder of this StableDiffusionPipeline trains, and the unet stays"),
])  # fmt: skip
def test_what_works_on_cross_attention_is_refused(tmp_path, options, reason):
    pipeline = SD()
    with pytest.raises(RecipeError, match=reason):
        make(pipeline, two_roles(pipeline), tmp_path, **options, **TEXT).train()


def test_an_adapter_and_a_family_made_for_the_denoiser_are_refused(tmp_path):
    pipeline = SD()
    targets = lora(pipeline, target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match="trainable='text_encoder' trains the whole text encoder, and an adapter is for"
    ):
        make(pipeline, two_roles(pipeline), tmp_path, peft_config=targets, **TERMS, **TEXT)
    pipeline = SD()
    with pytest.raises(
        RecipeError, match=r"it was not chosen when the family was made: DiffusionFamily\(pipeline, tra"
    ):
        make_with_family(pipeline, tmp_path)


def make_with_family(pipeline, folder):
    family = DiffusionFamily(pipeline)
    args = ClmulConfig(str(folder), use_cpu=True, report_to="none", **TEXT)
    return ClmulTrainer(family.trained, args, train_dataset=two_roles(pipeline), family=family)
