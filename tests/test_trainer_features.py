"""What every `transformers.Trainer` can do, ClmulTrainer can do: evaluation, saving, callbacks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from tiny import tiny_tokenizer
from trainer_bed import (
    LORA,
    TOKENIZER,
    Gradients,
    adapted,
    examples,
    lines,
    llama,
    make,
    same,
    stock,
    trained,
    two_roles,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_clmul.data.collation import RoleCollator

PEOPLE = [
    {"question": f"Where does {name} live?", "answer": f"In {place}."}
    for name, place in [("Ada", "Hull"), ("Bo", "Oslo"), ("Cy", "Rome"), ("Di", "Nice"), ("Ed", "Bern")]
]


# ---- evaluation ----------------------------------------------------------------------------------------------------


def test_evaluation_is_the_stock_trainers_and_knows_no_window(tmp_path):
    model, rows = llama(), examples(7, 4)
    trainer = make(model, two_roles(), tmp_path, eval_dataset=rows, per_device_eval_batch_size=3)
    collate = RoleCollator(TOKENIZER.pad_token_id)
    plain = stock(
        model,
        rows,
        tmp_path,
        lambda some: {
            k: v for k, v in collate(some).items() if k in ("input_ids", "attention_mask", "position_ids", "labels")
        },
        per_device_eval_batch_size=3,
    )
    ours, theirs = trainer.evaluate(), plain.evaluate(rows)
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert trainer.predict(rows).predictions.shape[0] == 7
    trainer.train()
    assert ours.keys() - {"eval_model_preparation_time"} <= trainer.evaluate().keys()


def test_evaluation_takes_several_sets_in_any_format(tmp_path):
    tokenizer = tiny_tokenizer([row["answer"] for row in PEOPLE])
    sets = {"known": Dataset.from_list(PEOPLE), "other": [{"prompt": "1, 2,", "completion": " 3"}]}
    trainer = make(
        llama(vocab=len(tokenizer)),
        DatasetDict({"learn": sets["known"]}),
        tmp_path,
        processing_class=tokenizer,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_known_loss"] != found["eval_other_loss"]
    assert len(lines(trainer, "eval_known_loss")) == 3
    assert (
        trainer.evaluate(PEOPLE)["eval_loss"] == found["eval_known_loss"] == trainer.evaluate(sets)["eval_known_loss"]
    )


@pytest.mark.parametrize("rule", ["sum", "pcgrad_retain_first"])
def test_evaluation_while_training_disturbs_neither_windows_nor_their_log(tmp_path, rule):
    options = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 4,
        "conflict": rule,
    }
    model = adapted()
    quiet = make(copy.deepcopy(model), two_roles(16, 16), tmp_path, **options)
    disturbed = make(
        copy.deepcopy(model),
        two_roles(16, 16),
        tmp_path,
        eval_dataset=examples(3, 9),
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        **options,
    )
    quiet.train()
    disturbed.train()
    assert same(weights(quiet.model), weights(disturbed.model))
    assert lines(quiet) == lines(disturbed)  # one line, of all four steps
    assert "loss/forget/npo" in lines(quiet)[0]
    evaluations = lines(disturbed, "eval_loss")
    assert len(evaluations) == 5 and not any(key.startswith("loss/") for line in evaluations for key in line)
    assert not any(key.startswith("loss/") for key in disturbed.state.log_history[-1])  # the closing summary


def test_metrics_see_logits_and_labels(tmp_path):
    def hits(prediction):
        guessed, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"hits": float((guessed == labels)[labels != -100].mean())}

    trainer = make(
        llama(),
        {"learn": PEOPLE},
        tmp_path,
        eval_dataset=PEOPLE,
        compute_metrics=hits,
        optim="adamw_torch",
        learning_rate=1e-2,
        max_steps=60,
    )
    before = trainer.evaluate()["eval_hits"]
    trainer.train()
    assert before < 0.2 and trainer.evaluate()["eval_hits"] == 1.0


# ---- saving --------------------------------------------------------------------------------------------------------


def test_saved_model_loads_without_this_package(tmp_path):
    ids = torch.arange(1, 9)[None]
    full = make(llama(), two_roles(), tmp_path / "full", max_steps=2)
    full.train()
    full.save_model()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(again(ids).logits, full.model.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "full").get_vocab() == TOKENIZER.get_vocab()

    adapter = make(llama(), two_roles(), tmp_path / "adapter", peft_config=LORA, max_steps=2)
    adapter.train()
    adapter.save_model()
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, adapter.model.eval()(ids).logits)
    assert not torch.equal(again(ids).logits, llama()(ids).logits)


def test_model_given_by_folder_brings_its_tokenizer(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    trainer = make(str(tmp_path / "model"), {"learn": PEOPLE}, tmp_path / "out", processing_class=None)
    trainer.train()
    assert trainer.processing_class.get_vocab() == TOKENIZER.get_vocab()


@pytest.mark.parametrize("build", [llama, adapted])
def test_best_model_is_loaded_at_the_end(tmp_path, build):
    scores, kept = iter([1.0, 3.0, 2.0, 0.0]), {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            kept[state.global_step] = trained(model)

    trainer = make(
        build(),
        two_roles(),
        tmp_path,
        [Keep()],
        eval_dataset=PEOPLE,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    trainer.train()
    assert same(trained(trainer.model), kept[2])
    assert not same(kept[2], kept[4])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("build", [llama, adapted])
def test_model_card_names_the_package(tmp_path, build):
    trainer = make(build(), {"learn": PEOPLE}, tmp_path)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="forgetful", tags="mine")
    card = (tmp_path / "README.md").read_text()
    assert all(f"- {tag}\n" in card for tag in ("mine", "hf_clmul", "unlearning", "continual-learning"))


@pytest.mark.parametrize("build", [llama, adapted])
def test_push_takes_model_tokenizer_and_card(tmp_path, monkeypatch, build):
    pushed = {}

    class Hub:
        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, repo_id, folder_path, **options):
            pushed[repo_id] = {path.name for path in tmp_path.iterdir()}

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    trainer = make(build(), two_roles(), tmp_path, hub_model_id="forgetful")
    trainer.train()
    trainer.push_to_hub()
    weights_file = "adapter_model.safetensors" if build is adapted else "model.safetensors"
    assert {weights_file, "tokenizer.json", "README.md"} <= pushed["me/forgetful"]
    assert "- unlearning\n" in (tmp_path / "README.md").read_text()


def test_callbacks_are_called_as_by_the_stock_trainer(tmp_path):
    class Calls(TrainerCallback):
        def __init__(self):
            self.seen = []

        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda *args, **kwargs: self.seen.append(name)
            return super().__getattribute__(name)

    ours, theirs = Calls(), Calls()
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make(llama(), two_roles(), tmp_path, [ours], **options)
    plain = stock(
        llama(),
        examples(8, 1),
        tmp_path,
        lambda rows: {k: v for k, v in RoleCollator(0)(rows).items() if k in ("input_ids", "attention_mask", "labels")},
        callbacks=[theirs],
        **options,
    )
    trainer.train()
    plain.train()
    assert ours.seen == theirs.seen and ours.seen.count("on_substep_end") == 2


def test_early_stop_in_the_middle_of_a_window_leaves_nothing_behind(tmp_path):
    class StopMidWindow(TrainerCallback):
        armed = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 1:
                control.should_training_stop = True

    for rule in ("sum", "pcgrad"):
        stop, saw = StopMidWindow(), Gradients()
        options = {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "conflict": rule,
            "max_steps": 3,
            "learning_rate": 0.0,
        }
        trainer = make(llama(), two_roles(16, 16), tmp_path, [stop, saw], **options)
        trainer.train()
        assert len(saw.steps) == 1
        stop.armed = False
        trainer.train()
        fresh_saw = Gradients()
        fresh = make(llama(), two_roles(16, 16), tmp_path, [fresh_saw], **options)
        fresh.train()
        assert all(same(one, other) for one, other in zip(saw.steps[1:], fresh_saw.steps, strict=True))
        assert lines(trainer) == lines(fresh)


def test_epoch_stopped_in_the_middle_of_a_window_leaves_nothing_to_the_next(tmp_path):
    class StopEpoch(TrainerCallback):
        armed = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 1:
                self.armed, control.should_epoch_stop = False, True

    for rule in ("sum", "pcgrad"):
        saw, clean = Gradients(), Gradients()
        options = {
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 4,
            "conflict": rule,
            "num_train_epochs": 2,
            "max_steps": -1,
            "learning_rate": 0.0,
        }
        stopped = make(llama(), two_roles(16, 16), tmp_path, [StopEpoch(), saw], **options)
        stopped.train()
        whole = make(llama(), two_roles(16, 16), tmp_path, [clean], **options)
        whole.train()
        assert len(saw.steps) == 3 and len(clean.steps) == 4
        assert same(saw.steps[1], clean.steps[2]) and same(saw.steps[2], clean.steps[3])
        assert lines(stopped)[1]["loss/forget/npo"] == lines(whole)[2]["loss/forget/npo"]


@pytest.mark.parametrize("rule", ["sum", "pcgrad"])
def test_an_attempt_that_ran_out_of_memory_leaves_nothing_to_the_next(tmp_path, rule):
    class OutOfMemory(TrainerCallback):
        armed = True

        def on_substep_end(self, args, state, control, **kwargs):
            if self.armed:
                self.armed = False
                raise RuntimeError("CUDA out of memory.")

    options = {"gradient_accumulation_steps": 2, "conflict": rule, "max_steps": 2}
    smaller = make(llama(), two_roles(16, 16), tmp_path, [OutOfMemory()], **options, auto_find_batch_size=True)
    smaller.train()
    plain = make(llama(), two_roles(16, 16), tmp_path, **options, per_device_train_batch_size=7)
    plain.train()
    assert smaller._train_batch_size == 7
    assert same(weights(smaller.model), weights(plain.model))
    assert lines(smaller) == lines(plain)
