"""The reinforced model, and edits: the training behind them is a plain one, and leaves no trace but what was asked for."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2
from trainer_bed import LORA, TOKENIZER, Stop, adapted, lines, llama, make, same, trained, two_roles, weights
from transformers import TrainerCallback, TrainingArguments

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.gradients.options import OF_STEPS
from hf_clmul.models import causal_lm
from hf_clmul.objectives import TERMS
from hf_clmul.objectives.active import active_terms
from hf_clmul.objectives.preparation import Reinforced
from hf_clmul.training import preparation
from hf_clmul.training.preparation import check_preparations, reinforcing
from hf_clmul.training_args import ClmulConfig

HOW = {"epochs": 2, "learning_rate": 0.05}
WHP = {"forget": {"whp": HOW}}
MODELS = {
    "full model": (llama, {}),
    "full model with dropout": (lambda: tiny_gpt2(vocab=len(TOKENIZER)), {}),
    "new adapter": (llama, {"peft_config": LORA}),
    "adapter trained in place, with dropout": (lambda: adapted(lora_dropout=0.2), {}),
}
every_kind = pytest.mark.parametrize("kind", MODELS)


def built(kind, folder, roles=None, callbacks=(), **options):
    build, extra = MODELS[kind]
    return make(build(), roles or two_roles(), folder, callbacks, **{**WHP, **extra, **options})


def by_hand(kind, folder, **options):
    """The reinforced model, by a training of its own."""
    build, extra = MODELS[kind]
    plain = {"num_train_epochs": 2, "max_steps": -1, "learning_rate": 0.05, "seed": derived_seed(2, "reinforced")}
    trainer = make(build(), {"learn": two_roles()["forget"]}, folder, **{**extra, **options, **plain})
    if "peft_config" in extra:  # drawn from the seed of the request
        whole = make(build(), two_roles(), folder, peft_config=LORA)
        trainer.model.load_state_dict(whole.model.state_dict())
    trainer.train()
    return trainer.model


@every_kind
def test_it_is_a_plain_training_on_the_forget_data_and_leaves_no_trace(tmp_path, kind):
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = built(kind, tmp_path, per_device_train_batch_size=3, **schedule)  # of the request, not of what is before
    model = trainer.model.eval()
    flags = [p.requires_grad for p in model.parameters()]
    before, state = weights(model), torch.get_rng_state()
    with reinforcing(trainer, trainer.terms["forget"][0].preparation) as inside:
        assert inside is model
        found = trained(model)
    assert same(weights(model), before) and torch.equal(torch.get_rng_state(), state)
    assert not model.training and [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert same(found, trained(by_hand(kind, tmp_path, per_device_train_batch_size=3)))
    assert not same(found, trained(model))
    assert {path.name for path in tmp_path.rglob("checkpoint*")} == set()


def test_mixed_precision_does_not_stay_on_the_model(tmp_path):
    trainer = built("full model", tmp_path, bf16=True)
    ids = torch.arange(1, 9)[None]
    before = trainer.model(ids).logits
    with reinforcing(trainer, trainer.terms["forget"][0].preparation):
        pass
    assert torch.equal(trainer.model(ids).logits, before)


@pytest.mark.parametrize("split", [(8, 1), (2, 4)])
def test_whp_is_the_mean_over_the_window(tmp_path, split):
    """Against the loss of the term on the whole set, with the teacher before and the model reinforced by hand."""
    size, accumulate = split
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    trainer = built("full model", tmp_path, learning_rate=0.0, retain={}, **options)
    trainer.train()
    reinforced, start = by_hand("full model", tmp_path, **options), llama()
    batch, (active,) = trainer.data_collator.collate(two_roles()["forget"]), active_terms("forget", "whp")
    with torch.no_grad():
        own, said = (
            causal_lm.predict(model, batch, frozenset({"logits"}), trainer.family.accepted)
            for model in (start, reinforced)
        )
        value, count = active.term.function(own, replace(own, variants={"reinforced": said}), **active.parameters)
    assert lines(trainer)[0]["loss/forget/whp"] == pytest.approx(value.item() / count, rel=1e-5)


class Look(TrainerCallback):
    """What the reinforced model says in each request, and which adapters there are."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with self.trainer.reinforced.answering() as reinforced:
            assert not reinforced.training and not torch.is_grad_enabled()
            self.seen.append(reinforced(torch.arange(1, 9)[None]).logits)


@every_kind
def test_the_reinforced_model_stays_while_the_request_trains(tmp_path, kind):
    look = Look()
    trainer = look.trainer = built(kind, tmp_path, callbacks=[look], max_steps=3)
    adapters = list(getattr(trainer.model, "peft_config", {}))
    trainer.train()
    expected = by_hand(kind, tmp_path).eval()(torch.arange(1, 9)[None]).logits
    assert len(look.seen) == 3 and all(torch.equal(one, expected) for one in look.seen)
    assert list(getattr(trainer.model, "peft_config", {})) == adapters  # the copies are gone


