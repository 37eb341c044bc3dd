"""Every term of language models, against numbers worked out by hand, and the table of all. Golden values stand in
test_objectives_golden.py; terms of denoisers in test_denoising_terms.py.

The tests run over TERMS, so that a new term is caught: it needs a line in HAND.
"""

import inspect
import subprocess
import sys
from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch.nn import functional as F

from hf_clmul.models import FAMILIES
from hf_clmul.objectives import ALTERNATIVES, ROLES, TERMS, contrast, representation, term_parameters, terms_of
from hf_clmul.objectives.active import OUTPUTS, VARIANTS, active_terms
from hf_clmul.objectives.counts import COUNTS
from hf_clmul.objectives.prediction import Prediction, Top
from hf_clmul.objectives.preference import log_sigmoid
from hf_clmul.objectives.preparation import Generated

OTHERS = {
    *ALTERNATIVES,
    *VARIANTS,
    "apartness",
    "teacher",
    "incompetent",
    "alternative",
    "contexts",
    "reinforced",
    "classes",
    "stored",
    "keys_values",
    "image",
}
EMPTY = inspect.Parameter.empty
LOSSES = [name for name, term in terms_of("causal_lm").items() if not term.edit]
every_term, every_loss = (pytest.mark.parametrize("name", names) for names in (TERMS, LOSSES))


# ---- by hand -----------------------------------------------------------------------------------------------


def sequences(rows, probabilities, alternative=None):
    """A prediction from the probabilities of the right tokens."""
    logps = torch.tensor(probabilities, dtype=torch.float64).log()
    return Prediction(torch.tensor(rows), max(rows) + 1, logps, None, alternative)


def distributions(probabilities, rows=None, targets=None):
    """A prediction from whole distributions; logits are log-probabilities plus any constant."""
    return from_logits((torch.tensor(probabilities, dtype=torch.float64).log() + 3.0).tolist(), rows, targets)


def from_logits(logits, rows=None, targets=None):
    rows = torch.tensor(rows or range(len(logits)))
    targets = None if targets is None else torch.tensor(targets)
    return Prediction(rows, int(rows.max()) + 1, logits=torch.tensor(logits, dtype=torch.float64), targets=targets)


def states(hidden, layer=representation.ZEPHYR, rows=None, classes=None):
    rows = torch.arange(len(hidden)) if rows is None else torch.tensor(rows)
    classes = None if classes is None else torch.tensor(classes)
    hidden = {layer: torch.tensor(hidden, dtype=torch.float64)}
    return Prediction(rows, int(rows.max()) + 1, hidden=hidden, classes=classes)


def signed(numbers, rows=None, classes=None):
    """States of one number: of whatever projection, features are a vector u or -u, and products 1 or -1."""
    return states([[x] for x in numbers], contrast.DEEP, rows, classes)


def top(ids, probabilities, rest):
    """A teacher of whom its likeliest tokens are known, and what is left to the others."""
    q, tail = (torch.tensor(values, dtype=torch.float64).log() for values in (probabilities, rest))
    return Prediction(torch.arange(len(ids)), len(ids), top=Top(torch.tensor(ids), q, tail))


