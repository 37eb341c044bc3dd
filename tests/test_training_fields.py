"""The table of training fields is that of the installed transformers, and values are checked against it."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
from small_recipe import changed, problems
from transformers import TrainingArguments

from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.training_fields import ADDED, FIELDS, OURS, REMOVED, TRANSFORMERS_VERSION
from hf_clmul.training_args import ClmulConfig


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.jsonl").touch()
    monkeypatch.chdir(tmp_path)


def training(field: str) -> str:
    """The small recipe with one more field in its `training`, on line 16."""
    return changed("logging_steps: 1,", f"logging_steps: 1, {field},")


def test_the_table_is_what_the_script_makes_of_the_installed_class(repo):
    script = runpy.run_path(str(repo / "scripts/make_training_fields.py"))
    assert script["table"]() == FIELDS
    text = (repo / "hf_clmul/recipe/training_fields.py").read_text()
    assert script["BEGIN"] + script["generated"]() + script["END"] in text


def test_every_field_of_the_class_is_in_the_table():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(TrainingArguments)]
    assert FIELDS["per_device_train_batch_size"] == "int"
    assert FIELDS["warmup_steps"] == "float"
    assert FIELDS["neftune_noise_alpha"] == "float | None"
    assert FIELDS["save_strategy"] == "Literal['no', 'steps', 'epoch', 'best']"
    assert FIELDS["report_to"] == "str | list[str] | None"
    assert FIELDS["parallelism_config"] == "Any"


def test_fields_of_our_own_are_those_of_the_config():
    config = {field.name: field for field in dataclasses.fields(ClmulConfig)}
    in_sections = {
        "learn",
        "forget",
        "retain",
        "memory",
        "penalties",
        "conflict",
        "teacher",
        "lookahead",
        "sharpness",
        "saliency",
        "protect",
        "trainable",
        "gamma",
        "ema",
    }
    assert config.keys() - FIELDS.keys() - in_sections == ADDED.keys()
    assert str(config["max_length"].type) == ADDED["max_length"]
    Path("r.yaml").write_text(training("max_length: 512"))
    assert load_recipe("r.yaml").request_training(0)["max_length"] == 512


def test_removed_names_are_gone_and_what_is_named_instead_exists():
    assert not REMOVED.keys() & FIELDS.keys()
    assert OURS.keys() <= FIELDS.keys()
    named = [
        match[1] for sentence in REMOVED.values() if (match := re.match(r"(?:write|it is named) `?(\w+)", sentence))
    ]
    assert len(named) == 17
    assert set(named) <= FIELDS.keys()


@pytest.mark.parametrize(
    ("field", "now", "why"),
    [
        ("evaluation_strategy: steps", "eval_strategy", "a request's training has no data to evaluate on"),
        ("group_by_length: true", "train_sampling_strategy", "the order of examples is fixed by the seed"),
    ],
)
def test_a_removed_name_without_effect_is_answered_with_the_new_one_and_why(field, now, why):
    [told] = problems(training(field))
    assert f"it is named {now} now and has no effect here, since {why}: leave it out" in told


def test_the_defaults_of_the_class_fit_their_own_types():
    given = {f.name: f.default for f in dataclasses.fields(TrainingArguments)
             if isinstance(f.default, int | float | str | None) and f.name not in OURS}  # fmt: skip
    assert len(given) > 100
    fields = ", ".join(
        f"{name}: {json.dumps(value)}"
        for name, value in given.items()
        if name not in ("logging_steps", "learning_rate")
    )
    Path("r.yaml").write_text(training(fields))
    assert load_recipe("r.yaml").training["adam_beta2"] == 0.999


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 1), ("num_train_epochs", 2.5), ("warmup_steps", 0.1), ("save_steps", 0.5),
        ("max_steps", -1), ("eval_strategy", "no"), ("tf32", None), ("report_to", ["none"]),
        ("report_to", "none"), ("fsdp", True),
        ("lr_scheduler_kwargs", {"num_cycles": 2}), ("optim", "adafactor"),
        ("trackio_static_space_id", False), ("save_strategy", "epoch"),
        ("debug", "underflow_overflow"), ("parallelism_config", {"tp_size": 2}), ("log_level", "info"),
    ],
)  # fmt: skip
def test_values_that_fit(field, value):
    Path("r.yaml").write_text(changed("logging_steps: 1, learning_rate: 1", f"{field}: {json.dumps(value)}"))
    assert load_recipe("r.yaml").training == {field: value}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("max_steps: true", "max_steps: expected a whole number; found true"),
        ("max_steps: 2.0", "max_steps: expected a whole number; found 2.0"),
        ("max_steps: null", "max_steps: expected a whole number; found nothing (null)"),
        ("max_grad_norm: '1e-5'", "max_grad_norm: expected a number; found the text '1e-5'; remove the "
         "quotes"),
        ("max_grad_norm: true", "max_grad_norm: expected a number; found true"),
        ("max_grad_norm: .nan", "max_grad_norm: expected a number; found nan"),
        ("max_grad_norm: [1]", "max_grad_norm: expected a number; found the list [1]"),
        ("bf16: yes", "bf16: expected true or false; found the text 'yes'; write true"),
        ("bf16: 1", "bf16: expected true or false; found 1"),
        ("run_name: 3", "run_name: expected text or null; found 3; put it in quotes"),
        ("tf32: 0", "tf32: expected true or false or null; found 0"),
        ("report_to: [1]", "report_to: expected text or a list of texts or null; found the list [1]"),
        ("lr_scheduler_kwargs: [1]", "lr_scheduler_kwargs: expected a section (key: value) or text or "
         "null; found the list [1]"),
        ("save_strategy: epochs", "save_strategy: expected one of no, steps, epoch, best; found the text "
         "'epochs'; did you mean 'epoch'?"),
        ("eval_strategy: false", "eval_strategy: expected one of no, steps, epoch; found false"),
        ("max_step: 3", "max_step: unknown training field; expected a field of TrainingArguments "
         "(transformers {version}); "
         "found 'max_step'; did you mean 'max_steps'?"),
        ("batch_size: 3", "batch_size: unknown training field; expected a field of TrainingArguments "
         "(transformers {version}); "
         "found 'batch_size'; did you mean 'per_device_train_batch_size'?"),
        ("warmup_ratio: 0.1", "warmup_ratio: no longer a field in transformers {version}; "
         "write warmup_steps, which accepts a fraction such as 0.1"),
        ("evaluation_strategy: steps", "evaluation_strategy: no longer a field in transformers {version}; it is named "
         "eval_strategy now and has no effect here, since a request's training has no data to evaluate on: leave it out; what is "
         "measured stands in the section `evaluation`"),
        ("output_dir: x", "output_dir: cannot be set in a recipe; each request has its own folder in the "
         "run folder; "
         "choose the run folder with --output"),
        ("resume_from_checkpoint: x", "resume_from_checkpoint: cannot be set in a recipe; "
         "the same command continues a stopped run by itself"),
        ("remove_unused_columns: false", "remove_unused_columns: cannot be set in a recipe; "
         "the columns of each role are needed; it is always off"),
        ("logging_nan_inf_filter: true", "logging_nan_inf_filter: cannot be set in a recipe; it hides a "
         "collapse; it is always off"),
        ("hub_token: hf_x", "hub_token: cannot be set in a recipe; the recipe is saved and shared with the "
         "model; "
         "log in with `hf auth login` or set HF_TOKEN"),
        ("label_smoothing_factor: 0.1", "label_smoothing_factor: it has no meaning for terms other than "
         "nll; expected 0; "
         "found 0.1; leave it out"),
        *((f"{field}: {value}", f"{field}: the training of a request has no data to evaluate on: what is measured before and after "
           f"each request stands in the section `evaluation`; expected {only}; found {found}; leave it out")
          for field, value, only, found in [
              ("eval_strategy", "steps", "no", "the text 'steps'"), ("eval_strategy", "epoch", "no", "the text 'epoch'"),
              ("eval_on_start", "true", "false", "true"), ("load_best_model_at_end", "true", "false", "true")]),
        ("save_strategy: best", "save_strategy: there is nothing to choose a best checkpoint of: the training of a request has no "
         "data to evaluate on: what is measured before and after each request stands in the section `evaluation`; expected no, "
         "steps or epoch; found the text 'best'; leave it out"),
        ("train_sampling_strategy: sequential", "train_sampling_strategy: the order of examples is fixed "
         "by the seed, "
         "so that a resume is exact; expected random; found the text 'sequential'; leave it out"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(field, message):
    assert problems(training(field)) == ["r.yaml:16: training." + message.format(version=TRANSFORMERS_VERSION)]


@pytest.mark.parametrize("line", [
    ("data: notes}", "data: notes, training: {lr: x}}", "r.yaml:9: requests.1.learn.training.lr"),
    ("{learning_rate: 2e-3", "{learning_rate: x", "r.yaml:12: learning.training.learning_rate"),
    ("{max_steps: 5", "{max_steps: x", "r.yaml:15: unlearning.training.max_steps"),
])  # fmt: skip
def test_every_training_section_is_checked(line):
    old, new, start = line
    (found,) = problems(changed(old, new))
    assert found.startswith(start + ": ")


@pytest.mark.parametrize(
    ("field", "messages"),
    [
        ("bf16: true, fp16: true", ["fp16: bf16 and fp16 exclude each other; set one of them to false"]),
        ("optim: lomo", ["optim: 'lomo' updates the weights during the backward pass and leaves no "
         "gradient to combine; "
                         "choose another optimizer, such as adamw_torch"]),
        ("deepspeed: ds.json", ["deepspeed: the conflict rule 'pcgrad_retain_first' needs whole gradients, "
         "which DeepSpeed does not give; "
                                "use FSDP, or `unlearning.conflict: sum`"]),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other(field, messages):
    assert problems(training(field)) == [f"r.yaml:16: training.{message}" for message in messages]


def test_settings_are_judged_by_what_each_request_ends_up_with():
    apart = training("bf16: true").replace("{max_steps: 5,", "{max_steps: 5, bf16: false, fp16: true,")
    Path("r.yaml").write_text(apart)
    assert load_recipe("r.yaml").request_training(2)["fp16"] is True
    together = training("bf16: true").replace("{max_steps: 5,", "{max_steps: 5, fp16: true,")
    message = "unlearning.training.fp16: bf16 and fp16 exclude each other; set one of them to false"
    assert problems(together) == [f"r.yaml:15: {message}"]
    sum_rule = training("deepspeed: ds.json").replace("unlearning:\n", "unlearning:\n  conflict: sum\n")
    Path("r.yaml").write_text(sum_rule)
    assert load_recipe("r.yaml").unlearning.conflict == "sum"
