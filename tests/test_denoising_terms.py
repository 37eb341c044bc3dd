"""Every term of denoisers: numbers worked out by hand, where gradients flow, and what must not change a value.

The tests run over the table, so that a new term is caught: it needs a line in HAND and one in TRAINS.
"""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from hf_clmul.models.teachers import zero
from hf_clmul.objectives import TERMS, terms_of
from hf_clmul.objectives.active import active_terms
from hf_clmul.objectives.prediction import Denoised

DENOISERS = {name: term for name, term in terms_of("diffusion").items() if not term.edit}
every_term = pytest.mark.parametrize("name", DENOISERS)


def images(*samples):
    """[B, 1, 2, 2] of four numbers for each sample."""
    return torch.tensor(samples, dtype=torch.float64).view(-1, 1, 2, 2)


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# The second image of each pair: errors 1 and 5/4, weighted 2 and 5/4; of the teacher 1 and 1, weighted 2 and 1.
PARTNER = Denoised(images([2, 2, 2, 2], [1, 0, 0, 0]), images([0, 2, 2, 2], [0, 0, 0, 2]), vector(2, 1))
TEACHERS_PARTNER = replace(PARTNER, output=images([0, 2, 2, 0], [0, 0, 0, 0]))
# Errors 20/4 and 12/4, weighted 5 and 3/2; of the teacher 6/4 and 4/4, weighted 3/2 and 1/2.
STUDENT = Denoised(
    images([1, 2, 3, 4], [0, 0, 0, 4]),
    images([1, 0, 3, 0], [1, 1, 1, 1]),
    vector(1, 1 / 2),
    {"anchor": images([1, 2, 0, 4], [0, 0, 0, 0])},
    vector(1 / 2, 1 / 5),
    PARTNER,
    vector(3 / 2, 1 / 2),
)
TEACHER = replace(
    STUDENT,
    output=images([1, 1, 1, 1], [0, 2, 0, 0]),
    variants={"empty": images([0, 1, 2, 2], [1, 2, 0, 0]), "anchor": images([1, 2, 3, 0], [0, 0, 4, 4])},
    partner=TEACHERS_PARTNER,
)
HAND = {
    "denoising": [({}, 6.5)],
    "ascent": [({}, -6.5)],
    # (0 + 1 + 4 + 9) / 4 and (0 + 4 + 0 + 16) / 4
    "distill": [({}, 8.5)],
    # The same, 3.5 and 5, three times and once
    "latent_anchoring": [({}, 3.5 * 1.5 + 5 * 0.5)],
    # The same, by the teacher's own errors 3/2 and 1
    "confident_distill": [
        ({}, 3.5 * exp(-1.5) + 5 * exp(-1)),
        ({"rho": 2.0}, 3.5 * exp(-0.75) + 5 * exp(-0.5)),
    ],
    "esd": [
        # Conditional less unconditional: (1, 0, -1, -1) and (-1, 0, 0, 0). Targets (-1, 1, 3, 3) and (2, 2, 0, 0): 6/4 + 24/4
        ({}, 7.5),
        # The unconditional output: (1 + 1 + 1 + 4) / 4 + (1 + 4 + 0 + 16) / 4
        ({"eta": 1.0}, 7.0),
        ({"eta": 0.0}, 8.5),
    ],
    "concept_ablation": [({}, 16 / 4 + 16 / 4)],
    "relabel": [({}, 9 / 4 + 16 / 4)],
    "surrogate": [({}, 2 + 5 / 4)],
    "duo": [
        # The partner gained 2 - 2 and 5/4 - 1, the sample lost 5 - 3/2 and 3/2 - 1/2: differences -7/2 and -3/4
        ({"beta": log(4)}, log(1 + 2**-7) + log(1 + 2**-1.5)),
        ({"beta": 2 * log(4)}, log(1 + 2**-14) + log(1 + 2**-3)),
    ],
    # To what the teacher says, whoever it is
    "incompetent": [({}, 8.5)],
    "attention_suppression": [({}, 1 / 4 + 1 / 25)],
}
TRAINS = {name: {"output"} for name in DENOISERS} | {
    "surrogate": {"partner.output"}, "duo": {"output", "partner.output"}, "attention_suppression": {"attention"},
}  # fmt: skip
DATA_FREE = (
    "distill",
    "latent_anchoring",
    "esd",
    "concept_ablation",
    "relabel",
    "incompetent",
    "attention_suppression",
)


def value(name, student=STUDENT, teacher=TEACHER, **parameters):
    found, count = TERMS[name].function(student, teacher, **parameters)
    assert count == student.batch_size
    return found


