"""What the trainer and its arguments refuse: each message says what is wrong and what to do instead."""

import dataclasses
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from tiny import tiny_tokenizer
from trainer_bed import LORA, QUIET, TOKENIZER, adapted, examples, llama, make, two_roles
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import ParallelMode

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig


@pytest.fixture(autouse=True)
def field_types():
    """HfArgumentParser writes resolved types into the dataclass itself, where other tests would find them."""
    before = [(field, field.type) for field in fields(ClmulConfig)]
    yield
    for field, kind in before:
        field.type = kind


@pytest.mark.parametrize(("options", "reason", "remedy"), [
    ({"optim": "lomo"}, "optim='lomo' updates weights inside the backward pass", "use 'adamw_torch'"),
    ({"optim": "adalomo"}, "optim='adalomo' updates weights inside the backward pass", "use 'adamw_torch'"),
    ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise' updates weights inside", "use 'adamw_torch'"),
    ({"optim": "apollo_adamw_layerwise"}, "optim='apollo_adamw_layerwise' updates weights inside", "use 'adamw_torch'"),
    ({"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
     "re-entrant checkpointing diverges", "drop `use_reentrant`"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no meaning", "set it to 0"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: the order of examples is fixed", "leave it 'random'"),
    ({"accelerator_config": {"split_batches": True}}, "split_batches and dispatch_batches cut a batch of roles apart",
     "set per_device_train_batch_size instead"),
    ({"accelerator_config": {"dispatch_batches": True}}, "split_batches and dispatch_batches cut a batch of roles apart",
     "set per_device_train_batch_size instead"),
])  # fmt: skip
def test_training_arguments(tmp_path, options, reason, remedy):
    with pytest.raises(ValueError) as error:
        make(llama(), two_roles(), tmp_path, **options)
    assert reason in str(error.value) and remedy in str(error.value)


def test_all_problems_are_reported_together(tmp_path):
    with pytest.raises(ValueError) as error:
        make(llama(), two_roles(), tmp_path, optim="lomo", label_smoothing_factor=0.1, compute_loss_func=lambda *a: 0)
    assert [line[:12] for line in str(error.value).splitlines()] == [
        "ClmulTrainer",
        "- optim='lom",
        "- label_smoo",
        "- compute_lo",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_collator": lambda rows: rows}, "data_collator: .* give data sets with question/answer"),
        ({"compute_loss_func": lambda *a: 0}, "compute_loss_func sees neither roles nor teacher: write a term"),
        ({"model_init": llama}, "model_init makes a new model when training starts.*give `model`"),
    ],
)
def test_arguments_of_the_stock_trainer(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        make(llama(), two_roles(), tmp_path, **given)


class Elsewhere(ClmulConfig):
    """What a machine with several GPUs, or with DeepSpeed, reports."""

    parallel_mode = ParallelMode.NOT_DISTRIBUTED


def test_data_parallel(tmp_path):
    with pytest.raises(
        ValueError, match="nn.DataParallel.*start with `accelerate launch` or `torchrun`.*CUDA_VISIBLE_DEVICES=0"
    ):
        ClmulTrainer(llama(), Elsewhere(str(tmp_path), **QUIET), None, two_roles(), processing_class=TOKENIZER)


def test_deepspeed_can_only_add_gradients_up(tmp_path):
    args = ClmulConfig(str(tmp_path), **QUIET)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="DeepSpeed does not hand out: use conflict='sum' or 'pdu', or FSDP2"):
        ClmulTrainer(llama(), args, None, two_roles(), processing_class=TOKENIZER)
    ClmulTrainer(
        llama(), args, None, {"learn": examples(2, 0)}, processing_class=TOKENIZER
    )  # one role: no rule at work
    args.conflict = "sum"
    ClmulTrainer(llama(), args, None, two_roles(), processing_class=TOKENIZER)


