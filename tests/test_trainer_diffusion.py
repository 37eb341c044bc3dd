"""ClmulTrainer on diffusers' pipelines: its windows against the same windows worked out by hand, and against a plain loop."""

import copy
import os
import shutil
from contextlib import nullcontext

import diffusion_bed as bed
import pytest
import ranks_worker
import tiny_pipelines
import torch
from diffusers import DDPMScheduler
from diffusion_bed import ANCHOR, RETAIN, exact, lora, make, role_gradients, rows, two_roles
from filelock import FileLock
from trainer_bed import Gradients, Nudge, combined, distance, inner, lines, nudged, same, weights, windows
from transformers import TrainerCallback

SD = tiny_pipelines.stable_diffusion
METHODS = {
    "esd, distill": {"forget": {"esd": {}}, "retain": {"distill": {}}},
    "relabel, denoising": {"forget": {"relabel": ANCHOR}, "retain": {"denoising": {}}},
    "two terms a role": {
        "forget": {"concept_ablation": {**ANCHOR, "weight": 0.1}, "ascent": {}},
        "retain": {"denoising": {"weight": 2.0}, "distill": {"weight": 0.1}},
    },
}


# ---- against a plain loop and the window by hand -------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_role_with_denoising_is_a_plain_loop(tmp_path, prediction):
    """Same noisy batches, same AdamW, same clipping, in the same precision: written as diffusers' own scripts are."""
    pipeline = SD(prediction)
    unet = copy.deepcopy(pipeline.unet).train()
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_grad_norm": 0.5, "max_steps": 3}
    trainer = make(pipeline, {"learn": rows(pipeline, RETAIN, 8)}, tmp_path, **options)
    losses, scheduler = [], DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(list(unet.parameters()), lr=1e-2, weight_decay=0.0)
    for window in [*windows(trainer, 4), *windows(trainer, 4, epoch=1)][:3]:
        examples, parts = [row["learn"] for row in window], []
        for example in examples:
            generator = torch.Generator().manual_seed(example["noise_seed"])
            u, _ = torch.rand(2, generator=generator)
            noise, spread = (torch.randn(example["mean"].shape, generator=generator) for _ in range(2))
            parts.append((example["mean"] + example["std"] * spread, noise, (u * 1000).long()))
        clean, noise, times = (torch.stack(part) for part in zip(*parts, strict=True))
        states = torch.stack([example["conditioning"]["encoder_hidden_states"] for example in examples])
        target = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, times)
        output = unet(scheduler.add_noise(clean, noise, times), times, states).sample
        loss = torch.nn.functional.mse_loss(output, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(unet.parameters()), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    before = weights(trainer.model)
    trainer.train()
    assert [line["loss"] for line in lines(trainer)] == pytest.approx(losses, rel=1e-5)
    assert distance(weights(trainer.model), weights(unet)) < 1e-6 < 1e-2 < distance(weights(trainer.model), before)
    assert pipeline.unet is trainer.model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("rule", "adapter"), [("sum", False), ("pcgrad", True), ("pcgrad_retain_first", False)])