def rows(one, chosen):
    """Some samples of a batch, in the order given."""
    return Denoised(
        one.output[chosen], one.target[chosen], one.weights[chosen],
        {name: output[chosen] for name, output in (one.variants or {}).items()},
        None if one.attention is None else one.attention[chosen],
        None if one.partner is None else rows(one.partner, chosen),
        None if one.apartness is None else one.apartness[chosen],
    )  # fmt: skip


def drawn(seed, batch=3, shape=(2, 4, 4), partner=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    other = drawn(seed + 100, batch, shape, partner=False) if partner else None
    variants = {name: draw(batch, *shape) for name in ("empty", "anchor")}
    weights = torch.rand(batch, generator=generator, dtype=torch.float64)
    return Denoised(draw(batch, *shape), draw(batch, *shape), weights, variants, draw(batch), other, weights + 1)


def leaves(one, prefix=""):
    found = {"output": one.output, "target": one.target, "attention": one.attention, **one.variants}
    found = {prefix + name: tensor for name, tensor in found.items()}
    return found if one.partner is None else found | leaves(one.partner, "partner.")


# ---- by hand -----------------------------------------------------------------------------------------------


def test_every_term_has_a_value_worked_out_by_hand():
    assert set(HAND) == set(DENOISERS)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in HAND.items() for case in cases])
def test_value_by_hand(name, case):
    parameters, expected = case
    assert value(name, **parameters).item() == pytest.approx(expected, rel=1e-12)


def test_preference_is_undecided_at_the_teacher_and_its_default_is_the_papers():
    assert value("duo", TEACHER, TEACHER).item() == pytest.approx(2 * log(2))
    # The teacher misses its partners' last element by -2. A student that misses it by -2.002 has lost (2.002^2 - 4) / 4,
    # weighted 2 and 1: 500 times that is 2.001 and 1.0005.
    off = TEACHERS_PARTNER.output - images([0, 0, 0, 0.002], [0, 0, 0, 0.002])
    apart = replace(TEACHER, partner=replace(TEACHERS_PARTNER, output=off))
    assert value("duo", apart, TEACHER).item() == pytest.approx(log(1 + exp(2.001)) + log(1 + exp(1.0005)), rel=1e-9)


def test_one_that_predicts_zero():
    nobody = zero(STUDENT)
    assert value("incompetent", teacher=nobody).item() == 30 / 4 + 16 / 4
    assert nobody.output.shape == STUDENT.output.shape and nobody.target is STUDENT.target
    (active,) = active_terms("forget", "incompetent", "diffusion")
    assert active.preparation.weights == "random" and active.parameters == {}


# ---- gradients ---------------------------------------------------------------------------------------------


@every_term
def test_gradient_reaches_what_trains_and_nothing_else(name):
    """Also where a teacher's outputs, or those under other prompts, could be differentiated."""
    student, teacher = drawn(0), drawn(1)
    value(name, student, teacher).backward()
    assert {where for where, tensor in leaves(student).items() if tensor.grad is not None} == TRAINS[name]
    assert all(tensor.grad is None for tensor in leaves(teacher).values())
    assert all(leaves(student)[where].grad.abs().min() > 0 for where in TRAINS[name])


@pytest.mark.parametrize("name", ["distill", "esd", "concept_ablation", "relabel", "incompetent", "denoising"])
def test_slope_is_twice_the_distance_to_the_target_by_the_number_of_elements(name):
    student, teacher = drawn(2), drawn(3)
    value(name, student, teacher).backward()
    target = {
        "distill": teacher.output,
        "esd": 2 * teacher.variants["empty"] - teacher.output,
        "concept_ablation": teacher.variants["anchor"],
        "relabel": student.variants["anchor"],
        "incompetent": teacher.output,
        "denoising": student.target,
    }[name]
    weights = student.weights.view(-1, 1, 1, 1) if name == "denoising" else 1
    torch.testing.assert_close(student.output.grad, 2 * weights * (student.output - target) / 32)


def test_gradient_ascent_is_the_denoising_loss_turned_round():
    one, other = drawn(4), drawn(4)
    value("denoising", one).backward()
    value("ascent", other).backward()
    assert torch.equal(one.output.grad, -other.output.grad)


# ---- what must not change a value --------------------------------------------------------------------------


@every_term
def test_samples_add_up_in_any_order(name):
    student, teacher = drawn(5), drawn(6)
    whole = value(name, student, teacher)
    order = [2, 0, 1]
    torch.testing.assert_close(value(name, rows(student, order), rows(teacher, order)), whole)
    torch.testing.assert_close(sum(value(name, rows(student, [i]), rows(teacher, [i])) for i in range(3)), whole)


