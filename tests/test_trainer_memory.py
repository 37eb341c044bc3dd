"""The role `memory` in a trainer: beside learning and beside unlearning, under every conflict rule; what gamma weighs."""

import copy

import pytest
import torch
from torch.nn import functional as F
from trainer_bed import (
    Gradients,
    Nudge,
    answer,
    assert_resume_is_exact,
    distance,
    exact,
    examples,
    inner,
    lines,
    llama,
    make,
    nudged,
    role_gradients,
    ruled,
    same,
    two_roles,
    weights,
    windows,
)

from hf_clmul.gradients.active import active_rule
from hf_clmul.gradients.conflict import CONFLICT_RULES

THREE = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}, "memory": {"nll": {"weight": 0.5}, "kl": {}}}
LEARNING = {"learn": {"nll": {}}, "memory": {"nll": {}}}


def three_roles():
    """The memory shares some of what is to be forgotten, so that all roles conflict."""
    roles = two_roles()
    return {**roles, "memory": [*roles["forget"][4:6], *examples(3, 9)]}


def opposed():
    """To be learned: the memory's own prompts with other answers."""
    memory = examples(4, 9)
    turned = [{**row, "input_ids": [t if label < 0 else 64 - t for t, label in zip(row["input_ids"], row["labels"], strict=True)]}
              for row in memory]  # fmt: skip
    for row, new in zip(memory, turned, strict=True):
        new["labels"] = [
            -100 if label < 0 else token for token, label in zip(new["input_ids"], row["labels"], strict=True)
        ]
    return {"learn": [*turned, *examples(4, 2)], "memory": memory}