@every_kind
def test_a_resumed_request_comes_to_the_same(tmp_path, kind):
    options = {"max_steps": 4, "per_device_train_batch_size": 3, "save_steps": 1, "save_strategy": "steps",
               "optim": "adamw_torch", "learning_rate": 1e-2, "forget": {"whp": {**HOW, "learning_rate": 1e-2}}}  # fmt: skip
    through = built(kind, tmp_path / "through", **options)
    through.train()
    with pytest.raises(KeyboardInterrupt):
        built(kind, tmp_path / "cut", callbacks=[Stop(2)], **options).train()
    resumed = built(kind, tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and same(weights(resumed.model), weights(through.model))
    assert lines(resumed) == lines(through)


def test_a_collapse_of_the_training_before_gives_the_weights_back(tmp_path):
    trainer = built("full model", tmp_path, forget={"whp": {"epochs": 3, "learning_rate": 3e38}})
    before = weights(trainer.model)
    with pytest.raises(
        RunError, match="on the forget data alone, at the term's `learning_rate`: training collapsed at step"
    ):
        trainer.train()
    assert same(weights(trainer.model), before)


def test_nothing_of_the_request_acts_on_the_training_before_it(tmp_path):
    """Also no field of ClmulConfig that comes later."""
    given = {
        "forget": "whp",
        "retain": {"kl": {"weight": 2.0}},
        "conflict": {"agem": {"margin": 0.1}},
        "max_length": 77,
    }
    args = ClmulConfig(str(tmp_path), use_cpu=True, gradient_accumulation_steps=3, data_seed=5, **given)
    how, default = Reinforced(epochs=7, learning_rate=0.3), ClmulConfig(str(tmp_path), use_cpu=True)
    found = preparation._arguments(args, how)
    own = {field.name for field in fields(ClmulConfig)} - {field.name for field in fields(TrainingArguments)}
    assert {"forget", "retain", "conflict", "teacher", "max_length"} <= own
    assert {name for name in own if getattr(found, name) != getattr(default, name)} == {"learn", "max_length"}
    assert (found.learn, found.max_length, found.gradient_accumulation_steps) == ({"nll": {}}, 77, 3)
    assert (found.num_train_epochs, found.max_steps, found.learning_rate) == (7, -1, 0.3)
    assert found.data_seed is None and found.seed != args.seed and args.forget == "whp"


# ---- edits ---------------------------------------------------------------------------------------------------


def edited(folder, roles=None, model=None, **options):
    roles = roles or {"forget": two_roles()["forget"]}
    return make(model or llama(), roles, folder, forget={"task_vector": {**HOW, "scale": 0.5}}, **options)


def test_a_task_vector_is_the_way_back_from_the_reinforced_model(tmp_path):
    trainer = edited(tmp_path, save_strategy="steps", save_steps=1)
    start, reinforced = weights(llama()), weights(by_hand("full model", tmp_path))
    done = trainer.train()
    expected = {name: start[name] - 0.5 * (reinforced[name] - start[name]) for name in start}
    assert same(weights(trainer.model), expected)
    assert (done.global_step, trainer.state.global_step) == (0, 0) and trainer.optimizer is None
    moved = torch.cat([(expected[n] - start[n]).flatten() for n in start]).norm()
    whole = torch.cat([value.flatten() for value in start.values()]).norm()
    assert trainer.state.log_history[-1]["edit/task_vector"] == pytest.approx(float(moved / whole), rel=1e-5)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_in_half_precision_an_edit_is_worked_out_in_float32(tmp_path, monkeypatch):
    model, seen = llama().bfloat16(), []
    kept = TERMS["task_vector"].function
    spy = lambda before, after, scale: seen.append(before.dtype) or kept(before, after, scale=scale)  # noqa: E731
    trainer = edited(tmp_path, model=model)
    (active,) = trainer.terms["forget"]
    trainer.terms["forget"] = [replace(active, term=replace(active.term, function=spy))]
    trainer.train()
    assert set(seen) == {torch.float32} and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_an_edit_that_is_not_finite_is_not_made(tmp_path):
    trainer = edited(tmp_path)
    (active,) = trainer.terms["forget"]
    trainer.terms["forget"] = [replace(active, parameters={"scale": float("inf")})]
    before = weights(trainer.model)
    with pytest.raises(RunError, match="task_vector: the edited weights are not finite. Lower its `learning_rate`"):
        trainer.train()
    assert same(weights(trainer.model), before)


def test_what_cannot_go_with_an_edit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="forget/task_vector is an edit, .* no retain term can act: give retain={}"):
        edited(tmp_path, two_roles())
    assert edited(tmp_path, two_roles(), retain={}).terms.keys() == {"forget"}
    for option, value in (("lookahead", {}), ("sharpness", {}), ("saliency", {"train": 0.5})):
        with pytest.raises(ValueError, match=f"forget/task_vector is an edit, .* {option} cannot act: leave it out"):
            edited(tmp_path, two_roles(), retain={}, **{option: value})
    with pytest.raises(ValueError, match="works on whole weights, .* train all weights, or take another forget term"):
        edited(tmp_path, peft_config=LORA)
    with pytest.raises(ValueError, match="forget: task_vector is an edit, .* stands alone"):
        make(llama(), {"forget": two_roles()["forget"]}, tmp_path, forget={"npo": {}, "task_vector": {}})
    with pytest.raises(ValueError, match="forget/task_vector: unknown parameter 'weight'"):
        active_terms("forget", {"task_vector": {"weight": 2.0}})
    with pytest.raises(ValueError, match="leaves no checkpoint to resume from"):
        edited(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [("whp", {"fsdp": "full_shard"}, "trains the model twice"), ("task_vector", {"fsdp": True}, "trains the model twice"),
     ("whp", {"deepspeed": {}}, "DeepSpeed keeps it in parts"), ("altpo", {"deepspeed": {}}, "DeepSpeed keeps it in parts")],
)  # fmt: skip
def test_what_sharded_weights_cannot_do_is_refused(name, args, why):
    unset = {"fsdp": "", "deepspeed": None, "penalties": None, **dict.fromkeys(OF_STEPS)}
    args = SimpleNamespace(**{**unset, **args})
    with pytest.raises(ValueError, match=f"forget/{name} .*{why}.*: use DDP"):
        check_preparations(args, llama(), {"forget": active_terms("forget", name)})
    check_preparations(args, llama(), {"forget": active_terms("forget", "npo")})