# Two answers: of two tokens, with probability 1/2 * 1/4 = 1/8 (teacher: 1/4), and of one token, 1/8 (teacher:
# 1/2). The gains log p - log p_teacher are -log 2 and -log 4.
STUDENT, TEACHER = sequences([0, 0, 1], [1 / 2, 1 / 4, 1 / 8]), sequences([0, 0, 1], [1 / 2, 1 / 2, 1 / 2])
# Refusals: probability 1/2 (teacher: 1/8) and 1/4 (teacher: 1/4). Their gains are log 4 and 0.
REFUSING = sequences([0, 0, 1], [1 / 2, 1 / 4, 1 / 8], sequences([0, 1], [1 / 2, 1 / 4]))
TEACHER_REFUSING = sequences([0, 0, 1], [1 / 2, 1 / 2, 1 / 2], sequences([0, 1], [1 / 8, 1 / 4]))
Q, P = distributions([[1 / 4, 3 / 4], [1 / 4, 3 / 4]]), distributions([[1 / 2, 1 / 2], [3 / 4, 1 / 4]])
THIRDS, LOPSIDED = [1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 4, 1 / 4]
# Answers of two tokens and of one; the right tokens have probability 1/3, 1/2 and 1/4.
WORDS = distributions([THIRDS, LOPSIDED, LOPSIDED], [0, 0, 1], [1, 0, 2])
FLAT, LEANING = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
# Divergence of (1/4, 3/4) from a flat distribution: 1/4 log 1/2 + 3/4 log 3/2
LEAN = 0.75 * log(3) - log(2)
# A teacher that finds both tokens alike; as a novice (3/4, 1/4), as an expert (1/4, 3/4)
GUIDED = replace(
    distributions([FLAT]), variants={"novice": distributions([[3 / 4, 1 / 4]]), "expert": distributions([LEANING])}
)
# At this temperature e^(1/t) is 3^(1/2): a candidate of the anchor's sign is three times as likely as one of the other.
# 1/2 times log^2 2 / 3, and 1/4 times (3 - log 2)^2 / 3
CONFIDENT = log(2) ** 2 / 6 + (3 - log(2)) ** 2 / 12, 2
THREEFOLD = {"temperature": 2 / log(3)}
# -log sigmoid(log k) = log(1 + 1/k) turns every sigmoid into a logarithm of a simple number.
HAND = {
    # log 2 + log 4 + log 8
    "nll": [({}, STUDENT, None, 6 * log(2), 3)],
    # (1/2 log 2 + 1/2 log(2/3)) + (3/4 log 3 + 1/4 log(1/3)) = 1/2 log(4/3) + 1/2 log 3; reversed 0.68
    "kl": [
        ({}, Q, P, log(2), 2),
        ({"direction": "forward"}, Q, P, log(2), 2),
        # (1/4 log 1/2 + 3/4 log 3/2) + (1/4 log 1/3 + 3/4 log 3)
        ({"direction": "reverse"}, Q, P, 1.25 * log(3) - log(2), 2),
        # At temperature 2 odds of 1 to 9 are 1 to 3: four times the divergence of (1/2, 1/2) from (1/4, 3/4)
        ({"temperature": 2.0}, distributions([[1 / 10, 9 / 10]]), distributions([FLAT]), 2 * log(4 / 3), 1),
        (
            {"temperature": 2.0, "direction": "reverse"},
            distributions([[1 / 10, 9 / 10]]),
            distributions([FLAT]),
            4 * LEAN,
            1,
        ),
    ],
    # Halfway between (1/4, 3/4) and (3/4, 1/4) lies a flat one; the second pair is equal.
    "js": [({}, distributions([LEANING, FLAT]), distributions([[3 / 4, 1 / 4], FLAT]), LEAN, 2)],
    # (0 + 4 + 0) / 3 + (1 + 1 + 4) / 3
    "logit_mse": [({}, from_logits([[1, 2, 3], [0, 0, 0]]), from_logits([[1, 0, 3], [1, 1, -2]]), 10 / 3, 2)],
    # As above, with 1/2 and 1/4 for the right token; at rho 1/2 odds of 2 to 1 to 1 are 4 to 1 to 1.
    "confident_mse": [
        ({}, from_logits([[0, 0, 0], [3, 0, 0]], targets=[0, 2]), from_logits([[log(2), 0, 0]] * 2), *CONFIDENT),
        ({"rho": 0.5}, from_logits([[log(2) + 3, 0, 0]], targets=[0]), from_logits([[log(2), 0, 0]]), 4 / 6 * 9 / 3, 1),
    ],
    "contrastive_distill": [
        # The first finds its like (3 to 1), the second a stranger in its own place (1 to 3).
        (THREEFOLD, signed([1, -2]), signed([3, 1]), log(4 / 3) + log(4), 2),
        # The default 0.07: log(1 + e^(-2/0.07)) and the like
        ({}, signed([1, -2]), signed([3, 1]), log(1 + exp(-2 / 0.07)) + log(1 + exp(2 / 0.07)), 2),
        # Means over tokens, +1, -1 and +1, as no one token has them. The first and the last are of one class, the student's
        # +, -, + is to the teacher's +, +, -: (3, 1, 3) / 7, (3, 1, 3) / 7 and (1, 3, 1) / 5; positives {0, 2}, {1}, {0, 2}.
        (
            THREEFOLD,
            signed([-1, 3, 1, -3, 3, -1], [0, 0, 1, 1, 2, 2], [4, 7, 4]),
            signed([2, 2, 5, 5, -1, -1], [0, 0, 1, 1, 2, 2]),
            log(7 / 3) + log(7) + log(5),
            3,
        ),
        # Two without a class are no class.
        (THREEFOLD, signed([1, -2], classes=[-1, -1]), signed([3, -1]), 2 * log(4 / 3), 2),
    ],
    "sup_con": [
        # +, +, -, -, of which the second and third are of a class, the others alone: from the second the third is 1 to 3 to 1
        # (of the first and the last), from the third 1 to 1 to 3.
        (THREEFOLD, signed([1, 2, -1, -5], classes=[0, 1, 1, 2]), None, 2 * log(5), 4),
        # Three of a class, +, +, -: 3 to 1, so log(4/3) and log 4 on average; from the third both are alike, log 2.
        (THREEFOLD, signed([1, 2, -1], classes=[1, 1, 1]), None, log(16 / 3) + log(2), 3),
        # Nobody has company.
        ({}, signed([1, 2, -1], classes=[0, 1, 2]), None, 0.0, 3),
        ({}, signed([1]), None, 0.0, 1),
        # The default 0.07, beside a stranger on the other side
        ({}, signed([1, 2, -1], classes=[1, 1, 0]), None, 2 * log(1 + exp(-2 / 0.07)), 3),
    ],
    "der": [
        # 1/2 log 2 + 1/2 log((1/2) / (3/4)), then twice the same token by token: 0
        ({}, distributions([[1 / 4, 1 / 4, 1 / 2]]), top([[1]], [[1 / 2]], [1 / 2]), log(4 / 3) / 2, 1),
        (
            {},
            distributions([LOPSIDED, THIRDS]),
            top([[0, 2], [2, 1]], [[1 / 2, 1 / 4], [1 / 3, 1 / 3]], [1 / 4, 1 / 3]),
            0,
            2,
        ),
        # Nothing is left to the others: log 4. Every token is known: what `kl` gives for P and Q, in another order.
        ({}, distributions([[1 / 4, 1 / 4, 1 / 2]]), top([[0]], [[1]], [0]), log(4), 1),
        ({}, Q, top([[1, 0], [0, 1]], [[1 / 2, 1 / 2], [3 / 4, 1 / 4]], [0, 0]), log(2), 2),
    ],
    "hidden_mse": [
        # (0 + 4) / 2 + (9 + 16) / 2
        ({}, states([[1, 2], [3, 4]]), states([[1, 0], [0, 0]]), 14.5, 2),
        ({"layer": 1}, states([[3, 4]], 1), states([[0, 0]], 1), 12.5, 1),
    ],
    # log(answer / refusal): -log 4 and -log 2
    "answer_preservation": [
        ({"beta": 1.0}, REFUSING, None, log(5) + log(3), 2),
        ({"beta": 0.5}, REFUSING, None, 2 * log(3) + 2 * log(1 + 2**0.5), 2),
        ({}, REFUSING, None, 10 * log(1 + 4**0.1) + 10 * log(1 + 2**0.1), 2),
    ],
    "grad_ascent": [({}, STUDENT, None, -6 * log(2), 3)],
    "wga": [
        # (1/2 + 2/4 + 3/8) log 2, or with squared weights (1/4 + 2/16 + 3/64) log 2
        ({}, STUDENT, None, -1.375 * log(2), 3),
        ({"beta": 2.0}, STUDENT, None, -27 / 64 * log(2), 3),
        ({"beta": 0.0}, STUDENT, None, -6 * log(2), 3),
    ],
    "satimp": [
        # (1/2 1/2 + 1/4 3/4 2 + 1/8 7/8 3) log 2
        ({"beta1": 1.0, "beta2": 1.0}, STUDENT, None, -61 / 64 * log(2), 3),
        ({}, STUDENT, None, -(2**-6 + 6 / 4**6 + 21 / 8**6) * log(2), 3),
        ({"beta1": 0.0, "beta2": 2.0}, STUDENT, None, -(1 / 4 + 18 / 16 + 147 / 64) * log(2), 3),
    ],
    "npo": [
        # 2 log(1 + 1/2) + 2 log(1 + 1/4)
        ({"beta": 1.0}, STUDENT, TEACHER, 1.2572173188447483, 2),
        # 4 log(1 + 2^-0.5) + 4 log(1 + 4^-0.5)
        ({"beta": 0.5}, STUDENT, TEACHER, 4 * log(1 + 0.5**0.5) + 4 * log(1.5), 2),
        # nothing gained yet: (2 / 0.1) log 2 for each of two answers; 0.1 is the default
        ({}, TEACHER, TEACHER, 40 * log(2), 2),
    ],
    "simnpo": [
        # mean nll: 1.5 log 2 and 3 log 2; 2 log(1 + 2^-1.5) + 2 log(1 + 1/8)
        ({"beta": 1.0}, STUDENT, None, 2 * log(1 + 0.5**1.5) + 2 * log(1.125), 2),
        # delta = log 2 leaves 0.5 log 2 and 2 log 2
        ({"beta": 1.0, "delta": log(2)}, STUDENT, None, 2 * log(1 + 0.5**0.5) + 2 * log(1.25), 2),
        # beta 4.5 is the default: 2 / 4.5 (log(1 + 2^-6.75) + log(1 + 2^-13.5))
        ({}, STUDENT, None, 2 / 4.5 * (log(1 + 0.5**6.75) + log(1 + 0.5**13.5)), 2),
    ],
    # gain of the refusal less gain of the answer: log 8 and log 4
    "idk": [
        ({"beta": 1.0}, REFUSING, TEACHER_REFUSING, 2 * log(1.125) + 2 * log(1.25), 2),
        # nothing gained yet, as for npo
        ({}, REFUSING, REFUSING, 40 * log(2), 2),
    ],
    # The same with another second answer
    "dpo": [({"beta": 1.0}, REFUSING, TEACHER_REFUSING, 2 * log(1.125) + 2 * log(1.25), 2)],
    # 20 (log(1 + 8^-0.1) + log(1 + 4^-0.1)); 0.1 is the default
    "altpo": [({}, REFUSING, TEACHER_REFUSING, 20 * (log(1 + 8**-0.1) + log(1 + 4**-0.1)), 2)],
    # log 2 + log 4
    "idk_nll": [({}, REFUSING, None, 3 * log(2), 2)],
    # (1/2, 1/2) and (1, 0) meet in (3/4, 1/4): 1/2 log 4/3 + 1/2 (1/2 log 2/3 + 1/2 log 2).
    # A refusal with probability 1/4 meets it in 5/8: 1/2 log 8/5 + 1/2 (1/4 log 2/5 + 3/4 log 2)
    "jensun": [({}, REFUSING, None, 0.75 * log(4 / 3) + 2 * log(2) - 0.625 * log(5), 2)],
    # They meet in (3/8, 5/8): 1/2 (1/4 log 2/3 + 3/4 log 6/5) + 1/2 (1/2 log 4/3 + 1/2 log 4/5)
    "jensun_uniform": [
        (
            {},
            distributions([LEANING, FLAT]),
            None,
            (log(2 / 3) + 3 * log(6 / 5)) / 8 + (log(4 / 3) + log(4 / 5)) / 4,
            2,
        )
    ],
    "max_entropy": [({}, distributions([LEANING, FLAT]), None, LEAN, 2)],
    # Without the right token: (1/2, 0, 1/2), (0, 1/2, 1/2) and (2/3, 1/3, 0)
    "ce_u": [
        ({}, WORDS, None, 2 * log(2), 1),
        ({"ignore_first_n": 0}, WORDS, None, log(3) + 2 * log(2) + 4 / 3 * log(2), 3),
        ({"ignore_first_n": 2}, WORDS, None, 0.0, 0),
    ],
    # 1 + 1/3 - 1/3, 1 + 1/2 - 1/4 and 1 + 1/4 - 1/2
    "inverted_hinge": [({}, WORDS, None, 3.0, 3)],
    # (3 - 2)^2 + (0 - 0)^2 + (5 - 1)^2
    "logit_margin": [({}, from_logits([[1, 2, 3], [0, 0, 0], [-1, -1, 5]]), None, 17.0, 3)],
    "undial": [
        # A right token of 1/2, lowered by log 2, leaves thirds: 1/3 log 3 each where the student has
        # thirds, and 1/3 (log 2 + log 4 + log 4) where it does not.
        (
            {"beta": log(2)},
            distributions([THIRDS, LOPSIDED], targets=[0, 0]),
            distributions([LOPSIDED, LOPSIDED]),
            log(3) + 5 / 3 * log(2),
            2,
        ),
        # By e^10, the default, it is nearly gone: k = 2 / e^10 to 1 to 1.
        (
            {},
            distributions([LOPSIDED], targets=[0]),
            distributions([LOPSIDED]),
            (2 * exp(-10) * log(2) + 4 * log(2)) / (2 * exp(-10) + 2),
            1,
        ),
    ],
    # 1/2 log 2 + 1/2 log 2/3
    "bad_teacher": [({}, distributions([LEANING, FLAT]), distributions([FLAT, FLAT]), log(4 / 3) / 2, 2)],
    "elm": [
        # A flat teacher times 3 to 1/3 is (9/10, 1/10): 9/10 log 4 + 1/10 log 4/3
        ({"eta": 1.0}, distributions([LEANING]), GUIDED, log(4) - 0.1 * log(3), 1),
        ({"eta": 0.0}, distributions([LEANING]), GUIDED, log(4) - 0.5 * log(3), 1),
        # By 3^1000, the default, nothing but the novice's token is left.
        ({}, distributions([LEANING]), GUIDED, log(4), 1),
    ],
    "scrub": [({}, Q, P, -log(2), 2)],
    "whp": [
        # The first logit rose by 2, the second by 1, the third fell: -6, -4 and 2 are left, e^-8 to e^-6 to 1.
        (
            {"alpha": 5.0},
            distributions([LOPSIDED]),
            replace(from_logits([[4, 1, 2]]), variants={"reinforced": from_logits([[6, 2, 1]])}),
            log(4) - log(2) * exp(-8) / (exp(-8) + exp(-6) + 1),
            1,
        ),
        # 5 is the default; (log 8, 0, 0) less 5 log 2 for the first is (log 1/4, 0, 0): (1/9, 4/9, 4/9)
        (
            {},
            distributions([LOPSIDED]),
            replace(from_logits([[log(8), 0, 0]]), variants={"reinforced": from_logits([[log(16), -1, 0]])}),
            log(2) / 9 + 8 / 9 * log(4),
            1,
        ),
        # The teacher itself: 1/2 log 4 + 1/2 log 4/3
        (
            {"alpha": 0.0},
            distributions([LEANING]),
            replace(GUIDED, variants={"reinforced": GUIDED}),
            log(4) - 0.5 * log(3),
            1,
        ),
    ],
    "rmu": [
        # A unit vector of one positive number is 1: (1 - 6.5)^2 + (3 - 6.5)^2; 6.5 is the default
        ({}, states([[1], [3]]), None, 42.5, 2),
        ({"steering_coefficient": 2.0, "layer": 0}, states([[1], [3]], 0), None, 2.0, 2),
        # From the origin to c u: c^2 / H, whatever the direction
        ({"steering_coefficient": 3.0, "seed": 7}, states([[0, 0, 0]]), None, 3.0, 1),
    ],
}