def test_window_equals_the_one_worked_out_by_hand(tmp_path, rule, adapter, method):
    pipeline, saw = SD(), Gradients()
    extra = {"peft_config": lora(pipeline)} if adapter else {}
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, callbacks=[Nudge(), saw], conflict=rule, **METHODS[method], **extra
    )
    before, student = exact(trainer), nudged(trainer.model).double().eval()
    trainer.train()
    gradients, losses = role_gradients(trainer, student, before, windows(trainer, 4)[0], METHODS[method])
    assert distance(saw.steps[0], combined(gradients, rule)) < 5e-6
    logged = lines(trainer)[0]
    assert {name: logged[f"loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-5)
    if "ascent" in METHODS[method]["forget"]:
        assert inner(*gradients.values()) < 0  # else rules could not be told from the sum


def test_flow_matching_window_equals_the_one_worked_out_by_hand(tmp_path):
    """Stable Diffusion 3: velocities, logit-normal times, shift 3."""
    pipeline, saw, method = tiny_pipelines.stable_diffusion_3(), Gradients(), METHODS["two terms a role"]
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, callbacks=[Nudge(), saw], peft_config=lora(pipeline), **method
    )
    before, student = exact(trainer), nudged(trainer.model).double().eval()
    trainer.train()
    gradients, losses = role_gradients(trainer, student, before, windows(trainer, 4)[0], method)
    assert distance(saw.steps[0], combined(gradients, "pcgrad_retain_first")) < 1e-5
    assert {name: lines(trainer)[0][f"loss/{name}"] for name in losses} == pytest.approx(losses, rel=1e-5)


# ---- accumulation and ranks ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Windows of one micro-batch, by what trains and what is left behind."""
    return {
        name: bed.run(tmp_path_factory.mktemp("whole"), 1, 1, **{**case, "per_device_train_batch_size": 4})
        for name, case in bed.RANKS_CASES.items()
    }


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """What rank 0 and rank 1 found. With pytest-xdist the first worker that needs it runs it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "diffusion_ranks"
    with FileLock(f"{folder}.lock"):
        if (folder / "rank1.pt").is_file():
            return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return ranks_worker.launch(folder, bed.__file__)


def assert_same_run(found, expected):
    assert len(found["steps"]) == 3
    assert max(distance(a, b) for a, b in zip(found["steps"], expected["steps"], strict=True)) < 3e-6
    assert distance(found["weights"], expected["weights"]) < 1e-6
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert any(line["conflict_rate"] for line in expected["lines"])  # else the rule could not be told from the sum
    for one, other in zip(found["lines"], expected["lines"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_changes_nothing(tmp_path, whole, size):
    assert_same_run(bed.run(tmp_path, 1, 4 // size, per_device_train_batch_size=size), whole["whole"])


@pytest.mark.parametrize("case", bed.RANKS_CASES)
def test_two_ranks_are_one_process(ranks, whole, case):
    for found in ranks:
        assert_same_run(found[case], whole[case])
    first, second = (found[case] for found in ranks)
    assert same(first["weights"], second["weights"]) and first["lines"] == second["lines"]


# ---- what the optimizer is given -----------------------------------------------------------------------------------


def step(tmp_path, name, **options):
    """The gradient of one window of a pipeline whose weights moved, and its trainer."""
    pipeline, saw = SD(), Gradients()
    options = {**METHODS["two terms a role"], "conflict": "sum", **options}
    trainer = make(pipeline, two_roles(pipeline), tmp_path / name, callbacks=[Nudge(), saw], **options)
    before, student = exact(trainer), nudged(trainer.model).double().eval()
    trainer.train()
    return saw.steps[0], trainer, student, before


def minus(one, other, factor):
    return {name: one[name] - factor * other[name] for name in one}


def moved(student, by, factor):
    """A copy whose weights are moved."""
    copied = copy.deepcopy(student)
    with torch.no_grad():
        for name, p in copied.named_parameters():
            p.add_(by[name], alpha=factor)
    return copied


def test_look_ahead_is_its_definition(tmp_path):
    """cross: o = grad O(w - a grad I(w)), i = grad I(w - a o); exact: i = grad I(w) - a H o, whose product with the Hessian
    is taken here from differences of gradients, in float64."""
    terms, alpha = {"forget": {"ascent": {}}, "retain": {"denoising": {}}}, 0.02
    found, trainer, student, before = step(tmp_path, "cross", **terms, lookahead={"alpha": alpha})
    window = windows(trainer, 4)[0]

    def gradient(role, model):
        return role_gradients(trainer, model, before, window, {role: terms[role]})[0][role]

    own = gradient("retain", student)
    outer = gradient("forget", moved(student, own, -alpha))
    crossed = gradient("retain", moved(student, outer, -alpha))
    assert distance(found, minus(crossed, outer, -1.0)) < 1e-5
    found, *_ = step(tmp_path, "exact", **terms, lookahead={"alpha": alpha, "mode": "exact"})
    h = 1e-4
    bent = minus(gradient("retain", moved(student, outer, h)), gradient("retain", moved(student, outer, -h)), 1.0)
    expected = minus(minus(own, bent, alpha / (2 * h)), outer, -1.0)
    assert distance(found, expected) < 1e-5
    assert distance(minus(own, outer, -1.0), expected) > 1e-3  # what first_order leaves out is seen


def test_exact_look_ahead_needs_math_attention_and_takes_it(tmp_path, monkeypatch):
    """Trap 18: the attention that diffusers takes by default has no second derivative."""
    terms = {"forget": {"ascent": {}}, "retain": {"denoising": {}}, "lookahead": {"mode": "exact"}}
    monkeypatch.setattr("hf_clmul.training.window_passes.sdpa_kernel", lambda backend: nullcontext())
    with pytest.raises(RuntimeError, match="is not implemented"):
        step(tmp_path, "fused", **terms)


def test_saliency_trains_the_salient_half_of_a_unet(tmp_path):
    """Those weights with the largest gradient of the forget data's denoising loss at the model as it was."""
    pipeline, terms = SD(), {"forget": {"relabel": ANCHOR}, "retain": {"denoising": {}}}
    decay = {"optim": "adamw_torch", "weight_decay": 0.5}  # which moves weights without a gradient
    trainer = make(pipeline, two_roles(pipeline), tmp_path, **terms, saliency={"train": 0.5}, max_steps=2, **decay)
    before = weights(trainer.model)
    examples = trainer.train_dataset.roles["forget"]
    found, _ = role_gradients(
        trainer, exact(trainer), None, [{"forget": e} for e in examples], {"forget": {"denoising": {}}}
    )
    flat = torch.cat([g.abs().flatten() for g in found["forget"].values()])
    threshold = flat.median()
    trainer.train()
    for name, p in trainer.model.named_parameters():
        g = found["forget"][name].abs()
        clear = (g - threshold).abs() > 1e-5 * threshold
        assert not ((p != before[name]) & (g < threshold) & clear).any()
    changed = sum(int((p != before[name]).sum()) for name, p in trainer.model.named_parameters())
    assert 0.4 * flat.numel() < changed <= 0.5 * flat.numel() + 1


class Asked(TrainerCallback):
    """Asks teacher and student the same after every step."""

    def __init__(self):
        self.teacher, self.student = [], []

    def on_step_end(self, args, state, control, **kwargs):
        batch = self.trainer.data_collator.collate(self.trainer.train_dataset.roles["retain"])
        with self.trainer.teacher.answering() as teacher:
            self.teacher.append(self.trainer.family.predict(teacher, batch, frozenset({"output", "empty"})))
        with torch.no_grad():
            self.student.append(self.trainer.family.predict(self.trainer.model, batch, frozenset({"output"})))


@pytest.mark.parametrize("kind", ["adapter switched off", "full copy", "trained in part"])
def test_the_teacher_stays_the_model_before_to_the_bit(tmp_path, kind):
    pipeline, asked = SD(), Asked()
    extra = {"adapter switched off": {"peft_config": lora(pipeline)}, "trained in part": {"trainable": r".*attn2\..*"}}
    trainer = make(
        pipeline, two_roles(pipeline), tmp_path, callbacks=[asked], max_steps=3, optim="adamw_torch", learning_rate=1e-2,
        **METHODS["esd, distill"], **extra.get(kind, {}),
    )  # fmt: skip
    asked.trainer = trainer
    batch = trainer.data_collator.collate(trainer.train_dataset.roles["retain"])
    with torch.no_grad():
        before = trainer.family.predict(trainer.model, batch, frozenset({"output", "empty"}))
    trainer.train()
    assert len(asked.teacher) == 3
    for said in asked.teacher:
        assert torch.equal(said.output, before.output)
        assert torch.equal(said.variants["empty"], before.variants["empty"])
    assert (asked.student[-1].output - before.output).abs().max() > 1e-3
    flags = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in flags) if kind == "adapter switched off" else len(flags) > 50
    assert trainer.teacher.copy is None and not trainer.teacher.kept