@every_term
def test_count_is_the_number_of_samples_and_known_beforehand(name):
    (active,) = active_terms(TERMS[name].roles[0], name, "diffusion")
    assert active.count([1, 1, 1], 0) == 3 == TERMS[name].function(drawn(5), drawn(6))[1]


@every_term
def test_size_of_images_does_not_change_a_value(name):
    def tiled(one):
        larger = {name: output.repeat(1, 1, 2, 2) for name, output in (one.variants or {}).items()}
        partner = None if one.partner is None else tiled(one.partner)
        output, target = one.output.repeat(1, 1, 2, 2), one.target.repeat(1, 1, 2, 2)
        return replace(one, output=output, target=target, variants=larger, partner=partner)

    torch.testing.assert_close(value(name, tiled(STUDENT), tiled(TEACHER)), value(name))


@every_term
def test_what_a_term_does_not_ask_for_may_be_anything(name):
    """Not-a-number in whatever its needs leave out; the teacher is left out altogether where none is asked for."""
    needs = TERMS[name].needs
    asked_of_teacher = bool(needs & {"teacher", "incompetent"})

    def poisoned(one, of_teacher):
        mine = of_teacher == asked_of_teacher
        spoiled = {k: o if mine and k in needs else o * torch.nan for k, o in (one.variants or {}).items()}
        attention = one.attention if "attention" in needs and not of_teacher else one.attention * torch.nan
        partner = one.partner if "partner" in needs else replace(one.partner, output=one.partner.output * torch.nan)
        free = name in DATA_FREE
        target, weights = (x * torch.nan if free else x for x in (one.target, one.weights))
        apartness = one.apartness if "apartness" in needs and not of_teacher else one.apartness * torch.nan
        return Denoised(one.output, target, weights, spoiled, attention, partner, apartness)

    teacher = poisoned(TEACHER, True) if asked_of_teacher else None
    assert value(name, poisoned(STUDENT, False), teacher).item() == value(name).item()


# ---- parameterisations -------------------------------------------------------------------------------------

VP, FLOW = (0.8, 0.6), (0.7, 0.3)  # (a, s) of x_t = a x + s n: squares add up to one; or the two themselves do


def v(noise, noisy, a, s):
    return a * noise - s * (noisy - s * noise) / a


def velocity(noise, noisy, a, s):
    return noise - (noisy - s * noise) / a


def sample(noise, noisy, a, s):
    return (noisy - s * noise) / a


@pytest.mark.parametrize("name", ["denoising", "distill", "esd", "concept_ablation", "relabel"])
@pytest.mark.parametrize(
    ("to", "at", "weight"),
    [
        (v, VP, 1 / 0.8**2),
        (velocity, FLOW, 1 / 0.7**2),
        (sample, VP, (0.6 / 0.8) ** 2),
        (sample, FLOW, (0.3 / 0.7) ** 2),
    ],
)
def test_noise_v_velocity_and_sample_have_one_target(name, to, at, weight):
    """Networks that say the same of the same noisy images lose the same, up to a factor that hangs on the time alone."""
    clean, noise = (
        torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (8, 9)
    )
    a, s = at
    noisy = a * clean + s * noise
    exact = {v: a * noise - s * clean, velocity: noise - clean, sample: clean}[to]
    torch.testing.assert_close(to(noise, noisy, a, s), exact)

    def said(one):
        return replace(
            one, output=to(one.output, noisy, a, s), target=exact,
            variants={name: to(output, noisy, a, s) for name, output in one.variants.items()},
        )  # fmt: skip

    student, teacher = (replace(drawn(k, partner=False), target=noise) for k in (10, 11))
    for i in range(3):
        in_noise = value(name, rows(student, [i]), rows(teacher, [i]))
        torch.testing.assert_close(value(name, rows(said(student), [i]), rows(said(teacher), [i])), weight * in_noise)


def test_a_prediction_of_zero_means_another_thing_in_each_parameterisation():
    (a, s), student = VP, drawn(10, partner=False)
    noisy = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    as_v = replace(student, output=v(student.output, noisy, a, s))
    ratios = [value("incompetent", rows(as_v, [i]), zero(rows(as_v, [i]))) / value("incompetent", one, zero(one))
              for i, one in enumerate(rows(student, [i]) for i in range(3))]  # fmt: skip
    assert max(ratios) - min(ratios) > 0.1
