"""Terms against golden values: losses and gradient norms of the authors' formulas, recorded beside the repository."""

import json

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_clmul.data.collation import RoleCollator
from hf_clmul.models import causal_lm
from hf_clmul.objectives import TERMS, representation
from hf_clmul.objectives.active import active_terms, layers, needs

GOLDEN = {
    **{name: name for name in ("grad_ascent", "npo", "simnpo", "wga", "satimp", "ce_u", "undial")},
    **{"idk": "dpo", "dpo": "dpo", "altpo": "dpo", "rmu": "rmu_forget", "hidden_mse": "rmu_retain"},
}
NAMES = {
    "steering_coeff": "steering_coefficient",
    "ignore_first_n_answer_tokens": "ignore_first_n",
}  # theirs: ours


def unpadded(batch):
    rows = zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    return [{"input_ids": ids[: sum(mask)], "labels": labels[: sum(mask)]} for ids, mask, labels in rows]


def wholly_supervised(example):
    """One more token lets every position predict something; no state before it sees it."""
    return {"input_ids": [*example["input_ids"], 1], "labels": [-100, *example["input_ids"][1:], 1]}


@pytest.mark.parametrize(("name", "golden"), GOLDEN.items())
def test_golden_value_and_gradient_norm(name, golden, shared, monkeypatch):
    folder = shared / "golden/llm_losses"
    record = json.loads((folder / "golden.json").read_text())
    expected = record["expected"][golden]
    student, teacher = (
        LlamaForCausalLM.from_pretrained(folder / who, dtype=torch.float64).eval() for who in ("student", "teacher")
    )
    parameters = {NAMES.get(key, key): value for key, value in expected["params"].items()}
    if scaled := parameters.pop("control_vector", None):  # theirs holds c u
        direction = torch.tensor(scaled) / parameters["steering_coefficient"]
        monkeypatch.setattr(representation, "random_direction", lambda like, seed: direction)
    examples = unpadded(record["batches"][expected["batch"].split()[0]])
    if "every position" in expected["batch"]:
        examples = [wholly_supervised(example) for example in examples]
    if "alternative" in TERMS[name].needs:
        refusals = unpadded(record["batches"]["alternate"])
        examples = [{**example, "alternative": r} for example, r in zip(examples, refusals, strict=True)]
    (active,) = terms = active_terms(TERMS[name].roles[0], {name: parameters})
    batch, accepted = RoleCollator(0).collate(examples), causal_lm.accepted_inputs(student)
    own, targets = (
        causal_lm.predict(model, batch, needs(terms), accepted, layers(terms)) for model in (student, teacher)
    )
    value, count = active.term.function(own, targets, **active.parameters)
    (value / count).backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    assert (value / count).item() == pytest.approx(expected["loss"], rel=1e-6)
    assert norm.item() == pytest.approx(expected["grad_norm"], rel=1e-6)