def test_variants_of_the_student_carry_no_gradient(tmp_path):
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, **METHODS["relabel, denoising"])
    batch = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    found = trainer.family.predict(trainer.model, batch, frozenset({"output", "anchor", "empty"}))
    assert found.output.requires_grad
    assert not any(variant.requires_grad for variant in found.variants.values())
    with torch.no_grad():
        alone = bed.Draw(pipeline, trainer.train_dataset[0]["forget"])
        expected = alone.output(exact(trainer), trainer.train_dataset[0]["forget"]["anchor"])
    torch.testing.assert_close(found.variants["anchor"].double(), expected, atol=1e-5, rtol=0)


# ---- how samples are made ------------------------------------------------------------------------------------------


def test_prompt_drop_drops_prompts_of_what_is_kept_and_of_nothing_else(tmp_path):
    pipeline, share = SD(), 0.25
    trainer = make(pipeline, two_roles(pipeline), tmp_path, prompt_drop=share)
    empty = bed.prompt(trainer, "")["encoder_hidden_states"]
    drawn = [trainer.train_dataset[draw] for draw in range(400)]
    batch, dropped = trainer.data_collator(drawn), {}
    for role in ("forget", "retain"):
        shown = batch[role]["conditioning"]["encoder_hidden_states"]
        dropped[role] = [torch.equal(one, empty) for one in shown]
        own = [row[role]["conditioning"]["encoder_hidden_states"] for row in drawn]
        assert all(torch.equal(a, b) for a, b, gone in zip(shown, own, dropped[role], strict=True) if not gone)
    assert not any(dropped["forget"])
    assert dropped["retain"] == [bool(bed.Draw(pipeline, row["retain"]).coin < share) for row in drawn]
    assert abs(sum(dropped["retain"]) / 400 - share) < 0.05
    again = [_is_empty(trainer.data_collator([row])["retain"], empty) for row in drawn]
    assert again == dropped["retain"]  # whatever else is in the batch