@pytest.mark.parametrize("rule", ["sago", "pcgrad_per_layer", "gru"])
def test_rules_on_whole_gradients_need_whole_gradients(tmp_path, rule):
    args = ClmulConfig(str(tmp_path), **QUIET, conflict=rule)
    args.fsdp = True
    with pytest.raises(
        ValueError, match=f"conflict='{rule}' works on whole gradients, and FSDP leaves.*use DDP, or a rule"
    ):
        ClmulTrainer(llama(), args, None, two_roles(), processing_class=TOKENIZER)


def stacked():
    model = adapted()
    model.add_adapter("second", LORA)
    model.base_model.set_adapter(["default", "second"])
    return model


def with_base_trained():
    model = adapted()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(("build", "message"), [
    (stacked, r"of the active adapters \(default, second\) 2 train, .*unclear which one.*freeze all but one"),
    (with_base_trained, "parameters outside adapter 'default' are trainable.*freeze them, or train a model without adapters"),
    (lambda: llama().requires_grad_(False), "nothing is trainable.*is_trainable=True"),
    (lambda: get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[])),
     "adapter 'default' is a IA3: only LoRA adapters can be trained"),
])  # fmt: skip
def test_models(tmp_path, build, message):
    with pytest.raises(ValueError, match=message):
        make(build(), two_roles(), tmp_path)


def test_adapter_loaded_for_inference(tmp_path):
    adapted().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"nothing is trainable: load the adapter with PeftModel.from_pretrained\(..., is_trainable=True",
    ):
        make(PeftModel.from_pretrained(llama(), tmp_path), two_roles(), tmp_path)
    make(PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True), two_roles(), tmp_path)


def test_new_adapters(tmp_path):
    with pytest.raises(ValueError, match="the model has an adapter already: give one of them"):
        make(adapted(), two_roles(), tmp_path, peft_config=LORA)
    with pytest.raises(ValueError, match="peft_config is a IA3Config: only LoRA"):
        make(llama(), two_roles(), tmp_path, peft_config=IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(RunError, match="init_lora_weights='pissa' alters the base weights.*Use the default"):
        make(
            llama(), two_roles(), tmp_path, peft_config=LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"])
        )


# ---- data and tokenizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("roles", "message"), [
    ({"learn": [], "forget": []}, "exactly one of `learn` and `forget`; found 'learn', 'forget'"),
    ({"retain": []}, "exactly one of `learn` and `forget`; found 'retain'"),
    ({}, "exactly one of `learn` and `forget`; found nothing"),
    ({"forget": examples(2, 0), "keep": []}, "found 'forget', 'keep'. Roles: learn, forget, retain, memory"),
    ({"forget": [], "retain": examples(2, 0)}, "the forget set is empty: nothing to unlearn"),
    ({"forget": examples(2, 0), "retain": []}, "the retain set is empty: nothing to train on"),
    ({"forget": iter([])}, "forget: a streaming data set cannot be counted.*give one with a length"),
    ({"forget": Dataset.from_list(examples(2, 0)).to_iterable_dataset()}, "a streaming data set cannot be counted"),
])  # fmt: skip
def test_roles(tmp_path, roles, message):
    with pytest.raises(ValueError, match=message):
        make(llama(), roles, tmp_path)


def test_terms_and_data_must_agree(tmp_path):
    with pytest.raises(ValueError, match="terms are given for 'retain', but train_dataset has no data of that role"):
        make(llama(), {"forget": examples(2, 0)}, tmp_path, retain="kl")
    with pytest.raises(ValueError, match="forget: no term 'npoo' for this role; there are .*npo.* Did you mean 'npo'?"):
        make(llama(), two_roles(), tmp_path, forget="npoo")
    with pytest.raises(ValueError, match="forget/npo: unknown parameter 'betta'; there are beta, weight"):
        make(llama(), two_roles(), tmp_path, forget={"npo": {"betta": 1}})
    with pytest.raises(ValueError, match="retain: no term 'npo' for this role"):
        make(llama(), two_roles(), tmp_path, retain="npo")
    with pytest.raises(ValueError, match="no term is given for 'forget': nothing would be trained"):
        make(llama(), two_roles(), tmp_path, forget={})
    assert list(make(llama(), two_roles(), tmp_path, retain={}).terms) == ["forget"]


