"""LUR inside the trainer, against double backward in float64 example by example, and what it must leave alone."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer_bed import (
    LORA,
    Gradients,
    Nudge,
    adapted,
    assert_resume_is_exact,
    by_hand,
    distance,
    exact,
    examples,
    lines,
    llama,
    make,
    nudged,
    ruled,
    same,
    two_roles,
    weights,
    windows,
)

from hf_clmul.gradients.active import active_rule
from hf_clmul.models import causal_lm
from hf_clmul.models.trainable import only_trainable
from hf_clmul.training import window_passes as module

TERMS = {"forget": {"npo": {"beta": 0.2}}, "retain": {"nll": {}}}
OTHER = {"retain": "forget", "forget": "retain"}
MODES = ("first_order", "cross", "exact")
either = pytest.mark.parametrize("first", ["retain", "forget"])


class Oracle:
    """Every gradient of the objective, in float64: `own` grad I(w), `outer` grad O(w'), `bent` H_I grad O(w') and `bent_other`
    H_O grad I at w, `crossed` grad I(w - alpha grad O(w')), `total` that of the objective; by role `outer_of` and `losses`,
    where it is looked at. O is the sum of all roles but the first."""

    def __init__(self, student, teacher, window, first, alpha, terms=TERMS):
        names = [name for name, p in student.named_parameters() if p.requires_grad]
        start = {name: p.detach().clone().requires_grad_() for name, p in student.named_parameters() if name in names}

        def loss(parameters, role):
            def model(ids):
                return functional_call(student, parameters, (ids,))

            means = by_hand(model, teacher, [row[role] for row in window], terms[role])
            return sum(terms[role][name].get("weight", 1.0) * value for name, value in means.items())

        def gradient(value, at, **options):
            return dict(zip(names, torch.autograd.grad(value, list(at.values()), **options), strict=True))

        others = [role for role in terms if role != first]

        def others_loss(parameters):
            return sum(loss(parameters, role) for role in others)

        with sdpa_kernel(SDPBackend.MATH):
            here = loss(start, first)
            slope = gradient(here, start, create_graph=True)
            moved = {name: (p - alpha * slope[name]).detach().requires_grad_() for name, p in start.items()}
            there = {role: loss(moved, role) for role in others}
            self.outer_of = {role: gradient(value, moved) for role, value in there.items()}
            self.outer = {name: sum(found[name] for found in self.outer_of.values()) for name in names}
            self.own = {name: g.detach() for name, g in slope.items()}
            self.bent = gradient(inner(slope, self.outer), start, retain_graph=True)
            together = here + others_loss({name: p - alpha * slope[name] for name, p in start.items()})
            self.total = gradient(together, start)
            other = gradient(others_loss(start), start, create_graph=True)
            self.bent_other = gradient(inner(other, self.own), start)
            back = {name: (p - alpha * self.outer[name]).detach().requires_grad_() for name, p in start.items()}
            self.crossed = gradient(loss(back, first), back)
        self.losses = {first: here.item()} | {role: value.item() for role, value in there.items()}


def inner(one, other):
    return sum((one[name] * other[name]).sum() for name in one)


def plus(one, other, times=1.0):
    return {name: one[name] + times * other[name] for name in one}


def roles_of(terms):
    return {role: {**two_roles(), "memory": examples(8, 5)}[role] for role in terms}


def step(tmp_path, mode, first="retain", alpha=0.01, build=llama, callbacks=(), terms=TERMS, **options):
    """(the trainer after one window, the gradient it gave to the optimizer, the model as it began, as it was nudged)."""
    start, saw = build(), Gradients()
    before = exact(start)
    ahead = {"inner": first, "mode": mode, "alpha": alpha}
    options = {"conflict": "sum", "lookahead": ahead, **terms, **options}
    trainer = make(start, roles_of(terms), tmp_path, [Nudge(), saw, *callbacks], **options)
    with only_trainable(trainer.model, trainer.args.trainable):
        student = exact(nudged(trainer.model))
    trainer.train()
    return trainer, saw.steps[0], before, student


def oracle_of(tmp_path, first="retain", alpha=0.01, build=llama, terms=TERMS, **options):
    trainer = make(build(), roles_of(terms), tmp_path, **terms, **options)
    window = windows(trainer, 8)[0]
    return Oracle(exact(nudged(trainer.model)), exact(build()), window, first, alpha, terms)


# ---- the gradient --------------------------------------------------------------------------------------------------


@either
@pytest.mark.parametrize("alpha", [0.1, 0.01])
def test_exact_is_double_backward(tmp_path, first, alpha):
    _, found, before, student = step(tmp_path, "exact", first, alpha)
    oracle = oracle_of(tmp_path, first, alpha)
    assert distance(found, oracle.total) < 5e-6
    assert distance(plus(oracle.own, oracle.outer), oracle.total) > 100 * 5e-6  # else the curvature would not matter
    assert distance(plus(plus(oracle.own, oracle.outer), oracle.bent, -alpha), oracle.total) < 1e-12


@either
def test_the_error_of_cross_falls_with_the_square_of_alpha(tmp_path, first):
    error = {}
    for alpha in (0.004, 0.001):
        found = step(tmp_path, "cross", first, alpha)[1]
        error[alpha] = distance(found, oracle_of(tmp_path, first, alpha).total)
    assert error[0.001] > 20 * 1e-6  # well above rounding
    assert 1.7 < math.log(error[0.004] / error[0.001], 4) < 2.3


@either
def test_first_order_keeps_half_of_the_regulariser(tmp_path, first):
    """What it leaves out is alpha H_I o; what it keeps is, to first order, alpha H_O i."""
    alpha = 0.001
    oracle = oracle_of(tmp_path, first, alpha)
    found = {mode: step(tmp_path, mode, first, alpha)[1] for mode in ("first_order", "exact")}
    assert distance(found["first_order"], plus(oracle.own, oracle.outer)) < 5e-6
    left_out = plus(found["first_order"], found["exact"], -1.0)
    assert distance(left_out, plus(oracle.bent, oracle.bent, alpha - 1)) < 5e-3
    plain = oracle_of(tmp_path, first, 1e-12)
    kept = plus(plus(oracle.own, oracle.outer), plus(plain.own, plain.outer), -1.0)
    assert distance(kept, {name: -alpha * h for name, h in oracle.bent_other.items()}) < 0.1


RULES = ["sum", "pcgrad_retain_first", "cagrad", "gru", "sago", {"pdu": {"start": 3.0, "warmup": 0.0}}]


@pytest.mark.parametrize("wanted", RULES, ids=str)
def test_rules_act_on_the_gradients_it_yields(tmp_path, wanted):
    _, found, *_ = step(tmp_path, "exact", conflict=wanted)
    oracle = oracle_of(tmp_path)
    of_role = {"forget": oracle.outer, "retain": plus(oracle.own, oracle.bent, -0.01)}
    tolerance = 1e-3 if wanted == "sago" else 5e-6  # a coordinate that rounds to the other sign of zero
    assert distance(found, ruled(wanted, of_role)) < tolerance


THREE = {**TERMS, "memory": {"nll": {"weight": 0.5}}}


@pytest.mark.parametrize("wanted", ["sum", "agem", "upgrad"])
@pytest.mark.parametrize("mode", MODES)
@either
def test_three_roles(tmp_path, first, mode, wanted):
    """The outer sum is that of both other roles, and the rule meets them in their order."""
    found = step(tmp_path, mode, first, 0.05, terms=THREE, conflict=wanted)[1]
    oracle = oracle_of(tmp_path, first, 0.05, terms=THREE)
    own = {"first_order": oracle.own, "cross": oracle.crossed, "exact": plus(oracle.own, oracle.bent, -0.05)}[mode]
    gradients = {**oracle.outer_of, first: own}
    assert distance(found, ruled(wanted, {role: gradients[role] for role in THREE})) < 5e-6
    if wanted == "sum" and mode == "exact":
        assert distance(found, oracle.total) < 5e-6


TEACHERS = {
    "adapter copied": (adapted, {}),
    "adapter switched off": (llama, {"peft_config": LORA}),
    "part kept": (llama, {"trainable": r".*(down_proj|q_proj)\.weight"}),
}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("mode", ["cross", "exact"])
def test_the_teacher_does_not_move(tmp_path, kind, mode):
    """Its answers are worked out while the weights are displaced."""
    build, options = TEACHERS[kind]
    terms = {"forget": {"npo": {"beta": 0.2}}, "retain": {"kl": {}, "nll": {"weight": 0.1}}}
    trainer, found, before, student = step(tmp_path, mode, alpha=1e-3, build=build, terms=terms, **options)
    oracle = Oracle(student, before, windows(trainer, 8)[0], "retain", 1e-3, terms)
    assert distance(found, oracle.total) < (2e-3 if mode == "cross" else 5e-6)


# ---- how windows come about ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_accumulation_changes_nothing(tmp_path, mode):
    """Answers are of 1 to 12 tokens: micro-batches count differently."""
    whole = step(tmp_path, mode)[1]
    parts = step(tmp_path, mode, per_device_train_batch_size=2, gradient_accumulation_steps=4)[1]
    assert distance(parts, whole) < 3e-6


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain = step(tmp_path, "cross", alpha=0.05)[1]
    assert distance(step(tmp_path, "cross", alpha=0.05, activation_checkpointing=True)[1], plain) < 1e-7


@either
def test_losses_are_logged_once_where_they_were_looked_at(tmp_path, first):
    trainer, *_ = step(tmp_path, "cross", first, alpha=0.1)
    oracle = oracle_of(tmp_path, first, 0.1)
    (logged,) = lines(trainer)
    assert logged["loss/forget/npo"] == pytest.approx(oracle.losses["forget"], rel=1e-5)
    assert logged["loss/retain/nll"] == pytest.approx(oracle.losses["retain"], rel=1e-5)
    assert logged["loss"] == pytest.approx(sum(oracle.losses.values()), rel=1e-5)
    apart = oracle_of(tmp_path, first, 1e-9).losses[OTHER[first]]
    assert abs(apart - oracle.losses[OTHER[first]]) > 1e-3 * abs(apart)


@pytest.mark.parametrize("build", [llama, adapted])
def test_resume_is_exact(tmp_path, build):
    options = {"lookahead": {"alpha": 0.05}, "max_steps": 5, "learning_rate": 1e-3, "conflict": "gru", **TERMS}
    assert_resume_is_exact(build(), tmp_path, (3,), **options)


@either
@pytest.mark.parametrize("mode", MODES)
def test_weights_come_back_after_a_pass_and_after_one_that_fails(tmp_path, monkeypatch, mode, first):
    trainer, *_ = step(tmp_path, mode, first, learning_rate=0.0)
    untouched = weights(nudged(llama()))
    assert same(weights(trainer.model), untouched)
    trainer = make(llama(), two_roles(), tmp_path, [Nudge()], lookahead={"inner": first, "mode": mode}, **TERMS)
    of_role, moved = trainer.role_loss, []

    def fails(model, role, *given, **named):
        if role == OTHER[first]:
            moved.append(not same(weights(trainer.model), untouched))
            raise MemoryError
        return of_role(model, role, *given, **named)

    monkeypatch.setattr(trainer, "role_loss", fails)
    with pytest.raises(MemoryError):
        trainer.train()
    assert moved == [True] and same(weights(trainer.model), untouched)


# ---- numbers of other kinds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["first_order", "cross"])
def test_a_loss_scale_changes_nothing(tmp_path, mode):
    """Trap 9: the inner step is divided by it."""
    after = []
    for scale in (None, 2.0**10):
        trainer = make(llama(), two_roles(16, 16), tmp_path, lookahead={"mode": mode, "alpha": 0.05}, max_steps=3,
                       learning_rate=0.01, **TERMS)  # fmt: skip
        if scale is not None:
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1)
        trainer.train()
        after.append(weights(trainer.model))
    assert trainer.accelerator.scaler.get_scale() == 2.0**13
    assert distance(*after) < 1e-7


@pytest.mark.parametrize("mode", ["first_order", "cross"])
def test_an_overflow_skips_the_step_and_is_no_collapse(tmp_path, mode):
    trainer = make(llama(), two_roles(), tmp_path, lookahead={"mode": mode}, change_steps=1, **TERMS)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.accelerator.optimizer_step_was_skipped and trainer.state.global_step == 1
    assert same(weights(trainer.model), before)
    assert not [name for name in lines(trainer)[0] if name.startswith(("change/", "plain_cosine/", "cosine/"))]


def test_bf16_autocast_runs(tmp_path):
    found = step(tmp_path, "cross", alpha=0.05, bf16=True)[1]
    assert 0 < distance(found, step(tmp_path, "cross", alpha=0.05)[1]) < 0.1
    assert {g.dtype for g in found.values()} == {torch.float32}


def logged_in_autocast(tmp_path, alpha):
    with torch.autocast("cpu", torch.bfloat16):  # a user's own, around everything: its cache of weights lives on
        return lines(step(tmp_path, "first_order", alpha=alpha)[0])[0]["loss/forget/npo"]


def test_displaced_weights_are_seen_inside_an_autocast_context(tmp_path, monkeypatch):
    """Trap 6."""
    there, here = (logged_in_autocast(tmp_path, alpha) for alpha in (0.5, 1e-9))
    assert abs(there - here) > 0.05 * abs(here)
    monkeypatch.setattr(causal_lm.torch, "clear_autocast_cache", lambda: None)
    stale = logged_in_autocast(tmp_path, 0.5)  # were it right, the line that clears the cache would not be needed
    assert abs(there - stale) > 0.05 * abs(here)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_exact_needs_math_attention_and_takes_it(tmp_path, monkeypatch):
    """Trap 18."""
    assert llama().config._attn_implementation == "sdpa"
    step(tmp_path, "exact")
    monkeypatch.setattr(module, "sdpa_kernel", lambda backend: nullcontext())
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product"):
        step(tmp_path, "exact")


def flash():
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


def half():
    return llama().to(torch.bfloat16)


REFUSED = {
    "weights rounded": (half, {}, "which bfloat16 weights round away: load the model in float32 and set bf16=True"),
    "fp16": (llama, {"mode": "exact", "fp16": True}, "neither a loss scaler (fp16) nor activation checkpointing allows: use mode"),
    "checkpointing": (llama, {"mode": "exact", "activation_checkpointing": True}, "nor activation checkpointing allows"),
    "flash": (flash, {"mode": "exact"}, "'flash_attention_2' has not: load the model with attn_implementation='eager'"),
    "turns": (llama, {"conflict": "alternate"}, "conflict='alternate' steps on one role at a time"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_a_remedy(tmp_path, kind):
    build, options, message = REFUSED[kind]
    options = dict(options)
    ahead = {"mode": options.pop("mode", "cross")}
    with pytest.raises(ValueError) as error:
        make(build(), two_roles(), tmp_path, lookahead=ahead, **options)
    assert message in str(error.value)


def test_bf16_weights_are_fine_where_only_a_float32_adapter_trains(tmp_path):
    make(half(), two_roles(), tmp_path, lookahead={}, peft_config=LORA)


def test_an_inner_role_must_have_data(tmp_path):
    roles = {"learn": examples(2, 0), "memory": examples(2, 1)}
    with pytest.raises(ValueError, match="lookahead.inner is 'retain', but the roles are learn, memory: leave"):
        make(llama(), roles, tmp_path, lookahead={})
    trainer = make(llama(), {"forget": examples(2, 0)}, tmp_path, lookahead={})  # one role, as for conflict rules
    assert trainer.lookahead is None


def test_deepspeed_and_ranks(tmp_path, monkeypatch):
    from hf_clmul.gradients.options import Lookahead
    from hf_clmul.training.refusals import _of_lookahead
    from hf_clmul.training_args import ClmulConfig

    args = ClmulConfig(str(tmp_path), use_cpu=True)
    args.deepspeed = {}
    monkeypatch.setattr(ClmulConfig, "world_size", 2)
    found = _of_lookahead(args, llama(), None, Lookahead(mode="exact"), active_rule("sum"), ["forget", "retain"])
    assert ["DeepSpeed does not hand out" in found[0], "DDP and FSDP do not pass on" in found[1]] == [True, True]
