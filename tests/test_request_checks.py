"""Mistakes of an unlearn request are said before the learn request before it trains."""

import pytest
import torch
from safetensors.torch import load_file
from small_run import execute, write_recipe

from hf_clmul.errors import RecipeError
from hf_clmul.models.adapters import WEIGHTS
from hf_clmul.recipe.load import load_recipe
from hf_clmul.run.runner import plan_recipe

ONE = "request 01-unlearn-one: "
ABOVE = "forget/rmu acts on layer 0, and the lowest layer that trains is 1"
MISTAKES = {
    "no such layer": ("full", ["forget={rmu: {layer: 99}}"], ONE + "forget: there is no layer 99: the model has 1"),
    "no such layer, adapter": ("lora", ["forget={rmu: {layer: 99}}"], ONE + "forget: there is no layer 99: the model has 2"),
    "no second answer": ("full", ["forget={dpo: {}}"], ONE + "forget/dpo: example 0 .* has no second answer"),
    "no second answer, adapter": ("lora", ["forget={dpo: {}}"], ONE + "forget/dpo: example 0 .* has no second answer"),
    "no such parameter": ("full", ["trainable=norms"], ONE + "trainable='norms' matches the whole name of none"),
    "no such parameter, adapter": ("lora", ["trainable=.*default.*"],
                                   ONE + "trainable='.*default.*' matches the whole name of none of the .*task_people"),
    "trained above the term": ("lora", ["forget={rmu: {layer: 0}}", "trainable=.*layers.1.*"], ONE + ABOVE),
    "adapter above the term": ("last", ["forget={rmu: {layer: 0}}"], ONE + ABOVE),
    "second derivative, adapter": ("lora", ["lookahead={mode: exact}", "training.activation_checkpointing=true"],
                                  ONE + "ClmulTrainer cannot do what was asked:\n- lookahead mode 'exact' takes"),
    "turns": ("full", ["lookahead={}", "conflict=alternate"], "unlearning.lookahead: .*alternate"),
    "half precision": ("bfloat16", ["lookahead={}"], "unlearning.lookahead: .*bfloat16"),
}  # fmt: skip
KINDS = {
    "last": ("dropout: 0.2}", "dropout: 0.2, layers: last-1}"),
    "bfloat16": (
        "model: {scratch: {vocab_size: 300, layers: 1, hidden: 32, heads: 2}}",
        "model: {path: ./base, dtype: bfloat16}",
    ),
}


def written(folder, kind):
    if kind == "bfloat16":
        write_recipe(folder, "lora")  # for its base
        return write_recipe(folder, "full", KINDS[kind])
    return write_recipe(folder, "lora", KINDS[kind]) if kind in KINDS else write_recipe(folder, kind)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_an_unlearn_request_costs_no_training(tmp_path, mistake):
    kind, overrides, message = MISTAKES[mistake]
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        execute(written(tmp_path, kind), tmp_path / "out", *(f"unlearning.{text}" for text in overrides))
    assert not (tmp_path / "out" / "base").exists() and not list((tmp_path / "out").rglob("result.json"))


def test_a_pattern_that_names_the_adapter_means_the_same_in_a_plan_and_in_a_run(tmp_path):
    recipe = write_recipe(tmp_path, "lora")
    by_name = r"unlearning.trainable='.*layers\.1\.self_attn\.q_proj\.lora_B\.task_people\.weight'"
    _, planned = plan_recipe(load_recipe(recipe, [by_name]))
    assert planned["trainable_parameters"] == 2 * 32  # r x hidden
    requests = tmp_path / "out" / "requests"
    execute(recipe, tmp_path / "out", "requests=[{learn: {task: people, data: people}}]")
    learned = load_file(requests / "00-learn-people/state" / WEIGHTS)  # its request will replace them
    execute(recipe, tmp_path / "out", by_name)
    unlearned = load_file(requests / "01-unlearn-one/state" / WEIGHTS)
    assert [key for key in learned if not torch.equal(learned[key], unlearned[key])] == [
        "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    ]