def flat(gram):
    return [1.0] * len(gram)


def test_what_works_between_roles_is_refused_where_nothing_is_to_be_retained(tmp_path, caplog):
    for option, value in (
        ("conflict", "cagrad"),
        ("conflict", {"agem": {"margin": 0.1}}),
        ("lookahead", {}),
        ("conflict_rule", flat),
    ):
        with pytest.raises(
            ValueError, match=rf"retain=\{{\}} leaves one role, .*: leave {option} out, or give a retain term"
        ):
            make(llama(), two_roles(), tmp_path, retain={}, **{option: value})
    for rule in ("sum", "pcgrad_retain_first"):
        make(llama(), two_roles(), tmp_path, retain={}, conflict=rule)
    assert not caplog.messages
    make(llama(), {"forget": examples(2, 0)}, tmp_path, conflict="cagrad", lookahead={})  # for lack of data only
    assert caplog.messages == ["train_dataset has one role, with no other to look ahead to: lookahead is left out"]


def test_columns_and_supervision(tmp_path):
    with pytest.raises(RecipeError, match="forget: no usable columns.*Found: body"):
        make(llama(), {"forget": [{"body": "x"}]}, tmp_path)
    with pytest.raises(RecipeError, match="learn, example 1: .*nothing to supervise"):
        make(llama(), {"learn": [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]}, tmp_path)


def test_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="processing_class is missing: give the model's tokenizer"):
        make(llama(), two_roles(), tmp_path, processing_class=None)
    bare = tiny_tokenizer(["a"])
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an end-of-sequence token: set tokenizer.pad_token"):
        make(llama(), two_roles(), tmp_path, processing_class=bare)


def test_training_without_data(tmp_path):
    trainer = make(llama(), None, tmp_path, eval_dataset=examples(2, 0))
    assert trainer.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer.train()


# ---- ClmulConfig ---------------------------------------------------------------------------------------------------


def test_plain_training_arguments_are_answered_with_the_right_class(tmp_path):
    with pytest.raises(
        ValueError, match="args is a TrainingArguments, .*give a ClmulConfig, which takes the same arguments"
    ):
        ClmulTrainer(llama(), TrainingArguments(str(tmp_path)), None, two_roles(), processing_class=TOKENIZER)