def test_every_term_has_a_value_worked_out_by_hand():
    assert set(HAND) == set(LOSSES)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in HAND.items() for case in cases])
def test_value_by_hand(name, case):
    parameters, student, teacher, expected, count = case
    value, counted = TERMS[name].function(student, teacher, **parameters)
    assert (value.item(), counted) == (pytest.approx(expected, rel=1e-12, abs=1e-15), count)


def test_log_sigmoid_keeps_its_value_and_slope_where_exp_overflows():
    x = torch.tensor([-1e4, -50.0, -1.0, 0.0, 1.0, 50.0, 1e4], requires_grad=True)
    (slope,) = torch.autograd.grad(log_sigmoid(x).sum(), x)
    torch.testing.assert_close(log_sigmoid(x), F.logsigmoid(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, torch.sigmoid(-x.detach()), rtol=1e-5, atol=1e-30)


# ---- the table ---------------------------------------------------------------------------------------------


@every_term
def test_entry_of_the_table(name):
    term = TERMS[name]
    assert term.roles and set(term.roles) <= set(ROLES)
    assert (term.unit in COUNTS) != term.edit and term.family in FAMILIES
    assert ("output" in term.needs) == (term.unit == "samples") == (term.family == "diffusion" and not term.edit)
    assert term.needs <= OTHERS | OUTPUTS and bool(term.needs & OUTPUTS) != term.edit
    assert len(term.needs & set(ALTERNATIVES)) == ("alternative" in term.needs), "one source of second answers"
    assert not {"teacher", "incompetent"} <= term.needs
    assert not term.coupled or term.unit == "sequences"
    assert ("hidden" in term.needs) == ("layer" in term_parameters(name))
    assert term.paper and term.summary
    for parameter, (annotation, default) in term_parameters(name).items():
        assert parameter != "weight", "every term has a weight already"
        assert EMPTY not in (annotation, default), f"{parameter} needs an annotation and a default"


def test_a_task_vector_is_taken_back():
    before, reinforced = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.5, 2.0], [2.0, 8.0]])
    assert TERMS["task_vector"].function(before, reinforced).tolist() == [[0.5, 2.0], [4.0, 0.0]]  # 1 is the default
    assert TERMS["task_vector"].function(before, reinforced, scale=0.5).tolist() == [[0.75, 2.0], [3.5, 2.0]]


@every_term
def test_row_in_the_page_of_methods(name, repo):
    page = (repo / "docs/methods.md").read_text().splitlines()
    (row,) = (line for line in page if line.startswith(f"| `{name}` |"))
    assert TERMS[name].paper.removeprefix("arXiv ") in row or "as `jensun`" in row


def test_parameters_are_read_from_the_function():
    assert [(k, d) for k, (_, d) in term_parameters("simnpo").items()] == [("beta", 4.5), ("delta", 0.0)]
    assert term_parameters("nll") == {}
    # Those of what is made before training do not reach the loss.
    assert [(k, d) for k, (_, d) in term_parameters("altpo").items()] == [("beta", 0.1), ("alternatives", 5)]
    (active,) = active_terms("forget", {"altpo": {"alternatives": 2}})
    assert active.parameters == {"beta": 0.1} and active.preparation == Generated(alternatives=2)


def test_importing_the_table_imports_neither_torch_nor_transformers():
    heavy = "{'torch', 'transformers', 'peft', 'datasets'}"
    code = f"import sys, hf_clmul.objectives.penalties; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
