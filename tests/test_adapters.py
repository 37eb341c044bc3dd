"""LoRA adapters by name: attached, copied, saved and loaded without touching anything else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import tiny_gpt2, tiny_llama

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.models import adapters

TOKENS = torch.tensor([[3, 14, 15, 9, 26]])
MODULES = ["q_proj", "down_proj"]


def lora(modules=MODULES, r=4, **options):
    return LoraConfig(r=r, lora_alpha=8, target_modules=modules, task_type="CAUSAL_LM", **options)


def with_adapter(seed=1, config=None, name="default"):
    return adapters.attach(tiny_llama(), config or lora(), name, seed)


def trained(model, seed=7):
    """As if trained: every B matrix of every adapter is drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    return model


def output(model):
    with torch.no_grad():
        return model(TOKENS).logits


def state(model):
    """Everything that must be given back: weights, flags, modes, what is active."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return tensors, flags, [module.training for module in model.modules()], model.active_adapter


def same(one, other):
    return one[1:] == other[1:] and all(torch.equal(one[0][k], other[0][k]) for k in one[0] | other[0])


# ---- attach ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_attach_draws_from_its_seed_and_leaves_the_generator_and_the_base_alone(init):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, twin, other = (with_adapter(seed, lora(init_lora_weights=init)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert same(state(one), state(twin)) and not same(state(one), state(other))
    assert torch.equal(output(one.get_base_model()), output(one))
    with one.disable_adapter():
        assert torch.equal(output(one), output(tiny_llama()))


def test_a_second_adapter_is_active_and_trainable_alone():
    model = trained(with_adapter(name="first"))
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert adapters.attach(model, lora(), "second", seed=2) is model
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.active_adapter == "second" and model.active_adapters == ["second"]
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"second"}
    assert torch.equal(output(model), output(tiny_llama()))


@pytest.mark.parametrize(
    ("option", "value"),
    [("init_lora_weights", init) for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")]
    + [("bias", "all"), ("bias", "lora_only")],
)
def test_what_alters_the_base_is_refused(option, value):
    config = lora()
    setattr(config, option, value)  # some of them would ask for packages or data first
    model = tiny_llama()
    with pytest.raises(RunError, match=f"{option}='{value}' alters the base weights.*Use the default"):
        adapters.attach(model, config, "default", 0)
    assert torch.equal(output(model), output(tiny_llama()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_that_fits_no_module_is_refused():
    with pytest.raises(RunError, match="the adapter does not fit the model: .*no_such_proj"):
        with_adapter(config=lora(["no_such_proj"]))


# ---- which layers and modules ------------------------------------------------------------------------------


LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
GPT2 = {"c_attn", "c_proj", "c_fc"}


@pytest.mark.parametrize(
    ("make", "modules", "layers", "expected"),
    [
        (tiny_llama, "all-linear", "all", ({0, 1, 2}, LLAMA)),
        (tiny_llama, "all-linear", "last-2", ({1, 2}, LLAMA)),
        (tiny_llama, "all-linear", "last-10", ({0, 1, 2}, LLAMA)),
        (tiny_llama, "all-linear", [2, 0], ({0, 2}, LLAMA)),
        (tiny_llama, ["q_proj"], "last-1", ({2}, {"q_proj"})),
        (tiny_gpt2, "all-linear", "all", ({0, 1, 2}, GPT2)),
        (tiny_gpt2, "all-linear", "last-1", ({2}, GPT2)),  # its linear layers are of another class
    ],
)
def test_the_words_of_a_recipe_choose_layers_and_modules(make, modules, layers, expected):
    model = make(layers=3)
    config = adapters.lora_config(model, 4, 8.0, 0.1, modules, layers)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8.0, 0.1)
    model = adapters.attach(model, config, "default", 0)
    names = [name.split(".") for name, p in model.named_parameters() if p.requires_grad]
    found = {int(part) for name in names for part in name if part.isdigit()}, {name[-4] for name in names}
    assert found == expected


def test_a_module_that_the_model_does_not_have_is_not_left_out_without_a_word():
    model, rest = tiny_llama(), (4, 8.0, 0.0)
    with pytest.raises(
        RecipeError, match="target_modules: no module of the model is called 'v_prj'; did you mean 'v_proj'?"
    ):
        adapters.lora_config(model, *rest, ["q_proj", "v_prj"], "all")
    with pytest.raises(RecipeError, match=r"called 'proj'"):  # whole names between dots
        adapters.lora_config(model, *rest, ["proj"], "all")
    stacked = adapters.attach(model, adapters.lora_config(model, *rest, ["q_proj"], "all"), "one", 0)
    assert adapters.lora_config(stacked, *rest, ["self_attn.q_proj"], "all").target_modules == {"self_attn.q_proj"}


def test_a_layer_that_the_model_does_not_have():
    with pytest.raises(RecipeError, match="there is no layer 7; the model has 3, from 0 to 2"):
        adapters.lora_config(tiny_llama(layers=3), 4, 8.0, 0.0, "all-linear", [0, 7])


# ---- what an adapter does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_all_linear_means_the_same_beside_an_older_adapter(make):
    """PEFT's wrappers hold linear modules of their own."""
    model = make(layers=3)
    first = adapters.lora_config(model, 4, 8.0, 0.0, "all-linear", "last-2")
    stacked = adapters.attach(model, first, "task_one", 0)
    second = adapters.lora_config(stacked, 4, 8.0, 0.0, "all-linear", "last-3")
    assert second.target_modules == first.target_modules and len(first.target_modules) > 2
    adapters.attach(stacked, second, "task_two", 1)
    assert set(stacked.peft_config) == {"task_one", "task_two"}