@pytest.mark.parametrize(("options", "message"), [
    ({"conflict": "pcgrads"}, f"conflict='pcgrads' is not known; there are {', '.join(CONFLICT_RULES)}. Did you mean 'pcgrad'?"),
    ({"conflict": {"agen": {}}}, "conflict='agen' is not known; there are sum, .* Did you mean 'agem'?"),
    ({"conflict": {"agem": {"magin": 1}}}, "conflict agem: unknown parameter 'magin'; there are margin. Did you mean 'margin'?"),
    ({"conflict": {"mgda": {"c": 1}}}, "conflict mgda: unknown parameter 'c'; the rule has none."),
    ({"conflict": {"agem": {"margin": -1}}}, "conflict agem: margin: expected a number of at least 0, found -1."),
    ({"conflict": {"gru": {"gamma": "0.8"}}}, "conflict gru: gamma: expected a number, found the text '0.8'."),
    ({"conflict": {"gru": {"cos_clip": 0.5}}}, "conflict gru: cos_clip: expected a number below 0, found 0.5."),
    ({"conflict": {"bisector": {"length": "nahs"}}}, "expected one of imtl, nash, unit, found the text 'nahs'."),
    ({"conflict": {"agem": {}, "mgda": {}}}, "is not one rule: give a name, or {name: {parameter: value}}"),
    ({"conflict": {}}, "conflict={} is not one rule"),
    ({"conflict": ["agem"]}, "is not one rule"),
    ({"teacher": "efor"}, "teacher='efor' is not known; there are before_request, ema. Did you mean 'before_request'?"),
    ({"teacher": "after"}, "teacher='after' is not known; there are before_request, ema."),
    ({"teacher": {"ema": {}, "after": {}}}, "is not one teacher: give a name, or {name: {parameter: value}}."),
    ({"teacher": {"ema": {"decay": 0.9}}}, "teacher.ema.decay: unknown key, there are probability, momentum."),
    ({"teacher": {"ema": {"momentum": 1.0}}}, "teacher.ema.momentum: expected a number below 1, found 1.0."),
    ({"teacher": {"ema": {"probability": 0}}}, "teacher.ema.probability: expected a number above 0, found 0."),
    ({"teacher": {"ema": 0.9}}, "teacher.ema: expected a section .*, found 0.9."),
    ({"teacher": {"before_request": {"momentum": 0.9}}}, "teacher='before_request' has no parameters"),
    ({"gamma": 1.5}, "gamma: expected a number of at most 1, found 1.5."),
    ({"gamma": -0.1}, "gamma: expected a number of at least 0, found -0.1."),
    ({"gamma": True}, "gamma: expected a number, found true."),
    ({"logging_nan_inf_filter": True}, "must stay off in ClmulConfig.*hides a collapse.*Remove them"),
    ({"remove_unused_columns": True}, "must stay off in ClmulConfig.*drops the roles' columns. Remove them"),
])  # fmt: skip
def test_configuration(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        ClmulConfig(str(tmp_path), **options)


@pytest.fixture
def parser():
    """The parser writes other types into the fields of the class, which other tests look at."""
    types = [(field, field.type) for field in dataclasses.fields(ClmulConfig)]
    yield HfArgumentParser(ClmulConfig)
    for field, before in types:
        field.type = before


def test_a_rule_with_parameters_survives_json_and_the_command_line(tmp_path, parser):
    rule = {"agem": {"margin": 0.5}}
    config = ClmulConfig(str(tmp_path), **QUIET, conflict=rule)
    assert json.loads(config.to_json_string())["conflict"] == rule
    line = ["--output_dir", str(tmp_path), "--conflict", json.dumps(rule)]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert parsed.conflict == rule
    trainer = make(llama(), two_roles(), tmp_path, conflict=rule)
    # b < 0: 0.5 - b / c
    assert trainer.rule.weights([[4.0, -2.0], [-2.0, 2.0]]) == pytest.approx([1.0, 1.5])


def test_configuration_survives_json_pickle_and_the_command_line(tmp_path, parser):
    options = {"forget": {"npo": {"beta": 0.2, "weight": 2.0}}, "retain": "kl", "conflict": "sum", "max_length": 64,
               "teacher": {"ema": {"momentum": 0.9}}, "gamma": 0.4}  # fmt: skip
    config = ClmulConfig(str(tmp_path), **QUIET, **options)
    read = json.loads(config.to_json_string())
    assert {name: read[name] for name in options} == options
    assert "forget" in config.to_sanitized_dict()
    torch.save(config, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).forget == options["forget"]

    shown = parser.format_help()  # a single % in a help string would raise
    assert "terms of the forget role: {name: {parameter: value, 'weight': 1.0}}. Default: npo." in " ".join(
        shown.split()
    )
    line = [
        "--output_dir",
        str(tmp_path),
        "--forget",
        json.dumps(options["forget"]),
        "--retain",
        "kl",
        "--conflict",
        "sum",
        "--max_length",
        "64",
        "--teacher",
        json.dumps(options["teacher"]),
        "--gamma",
        "0.4",
    ]
    (parsed,) = parser.parse_args_into_dataclasses(line)
    assert {name: getattr(parsed, name) for name in options} == options
    assert not parsed.logging_nan_inf_filter and not parsed.remove_unused_columns and parsed.logging_steps == 10
    assert Path(parsed.output_dir) == tmp_path
