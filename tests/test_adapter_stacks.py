"""Several adapters active at once: which one trains is explicit, switches give every flag back, and nothing is left of what is
deleted."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from test_adapters import lora, output, same, state, with_adapter
from tiny import tiny_llama
from torch import nn
from trainer_bed import LORA, Stop, examples, llama, make, two_roles, weights
from trainer_bed import same as same_tensors

from hf_clmul.errors import RunError
from hf_clmul.models import adapters

NAMES = ["one", "two", "three"]


def stack(names=NAMES, trains=None, seed=7):
    """Adapters that all do something, all active; the last one trains."""
    model = tiny_llama()
    for i, name in enumerate(names):
        model = adapters.attach(model, lora(r=2 + i), name, i)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    adapters.activate(model.eval(), names, trains or names[-1])
    return model


def trainable(model):
    return {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}


def deltas(model, name):
    """By hand: what an adapter adds to the weight of each of its modules, s B A with s = alpha / r."""
    config = model.peft_config[name]
    return {
        key: config.lora_alpha / config.r * module.lora_B[name].weight @ module.lora_A[name].weight
        for key, module in model.named_modules() if hasattr(module, "lora_A") and name in module.lora_A
    }  # fmt: skip


def by_hand(model, names):
    """The output of a bare model with the products of these adapters added to its weights."""
    plain = tiny_llama()
    with torch.no_grad():
        for name in names:
            for key, delta in deltas(model, name).items():
                plain.get_submodule(key.removeprefix("base_model.model.")).weight.add_(delta)
    return output(plain)


# ---- which are active, and which one trains ------------------------------------------------------------------


@pytest.mark.parametrize("trains", ["one", "two", "three"])
def test_activate_freezes_all_but_one_of_the_whole_model(trains):
    model = stack()
    model.requires_grad_(True)
    adapters.activate(model, ["one", "three", "two"], trains)
    assert adapters.active(model) == ["one", "three", "two"]
    assert trainable(model) == {trains} and adapters.trains_alone(model, trains)
    assert adapters.trained(model) == trains
    torch.testing.assert_close(output(model), by_hand(model, NAMES), atol=1e-4, rtol=1e-4)


def test_activate_without_one_that_trains():
    model = stack()
    adapters.activate(model, ["one", "two"])
    assert trainable(model) == set() and adapters.active(model) == ["one", "two"]
    torch.testing.assert_close(output(model), by_hand(model, ["one", "two"]), atol=1e-4, rtol=1e-4)
    with pytest.raises(RunError, match=r"of the active adapters \(one, two\) 0 train"):
        adapters.trained(model)
    adapters.activate(model, ["two"])
    assert adapters.trained(model) == "two", "of a single one there is no doubt"


def test_two_that_train_are_refused():
    model = stack()
    for name, parameter in model.named_parameters():
        if ".one." in name:
            parameter.requires_grad_(True)
    with pytest.raises(RunError, match=r"of the active adapters \(one, two, three\) 2 train.*freeze all but one"):
        adapters.trained(model)


def test_a_name_inside_another_one_is_not_mistaken_for_it():
    model = stack(["task_x", "task_xS0R0", "x"], trains="x")
    assert trainable(model) == {"x"}
    adapters.activate(model, ["task_x", "x"], "task_x")
    assert trainable(model) == {"task_x"} and adapters.trained(model) == "task_x"


# ---- serving -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("one",), ("three", "one"), ("one", "two", "three"), ()], ids=str)
def test_serving_uses_exactly_these_and_gives_everything_back(names):
    model = stack(trains="two").train()
    next(p for key, p in model.named_parameters() if ".two." in key).requires_grad_(False)
    before = state(model), adapters.active(model), model.active_adapter
    with adapters.serving(model, names) as serving:
        torch.testing.assert_close(output(serving.eval()), by_hand(model, names), atol=1e-4, rtol=1e-4)
        if not names:
            assert torch.equal(output(serving), output(tiny_llama()))
    assert same(state(model), before[0]) and (adapters.active(model), model.active_adapter) == before[1:]
    with pytest.raises(KeyError), adapters.serving(model, names):
        raise KeyError
    assert same(state(model), before[0]) and (adapters.active(model), model.active_adapter) == before[1:]


def test_serving_a_model_without_adapters_is_the_model():
    model = tiny_llama()
    with adapters.serving(model, ()) as serving:
        assert serving is model


def test_without_the_guard_peft_would_thaw_the_frozen_adapters_of_a_stack(monkeypatch):
    """Trap 7. If this fails, PEFT has mended it, and the tests above prove less than they say."""
    model = stack()
    assert trainable(model) == {"three"}
    with model.disable_adapter():
        pass
    assert trainable(model) == set(NAMES)


# ---- taking adapters away ------------------------------------------------------------------------------------


def test_drop_leaves_the_others_as_they_were():
    model = stack()
    kept = {name: adapters.sha256(model, name) for name in ("one", "three")}
    expected = by_hand(model, ["one", "three"])
    dropped = adapters.drop(model, ["two"])
    assert dropped is model and list(model.peft_config) == ["one", "three"]
    assert adapters.active(model) == ["one", "three"] and trainable(model) == set()
    assert {name: adapters.sha256(model, name) for name in kept} == kept
    assert not [key for key in model.state_dict() if ".two." in key]
    torch.testing.assert_close(output(model), expected, atol=1e-4, rtol=1e-4)


def test_drop_of_all_that_is_active_leaves_one_of_the_others_active():
    model = stack()
    adapters.activate(model, ["two"], "two")
    adapters.drop(model, ["two"])
    assert adapters.active(model) == ["three"] and trainable(model) == set()


def test_drop_of_the_last_one_gives_the_bare_base_back_to_the_bit():
    model = stack()
    base = adapters.base_sha256(model)
    bare = adapters.drop(model, NAMES)
    assert not isinstance(bare, PeftModel)
    before, after = tiny_llama().state_dict(), bare.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = adapters.attach(bare, lora(), "again", 1)
    assert adapters.base_sha256(again) == base
    assert torch.equal(output(again), output(with_adapter())), "and it takes adapters as a new one does"


# ---- together ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["one", "two"], ["three", "one", "two"]], ids=str)
def test_together_is_the_sum_of_the_products(names):
    model = stack(trains="one")
    before, flags = state(model)[0], {key: p.requires_grad for key, p in model.named_parameters()}
    adapters.together(model, names, "both")
    assert adapters.active(model) == NAMES and adapters.trained(model) == "one"
    assert {key: p.requires_grad for key, p in model.named_parameters() if ".both." not in key} == flags
    assert not any(p.requires_grad for key, p in model.named_parameters() if ".both." in key)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    found, parts = deltas(model, "both"), [deltas(model, name) for name in names]
    assert found.keys() == parts[0].keys() and len(found) == 4  # two modules of two layers
    for key, delta in found.items():
        torch.testing.assert_close(delta, sum(part[key] for part in parts), atol=1e-6, rtol=1e-5)
    with adapters.serving(model, ["both"]) as one:
        torch.testing.assert_close(output(one), by_hand(model, names), atol=1e-4, rtol=1e-4)
    ranks = {"one": 2, "two": 3, "three": 4}
    assert model.peft_config["both"].r == sum(ranks[name] for name in names)
    adapters.remove(model, "both")
    assert same((state(model)[0],), (before,))


# ---- training and resuming one of a stack ----------------------------------------------------------------------


def two_adapters(trains):
    """As in a stream: the other one is frozen, and both do something."""
    model = llama()
    for i, name in enumerate(("first", "second")):
        model = adapters.attach(model, copy.deepcopy(LORA), name, i)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1, generator=generator)
    adapters.activate(model, ["first", "second"], trains)
    return model


OPTIONS = {"per_device_train_batch_size": 2, "max_steps": 5, "save_steps": 1, "save_strategy": "steps", "optim": "adamw_torch",
           "learning_rate": 1e-2, "lr_scheduler_type": "linear", "max_grad_norm": 1.0}  # fmt: skip


@pytest.mark.parametrize("roles", [{"learn": examples(7, 3)}, two_roles(7, 9)], ids=["learn", "unlearn"])
@pytest.mark.parametrize("trains", ["first", "second"])
def test_a_resumed_stack_trains_the_right_adapter_to_the_bit(tmp_path, trains, roles):
    """Trap 12: the stock trainer resumes into whatever adapter it finds active."""
    start = weights(two_adapters(trains))
    through = make(two_adapters(trains), roles, tmp_path / "through", **OPTIONS)
    through.train()
    moved = {key for key, value in weights(through.model).items() if not torch.equal(value, start[key])}
    assert moved and all(f".{trains}." in key for key in moved)
    with pytest.raises(KeyboardInterrupt):
        make(two_adapters(trains), roles, tmp_path / "killed", [Stop(3)], **OPTIONS).train()
    saved = json.loads((tmp_path / "killed/checkpoint-3/adapter_config.json").read_text())
    assert saved["r"] == 4 and not list((tmp_path / "killed/checkpoint-3").glob("*/adapter_config.json"))
    resumed = make(two_adapters(trains), roles, tmp_path / "killed", **OPTIONS)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert same_tensors(weights(resumed.model), weights(through.model))
    assert adapters.active(resumed.model) == ["first", "second"] and trainable(resumed.model) == {trains}
