"""The harness is not installed for the tests: a stand-in checks what we hand it and how we read what it returns."""

import logging
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from hf_clmul.errors import RunError
from hf_clmul.evaluation.lm_eval import lm_eval

RESULTS = {
    "results": {
        "wmdp": {"alias": "wmdp", "acc,none": 0.25, "acc_stderr,none": 0.05},
        "wmdp_bio": {"alias": " - bio", "acc,none": 0.5, "acc_stderr,none": 0.1,
                     "acc_norm,none": 0.75, "acc_norm_stderr,none": "N/A"},
        "wmdp_cyber": {"alias": " - cyber", "acc,none": 0.0, "acc_stderr,none": 0.0},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.01,
                  "exact_match,flexible-extract": 0.2, "exact_match_stderr,flexible-extract": 0.02},
    },
    "group_subtasks": {"wmdp": ["wmdp_bio", "wmdp_cyber"]},
    "n-samples": {"wmdp_bio": {"original": 1273, "effective": 20}, "wmdp_cyber": {"original": 1987, "effective": 30},
                  "gsm8k": {"original": 1319, "effective": 1319}},
    "n-shot": {"wmdp_bio": 0, "wmdp_cyber": 0, "gsm8k": 5},
    "versions": {"wmdp": 1, "wmdp_bio": 1, "wmdp_cyber": 1, "gsm8k": 3.0},
}  # fmt: skip


class Harness:
    def __init__(self):
        self.asked, self.results = None, RESULTS

    def wrap(self, **arguments):
        return arguments

    def simple_evaluate(self, **arguments):
        self.asked = arguments
        arguments["model"]["pretrained"].eval()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(arguments["random_seed"])
        if isinstance(self.results, Exception):
            raise self.results
        return self.results


@pytest.fixture
def harness(monkeypatch):
    fake = Harness()
    names = ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    modules = {name: ModuleType(name) for name in names}
    modules["lm_eval"].simple_evaluate = fake.simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = fake.wrap
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fake


TASKS = ["wmdp", "gsm8k"]


def test_what_the_harness_is_asked(harness):
    model = tiny_llama()
    lm_eval(model, "tokenizer", TASKS, num_fewshot=2, batch_size=3, apply_chat_template=True, seed=7)
    assert harness.asked == {
        "model": {"pretrained": model, "tokenizer": "tokenizer", "batch_size": 3}, "tasks": TASKS, "num_fewshot": 2,
        "limit": None, "apply_chat_template": True, "log_samples": False, "random_seed": 7, "numpy_random_seed": 7,
        "torch_random_seed": 7, "fewshot_random_seed": 7,
    }  # fmt: skip


def test_the_record_has_counts_errors_shots_and_versions(harness):
    found = lm_eval(tiny_llama(), None, TASKS)
    assert found["tasks"]["wmdp_bio"] == {
        "metrics": {
            "acc": {"value": 0.5, "n": 20, "stderr": 0.1,
                    "low": pytest.approx(0.304, abs=1e-4), "high": pytest.approx(0.696, abs=1e-4)},
            "acc_norm": {"value": 0.75, "n": 20, "stderr": None, "low": None, "high": None},
        },
        "n_shot": 0,
        "version": 1,
    }  # fmt: skip
    group = found["tasks"]["wmdp"]
    assert (group["metrics"]["acc"]["value"], group["metrics"]["acc"]["n"], group["n_shot"]) == (0.25, 50, None)
    two = found["tasks"]["gsm8k"]["metrics"]
    assert {name: (m["value"], m["stderr"]) for name, m in two.items()} == {
        "exact_match/strict-match": (0.1, 0.01), "exact_match/flexible-extract": (0.2, 0.02)
    }  # fmt: skip
    assert {key: found[key] for key in ("limit", "num_fewshot", "seed")} == {
        "limit": None,
        "num_fewshot": None,
        "seed": 0,
    }
    assert set(found["versions"]) == {"lm_eval"}


def test_a_limit_is_warned_about_and_recorded(harness, caplog):
    with caplog.at_level(logging.WARNING, "hf_clmul"):
        assert lm_eval(tiny_llama(), None, TASKS)["limit"] is None
        assert caplog.text == ""
        assert lm_eval(tiny_llama(), None, TASKS, limit=20)["limit"] == 20 == harness.asked["limit"]
    assert "ONLY THE FIRST 20 EXAMPLES" in caplog.text


def test_model_and_random_states_are_left_alone(harness):
    model = tiny_llama().train()
    model.model.norm.eval()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    lm_eval(model, None, TASKS)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
    assert model.training and not model.model.norm.training


def test_without_the_harness_the_pip_line_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RunError, match=r'Install it: pip install "hf_clmul\[lm-eval\]"'):
        lm_eval(tiny_llama(), None, TASKS)


def test_names_that_the_harness_does_not_know(harness):
    with pytest.raises(RunError, match="no tasks are named"):
        lm_eval(tiny_llama(), None, [])
    with pytest.raises(RunError, match="returned nothing for mmlu"):
        lm_eval(tiny_llama(), None, ["mmlu", "wmdp"])
    harness.results = KeyError("mmluu")
    with pytest.raises(RunError, match="the harness refuses mmluu"):
        lm_eval(tiny_llama(), None, ["mmluu"])


def test_other_ranks_get_no_record(harness):
    harness.results = None
    assert lm_eval(tiny_llama(), None, TASKS) is None


def test_the_extra_is_in_the_package(repo):
    assert '"lm-eval": LM_EVAL' in (repo / "setup.py").read_text(encoding="utf-8")
