"""The teacher that knows nothing: a model with random weights, the same everywhere and never in the way, or none at all."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_gpt2, tiny_llama
from torch import nn
from trainer_bed import (
    LORA,
    TOKENIZER,
    Stop,
    adapted,
    assert_resume_is_exact,
    lines,
    llama,
    make,
    same,
    two_roles,
    weights,
    windows,
)
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from hf_clmul.data.roles import derived_seed
from hf_clmul.gradients.options import OF_STEPS
from hf_clmul.models import causal_lm
from hf_clmul.models.teachers import random_like
from hf_clmul.objectives.active import active_terms
from hf_clmul.training.preparation import check_preparations


def drawn(kind, config, seed):
    """As the class itself makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config)


def test_it_is_a_model_of_the_same_architecture_with_weights_of_its_seed():
    model = tiny_llama()
    state = torch.get_rng_state()
    made = random_like(model, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(made), weights(drawn(LlamaForCausalLM, model.config, 5)))
    assert not same(weights(made), weights(random_like(model, 6))) and not same(weights(made), weights(model))
    assert made.config.vocab_size == model.config.vocab_size and made.config is not model.config


def test_it_is_frozen_and_without_dropout():
    model = tiny_gpt2().train()
    made = random_like(model, 0)
    assert type(made) is GPT2LMHeadModel and not any(p.requires_grad for p in made.parameters())
    assert not any(module.training for module in made.modules()) and any(
        isinstance(m, nn.Dropout) for m in made.modules()
    )
    assert model.training


def test_below_an_adapter_it_is_like_the_base():
    model = adapted()
    before, config = weights(model), str(model.config)
    made = random_like(model, 5)
    assert type(made) is LlamaForCausalLM and same(weights(made), weights(random_like(llama(), 5)))
    assert same(weights(model), before) and str(model.config) == config


def test_it_has_the_precision_of_the_model():
    half = tiny_llama().to(torch.bfloat16)
    assert {p.dtype for p in random_like(half, 0).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{}, {"peft_config": LORA}], ids=["full model", "adapter"])
@pytest.mark.parametrize("kind", [None, "random", "uniform"])
def test_the_loss_is_the_divergence_from_it(tmp_path, kind, options):
    given = {} if kind is None else {"weights": kind}
    trainer = make(llama(), two_roles(), tmp_path, forget={"bad_teacher": given}, retain={}, **options)
    trainer.train()
    batch, everything = trainer.data_collator(windows(trainer, 8)[0])["forget"], frozenset({"logits"})
    teacher = random_like(llama(), derived_seed(trainer.args.seed, "incompetent"))
    with torch.no_grad():
        p, q = (causal_lm.predict(m, batch, everything, trainer.family.accepted).logits for m in (llama(), teacher))
    q = torch.zeros_like(q) if kind == "uniform" else q
    expected = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean()
    assert lines(trainer)[0]["loss/forget/bad_teacher"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.incompetent is None  # a whole model is not kept longer than needed


def test_the_base_teaches_below_all_adapters(tmp_path):
    """Also below those of earlier requests, which met the data; and the student is itself again afterwards."""
    model = adapted()
    learned = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make(model, two_roles(), tmp_path, forget={"bad_teacher": {"weights": "base"}}, retain={})
    trainer.train()
    batch, everything = trainer.data_collator(windows(trainer, 8)[0])["forget"], frozenset({"logits"})
    again = adapted()
    assert all(torch.equal(p, learned[name]) for name, p in again.named_parameters())
    with torch.no_grad():
        p = causal_lm.predict(again.eval(), batch, everything, trainer.family.accepted).logits
        with again.disable_adapter():
            q = causal_lm.predict(again, batch, everything, trainer.family.accepted).logits
    expected = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean()
    assert expected > 0.001, "the adapter must have learned something for this to tell"
    assert lines(trainer)[0]["loss/forget/bad_teacher"] == pytest.approx(float(expected), rel=1e-5)
    assert trainer.incompetent is None and any(not torch.equal(p, learned[n]) for n, p in model.named_parameters())


def test_the_base_of_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="forget/bad_teacher: `weights: base` asks the model below its adapter, and this"
    ):
        make(llama(), two_roles(), tmp_path, forget={"bad_teacher": {"weights": "base"}}, retain={})


@pytest.mark.parametrize("build", [llama, adapted])
def test_a_resumed_request_has_the_same(tmp_path, build):
    assert_resume_is_exact(build(), tmp_path, (2,), forget="bad_teacher", max_steps=4, learning_rate=1e-2)
    names = {path.name for path in (tmp_path / "through" / "checkpoint-4").iterdir()}
    assert not {name for name in names if "incompetent" in name or "teacher" in name}


def test_it_is_gone_where_a_request_fails(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path, [Stop(1)], forget="bad_teacher", save_steps=1, save_strategy="steps")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.incompetent is None and len(TOKENIZER) == trainer.model.config.vocab_size


@pytest.mark.parametrize("args", [{"fsdp": "full_shard"}, {"deepspeed": {}}])
def test_a_whole_model_on_each_rank_is_refused_where_models_are_in_parts(args):
    args = SimpleNamespace(**{"fsdp": "", "deepspeed": None, **dict.fromkeys(OF_STEPS), **args})
    with pytest.raises(
        ValueError, match="forget/bad_teacher makes a whole model .*: give it `weights: uniform`, or use DDP"
    ):
        check_preparations(args, llama(), {"forget": active_terms("forget", "bad_teacher")})
    with pytest.raises(ValueError, match="forget/incompetent makes .*: give it `weights: zero`, or use DDP"):
        check_preparations(args, llama(), {"forget": active_terms("forget", "incompetent", "diffusion")})
    zero = active_terms("forget", {"incompetent": {"weights": "zero"}}, "diffusion")
    check_preparations(args, llama(), {"forget": zero})
    uniform = {"bad_teacher": {"weights": "uniform"}}
    check_preparations(args, llama(), {"forget": active_terms("forget", uniform)})