def _is_empty(batch, empty):
    return torch.equal(batch["conditioning"]["encoder_hidden_states"][0], empty)


def test_min_snr_weighs_the_denoising_loss(tmp_path):
    pipeline, terms = SD(), {"forget": {"ascent": {}}, "retain": {"denoising": {}}}
    trainer = make(
        pipeline, two_roles(pipeline, 8, 8), tmp_path, **terms, min_snr_gamma=5.0, per_device_train_batch_size=8
    )
    student, expected, weighed = exact(trainer), {}, []
    for role, sign in (("forget", -1), ("retain", 1)):
        losses = []
        for row in windows(trainer, 8)[0]:
            draw = bed.Draw(pipeline, row[role])
            weight = draw.snr.clamp(max=5.0) / draw.snr
            weighed.append(float(weight))
            with torch.no_grad():
                said = draw.output(student, row[role]["conditioning"])
            losses.append(sign * float(weight * ((said - draw.target) ** 2).mean()))
        expected[role] = sum(losses) / 8
    trainer.train()
    logged = lines(trainer)[0]
    assert logged["loss/forget/ascent"] == pytest.approx(expected["forget"], rel=1e-5)
    assert logged["loss/retain/denoising"] == pytest.approx(expected["retain"], rel=1e-5)
    assert min(weighed) < 0.9 and max(weighed) == 1.0


# ---- what must not matter ------------------------------------------------------------------------------------------


def test_what_no_term_asks_for_does_not_matter(tmp_path):
    """Poison: the empty prompt, and whatever encodes the data once it is encoded."""
    terms, found = {"forget": {"ascent": {}}, "retain": {"denoising": {}, "distill": {}}}, []
    for poisoned in (False, True):
        pipeline, saw = SD(), Gradients()
        trainer = make(pipeline, two_roles(pipeline), tmp_path, callbacks=[Nudge(), saw], **terms, conflict="pcgrad")
        if poisoned:
            for value in trainer.data_collator.empty.values():
                value.fill_(float("nan"))
            for part in (pipeline.vae, pipeline.text_encoder):
                for p in part.parameters():
                    p.data.fill_(float("nan"))
        trainer.train()
        found.append(saw.steps[0])
    assert same(*found)


def test_a_sample_does_not_see_its_neighbours(tmp_path):
    """Its noise, time and prompt, and what the network says of it, are its own."""
    pipeline = SD()
    trainer = make(pipeline, two_roles(pipeline), tmp_path, **METHODS["relabel, denoising"])
    draws = [trainer.train_dataset[i] for i in range(4)]
    other = copy.deepcopy(draws)
    for row in other[1:]:
        for name in ("mean", "std"):
            row["forget"][name] = torch.full_like(row["forget"][name], float("nan"))
        row["forget"]["conditioning"] = bed.prompt(trainer, "a yellow three")
        row["forget"]["noise_seed"] += 1
    asked = frozenset({"output", "anchor"})
    one, two = (
        trainer.family.predict(trainer.model, trainer.data_collator(rows)["forget"], asked) for rows in (draws, other)
    )
    assert torch.equal(one.output[0], two.output[0]) and torch.equal(one.target[0], two.target[0])
    assert torch.equal(one.variants["anchor"][0], two.variants["anchor"][0])
    assert two.output[1:].isnan().all() and not one.output.isnan().any()