def test_an_adapter_is_the_identity_until_it_is_trained():
    assert adapters.is_identity(with_adapter(), "default")
    assert adapters.is_identity(with_adapter(config=lora(init_lora_weights="gaussian")), "default")
    assert adapters.is_identity(with_adapter(config=lora(["embed_tokens"])), "default")
    assert not adapters.is_identity(trained(with_adapter()), "default")
    assert not adapters.is_identity(with_adapter(config=lora(init_lora_weights=False)), "default")
    # Nothing is known of other kinds of adapters.
    assert not adapters.is_identity(get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM")), "default")


def test_trains_alone():
    model = with_adapter()
    assert adapters.trains_alone(model, "default")
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert not adapters.trains_alone(model, "default")


def test_untouched_gives_flags_modes_and_the_active_adapter_back_after_an_error_too():
    model = with_adapter(name="first")
    adapters.attach(model, lora(), "second", 2).train()
    model.get_base_model().model.layers[0].eval()
    next(p for name, p in model.named_parameters() if "lora_A.second" in name).requires_grad_(False)
    before = state(model)
    with pytest.raises(KeyError), adapters.untouched(model):
        model.eval().set_adapter("first")
        model.requires_grad_(True)
        assert not same(state(model), before)
        raise KeyError
    assert same(state(model), before)


def test_untouched_gives_several_active_adapters_back():
    model = trained(adapters.attach(with_adapter(name="first"), lora(), "second", 2))
    adapters.attach(model, lora(), "third", 3)
    model.base_model.set_adapter(["first", "second"])
    before, expected = state(model), output(model)
    with adapters.untouched(model):
        model.set_adapter("third")
    assert model.active_adapters == model.base_model.active_adapter == ["first", "second"]
    assert same(state(model), before) and torch.equal(output(model), expected)
    with adapters.untouched(model), model.disable_adapter():
        assert not torch.equal(output(model), expected)
    assert same(state(model), before) and torch.equal(output(model), expected)
    adapters.copy_frozen(model, "first", "copy")
    adapters.remove(model, "copy")
    assert same(state(model), before) and model.active_adapters == ["first", "second"]


def test_a_frozen_copy_changes_nothing_else_and_goes_without_a_trace():
    model = trained(with_adapter()).train()
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before, generator = state(model), torch.random.get_rng_state()
    adapters.copy_frozen(model, "default", "copy")
    assert torch.equal(torch.random.get_rng_state(), generator)
    tensors, flags, _, active = state(model)
    copies = {name: name.replace(".copy.", ".default.") for name in tensors if ".copy." in name}
    assert len(copies) == 2 * len(MODULES) * 2  # A and B in two layers
    assert all(torch.equal(tensors[copied], before[0][source]) for copied, source in copies.items())
    assert not any(flags[name] for name in copies)
    assert {name: flag for name, flag in flags.items() if name not in copies} == before[1]
    assert active == before[3]
    adapters.remove(model, "copy")
    assert same(state(model), before)


@pytest.mark.parametrize("init", ["pissa", "olora", "gaussian"])
def test_a_frozen_copy_does_not_initialise_the_base_once_more(init):
    model = get_peft_model(tiny_llama(), lora(init_lora_weights=init)).eval()
    before, expected = state(model), output(model)
    adapters.copy_frozen(model, "default", "copy")
    assert torch.equal(output(model), expected)
    model.set_adapter("copy")
    assert torch.equal(output(model), expected)
    model.set_adapter("default")
    adapters.remove(model, "copy")
    assert same(state(model)[:1] + before[1:], before)
    assert model.peft_config["default"].init_lora_weights == init


# ---- files -------------------------------------------------------------------------------------------------


def test_save_and_load_give_every_bit_back_and_touch_nothing_else(tmp_path):
    source = trained(with_adapter(name="people"))
    adapters.save(source, "people", tmp_path, base="some/model")
    model = with_adapter(seed=2, name="other").train()
    next(model.parameters()).requires_grad_(True)
    before = state(model)
    adapters.load(model, "other", tmp_path)
    assert state(model)[1:] == before[1:]
    assert torch.equal(output(model.eval()), output(source))
    # Others load it as they load any adapter: it is named `default` in the file.
    public = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(output(public), output(source))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("some/model", True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def save_a_new_one(folder):
    model = tiny_llama()
    config = adapters.lora_config(model, 4, 8.0, 0.0, "all-linear", "all")
    adapters.save(adapters.attach(model, config, "default", 1), "default", folder)


def test_files_are_equal_to_the_byte_in_processes_with_different_hash_seeds(tmp_path):
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    code = "import sys, pathlib, test_adapters as t; t.save_a_new_one(pathlib.Path(sys.argv[1]))"
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join([tests, os.path.dirname(tests)])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, tmp_path / "other"], env=environment, check=True)
    save_a_new_one(tmp_path / "own")
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert len(json.loads((tmp_path / "own" / adapters.CONFIG).read_text())["target_modules"]) == 14


@pytest.mark.parametrize("config", [lora(r=2), lora(["q_proj"]), lora([*MODULES, "up_proj"])])
def test_the_file_of_another_adapter_is_refused_before_anything_changes(tmp_path, config):
    adapters.save(with_adapter(config=config), "default", tmp_path)
    model = trained(with_adapter())
    before = state(model)
    with pytest.raises(RunError, match=r"does not fit adapter 'default': \d+ tensors differ"):
        adapters.load(model, "default", tmp_path)
    assert same(state(model), before)


def test_saving_asks_no_hub_and_adds_no_weights_of_the_base(tmp_path, monkeypatch):
    import peft.utils.save_and_load as peft_saving

    def asked(*args, **kwargs):
        raise AssertionError("PEFT asked the Hub")

    monkeypatch.setattr(peft_saving, "check_file_exists_on_hf_hub", asked)
    model = with_adapter()
    model.peft_config["default"].base_model_name_or_path = "some-user/some-model"
    adapters.save(model, "default", tmp_path)
    assert adapters.is_identity(model, "default")