@pytest.mark.parametrize(
    "wanted", [*CONFLICT_RULES, {"agem": {"margin": 0.5}}, {"bisector": {"length": "imtl"}}], ids=str
)
def test_every_rule_takes_forget_retain_and_memory(tmp_path, wanted):
    start, saw = llama(), Gradients()
    before = exact(start)
    trainer = make(start, three_roles(), tmp_path, [Nudge(), saw], conflict=wanted, max_steps=1, **THREE)
    student = exact(nudged(trainer.model))
    trainer.train()
    by_role, losses = role_gradients(student, before, windows(trainer, 8)[0], THREE)
    assert list(by_role) == ["forget", "retain", "memory"]
    assert inner(by_role["forget"], by_role["memory"]) < 0 > inner(by_role["forget"], by_role["retain"])
    tolerance = 1e-3 if active_rule(wanted).name == "sago" else 1e-5
    assert distance(saw.steps[0], ruled(wanted, by_role)) < tolerance
    for name, value in losses.items():
        if not (wanted == "alternate" and name.startswith(("retain", "memory"))):  # their turn is the next window
            assert lines(trainer)[0][f"loss/{name}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("wanted", CONFLICT_RULES)
def test_every_rule_learns_beside_a_memory(tmp_path, wanted):
    trainer = make(llama(), opposed(), tmp_path, conflict=wanted, max_steps=3, learning_rate=1e-2, **LEARNING)
    before = weights(trainer.model)
    trainer.train()
    assert not same(weights(trainer.model), before) and list(trainer.terms) == ["learn", "memory"]


def test_agem_with_a_memory_is_a_gem(tmp_path):
    """g - <g, g_m> / <g_m, g_m> g_m where the two conflict, g alone where they do not (arXiv 1812.00420, equation 11), every
    example by itself in float64."""
    for roles, conflicts in ((opposed(), True), ({"learn": (rows := examples(8, 2)), "memory": rows}, False)):
        start, saw = llama(), Gradients()
        trainer = make(start, roles, tmp_path, [saw], conflict="agem", **LEARNING)
        student = exact(copy.deepcopy(start))
        trainer.train()
        found = {}
        for role in ("learn", "memory"):
            rights = [answer(student, row[role])[1] for row in windows(trainer, 8)[0]]
            loss = -torch.cat(rights).sum() / sum(right.numel() for right in rights)
            parameters = dict(student.named_parameters())
            found[role] = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        g, m = found.values()
        against = inner(g, m)
        assert (against < 0) == conflicts
        share = against / inner(m, m) if conflicts else 0.0
        expected = {name: g[name] - share * m[name] for name in g}
        assert distance(saw.steps[0], expected) < 1e-5
        after = inner(saw.steps[0], {name: value.float() for name, value in m.items()})
        assert after > -1e-5 * inner(m, m)  # the memory's loss does not rise, to first order


# ---- LwF ---------------------------------------------------------------------------------------------------------


def test_kl_on_what_is_learned_is_learning_without_forgetting(tmp_path):
    """Cross-entropy plus half of T^2 KL(teacher || student) at T = 2, the teacher being the model before."""
    start, saw = llama(), Gradients()
    terms = {"nll": {}, "kl": {"weight": 0.5, "temperature": 2.0}}
    trainer = make(start, {"learn": examples(8, 2)}, tmp_path, [Nudge(), saw], learn=terms)
    before, student = exact(start), exact(nudged(start))
    trainer.train()
    parts = {"nll": [], "kl": []}
    for row in windows(trainer, 8)[0]:
        ids, labels = torch.tensor(row["learn"]["input_ids"]), torch.tensor(row["learn"]["labels"][1:])
        own, old = (model(ids[None]).logits[0, :-1][labels >= 0] for model in (student, before))
        parts["nll"].append(F.cross_entropy(own, labels[labels >= 0], reduction="none"))
        parts["kl"].append(
            4 * F.kl_div(F.log_softmax(own / 2, -1), F.softmax(old.detach() / 2, -1), reduction="none").sum(-1)
        )
    nll, kl = (torch.cat(values).mean() for values in parts.values())
    assert lines(trainer)[0]["loss/learn/kl"] == pytest.approx(float(kl), rel=1e-5)
    assert lines(trainer)[0]["loss/learn/nll"] == pytest.approx(float(nll), rel=1e-5)
    parameters = dict(student.named_parameters())
    expected = torch.autograd.grad(nll + 0.5 * kl, list(parameters.values()))
    assert distance(saw.steps[0], dict(zip(parameters, expected, strict=True))) < 1e-5


# ---- gamma -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.3, 0.0, 1.0])
def test_gamma_weighs_forgetting_against_all_else(tmp_path, gamma):
    start, saw = llama(), Gradients()
    before = exact(start)
    trainer = make(start, three_roles(), tmp_path, [Nudge(), saw], conflict="sum", gamma=gamma, **THREE)
    student = exact(nudged(trainer.model))
    trainer.train()
    f, r, m = role_gradients(student, before, windows(trainer, 8)[0], THREE)[0].values()
    expected = {name: (1 - gamma) * f[name] + gamma * (r[name] + m[name]) for name in f}
    assert distance(saw.steps[0], expected) < 1e-5
    weighed = {role: [active.weight for active in terms] for role, terms in trainer.terms.items()}
    assert weighed == {"forget": [1 - gamma], "retain": [gamma], "memory": [0.5 * gamma, gamma]}


def test_gamma_acts_before_the_rule(tmp_path):
    trainer = make(llama(), two_roles(), tmp_path, [Nudge()], gamma=0.25, retain="nll")
    plain = make(llama(), two_roles(), tmp_path, [Nudge()], retain="nll")
    trainer.train(), plain.train()
    for role, share in (("forget", 0.75), ("retain", 0.25)):
        one, other = (lines(t)[0][f"grad_norm/{role}"] for t in (trainer, plain))
        assert one == pytest.approx(share * other, rel=1e-5)
        term = next(iter(trainer.terms[role])).name  # losses are logged without weights
        assert lines(trainer)[0][f"loss/{role}/{term}"] == lines(plain)[0][f"loss/{role}/{term}"]


def test_gamma_without_two_sides_is_refused(tmp_path):
    with pytest.raises(ValueError, match="gamma weighs .*, and there is no other role: leave gamma out, or give data"):
        make(llama(), two_roles(), tmp_path, gamma=0.5, retain={})
    with pytest.raises(ValueError, match="gamma weighs .*, but train_dataset has no `forget`: leave gamma out"):
        make(llama(), opposed(), tmp_path, gamma=0.5, **LEARNING)
    make(llama(), {"forget": examples(4, 0), "memory": examples(4, 1)}, tmp_path, gamma=0.5)


# ---- UniCLUN, whole ----------------------------------------------------------------------------------------------


def test_all_of_controlled_distillation_at_once_resumes_exactly(tmp_path):
    options = {"forget": {"bad_teacher": {}}, "retain": {"contrastive_distill": {"weight": 0.1}, "confident_mse": {"weight": 0.1},
               "nll": {"weight": 0.5}}, "gamma": 0.5, "teacher": {"ema": {"probability": 0.5}}, "conflict": "sum"}  # fmt: skip
    trainer = assert_resume_is_exact(llama(), tmp_path, (3,), max_steps=5, learning_rate=1e-2, **options)
    assert {"loss/forget/bad_teacher", "loss/retain/contrastive_distill", "loss/retain/confident_mse"} <= lines(
        trainer
    )[4].keys()
