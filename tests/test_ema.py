"""The continual teacher: the average by hand, what it keeps of which parameters, and the student left to the bit."""

import copy
import math

import pytest
import torch
from test_teachers import KINDS, TOKENS, answer, change, llama, output, switches
from tiny import tiny_llama
from torch import nn

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.ema import FILE, Ema, EmaState
from hf_clmul.models.teacher_options import Average

ALWAYS = Average(probability=1.0)
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


class One(nn.Module):
    """A model with one number that trains and one that does not."""

    def __init__(self, value=0.0, dtype=torch.float32):
        super().__init__()
        self.a = nn.Parameter(torch.tensor([value], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([7.0]), requires_grad=False)


def stepped(teacher, model, values, first=1):
    """The teacher's number after each optimizer step that makes the student's one of the values."""
    found = []
    for step, value in enumerate(values, first):
        model.a.data.fill_(value)
        teacher.follow(step)
        found.append(float(teacher.kept["a"][1]))
    return found


def stacked():
    """Two adapters are active; the first is done, the second trains."""
    model = change(llama())
    config = copy.deepcopy(model.peft_config["default"])
    adapters.attach(model, config, "second", 2)
    change(model, seed=3)
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_(".second." in name)
    return model


# ---- the average ---------------------------------------------------------------------------------------------


def test_the_average_by_hand():
    """k counts the step itself: m = 1/2, 2/3, 3/4."""
    model = One(0.0)
    teacher = Ema(model, ALWAYS, seed=0)
    assert stepped(teacher, model, [4.0, 8.0, 16.0]) == pytest.approx([2.0, 2 / 3 * 2 + 8 / 3, 3 / 4 * 4 + 16 / 4])
    assert teacher.k == 3 and list(teacher.kept) == ["a"]


def test_the_momentum_is_the_most_that_it_keeps():
    model = One(0.0)
    teacher = Ema(model, Average(probability=1.0, momentum=0.6), seed=0)
    assert stepped(teacher, model, [4.0, 10.0]) == pytest.approx([2.0, 0.6 * 2 + 0.4 * 10])
    late = Ema(One(0.0), Average(probability=1.0), 0, EmaState({"a": torch.tensor([1.0])}, k=10**6))
    assert stepped(late, late.model, [2.0]) == pytest.approx([1.001], rel=1e-7)


def test_of_the_steps_a_part_counts_by_seed_and_number_alone_and_k_counts_all():
    model, moved = One(0.0), []
    teacher = Ema(model, Average(probability=0.2), seed=5)
    for step in range(1, 2001):
        before = float(teacher.kept["a"][1])
        stepped(teacher, model, [float(step)], first=step)
        if float(teacher.kept["a"][1]) != before:
            moved.append(step)
    assert moved == [step for step in range(1, 2001) if derived_seed(5, "ema", step) / 2**32 < 0.2]
    assert len(moved) == pytest.approx(400, abs=4 * math.sqrt(2000 * 0.2 * 0.8))  # four standard deviations
    assert teacher.k == 2000
    again = Ema(One(0.0), Average(probability=0.2), seed=5)
    torch.manual_seed(1)  # no global generator has a part in it
    stepped(again, again.model, [float(step) for step in range(1, 2001)])
    assert torch.equal(again.kept["a"][1], teacher.kept["a"][1])
    other = Ema(One(0.0), Average(probability=0.2), seed=6)
    assert stepped(other, other.model, [float(s) for s in range(1, 2001)])[-1] != float(teacher.kept["a"][1])


def test_equal_weights_stay_equal_to_the_bit():
    model = One(1 / 3)
    teacher = Ema(model, ALWAYS, seed=0)
    assert set(stepped(teacher, model, [1 / 3] * 50)) == {float(model.a)}


def test_an_average_of_half_precision_weights_is_kept_in_float32():
    """In bfloat16 a thousandth of the way from 1 to 2 is no way at all."""
    model = One(1.0, torch.bfloat16)
    state = EmaState({"a": torch.tensor([1.0])}, k=10**6)
    teacher = Ema(model, ALWAYS, 0, state)
    assert stepped(teacher, model, [2.0])[0] == pytest.approx(1.001)
    assert teacher.kept["a"][1].dtype == torch.float32
    assert Ema(model, ALWAYS, 0).kept["a"][1].dtype == torch.float32
    with teacher.answering() as answering:
        assert answering.a.dtype == torch.bfloat16 and answering.a.item() == 1.0
    assert model.a.item() == 2.0


# ---- while it answers ----------------------------------------------------------------------------------------


@every_kind
def test_it_answers_as_a_model_with_the_averaged_weights(make):
    student = make().train()
    expected = copy.deepcopy(student).eval()
    teacher = Ema(student, ALWAYS, seed=0)
    assert torch.equal(answer(teacher), output(expected))  # a copy to begin with
    for step in (1, 2):
        change(student, seed=step)
        teacher.follow(step)
        own = dict(student.named_parameters())
        for name, p in expected.named_parameters():
            p.data.lerp_(own[name].data, 1 / (step + 1))
    assert torch.equal(answer(teacher), output(expected))
    assert not torch.allclose(output(student.eval()), output(expected), atol=0.05)


@every_kind
def test_after_an_answer_the_student_is_exactly_as_it_was(make):
    student = make().train()
    teacher = Ema(student, ALWAYS, seed=0)
    change(student)
    teacher.follow(1)
    values, places, before = state_of(student), [p.data_ptr() for p in student.parameters()], switches(student)
    assert not answer(teacher).requires_grad
    with pytest.raises(KeyError), teacher.answering():
        raise KeyError
    assert all(torch.equal(values[name], p) for name, p in student.named_parameters())
    assert [p.data_ptr() for p in student.parameters()] == places
    assert switches(student) == before and torch.is_grad_enabled()


def state_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- from request to request ---------------------------------------------------------------------------------


def test_it_keeps_what_trains_and_what_has_trained_and_nothing_else():
    model = llama()
    first = Ema(model, ALWAYS, seed=0)
    change(model)
    first.follow(1)
    state = first.state()
    adapters.attach(model, copy.deepcopy(model.peft_config["default"]), "second", 2)
    model.base_model.set_adapter(["default", "second"])
    for name, p in model.named_parameters():
        p.requires_grad_(".second." in name)
    change(model, seed=7)
    second = Ema(model, ALWAYS, 0, state)
    assert {name for name in second.kept} == {name for name, _ in model.named_parameters() if "lora_" in name}
    change(model, seed=1)
    second.follow(1)
    assert second.k == 2
    live = dict(model.named_parameters())
    for name, (_, value) in second.kept.items():
        if ".default." in name:  # frozen now: half way to the student in T, all the way in the student
            assert torch.equal(value, state.values[name]) and not torch.equal(value, live[name])
        else:
            assert not torch.equal(value, live[name])
    with second.answering() as teacher:
        shown = state_of(teacher)
        found = teacher(TOKENS).logits
    assert all(torch.equal(shown[name], second.kept[name][1]) for name in second.kept)
    assert not torch.allclose(found, output(model.eval()), atol=1e-3)


def test_a_parameter_that_is_new_begins_as_a_copy_of_the_live_one():
    model = stacked()
    teacher = Ema(model, ALWAYS, 0, EmaState({}, k=41))
    assert teacher.k == 41 and all(".second." in name for name in teacher.kept)
    assert all(torch.equal(value, p) and value.data_ptr() != p.data_ptr() for p, value in teacher.kept.values())


def test_values_of_a_parameter_that_is_gone_are_left_out_and_those_of_another_model_refused():
    """An isolated task whose adapter was deleted leaves nothing behind."""
    state = EmaState({"gone": torch.ones(3), "a": torch.tensor([5.0])}, k=2)
    teacher = Ema(One(1.0), ALWAYS, 0, state)
    assert list(teacher.state().values) == ["a"] and float(teacher.kept["a"][1]) == 5.0
    with pytest.raises(
        ValueError, match=r"teacher_state has a of shape \[2\], and the model's is \[1\]: it is of another"
    ):
        Ema(One(1.0), ALWAYS, 0, EmaState({"a": torch.ones(2)}))


def test_a_state_is_a_copy_on_the_way_out_and_in():
    model = One(1.0)
    teacher = Ema(model, ALWAYS, seed=0)
    state = teacher.state()
    stepped(teacher, model, [3.0])
    assert float(state.values["a"]) == 1.0
    other = Ema(model, ALWAYS, 0, state)
    stepped(other, model, [3.0])
    assert float(state.values["a"]) == 1.0 and state.k == 0


def test_a_state_comes_back_from_disk_to_the_bit_and_in_the_same_bytes(tmp_path):
    teacher = Ema(stacked(), ALWAYS, seed=0)
    change(teacher.model)
    teacher.follow(1)
    teacher.state().save(tmp_path / "one")
    found = EmaState.load(tmp_path / "one")
    assert found.k == 1 and found.values.keys() == teacher.kept.keys()
    assert all(torch.equal(found.values[name], value) for name, (_, value) in teacher.kept.items())
    EmaState(dict(reversed(found.values.items())), found.k).save(tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    EmaState().save(tmp_path / "none")
    assert EmaState.load(tmp_path / "none") == EmaState({}, 0)
    with pytest.raises(RunError, match="has no ema.safetensors: it was made without teacher='ema'"):
        EmaState.load(tmp_path)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    Ema(tiny_llama(), ALWAYS, seed=0).save(tmp_path)
    with pytest.raises(RunError, match="is an average of other parameters"):
        Ema(llama(), ALWAYS, seed=0).load(tmp_path)


def test_release_leaves_the_model_as_it_is():
    student = KINDS["adapter copied"]().train()
    names, before = list(student.state_dict()), switches(student)
    teacher = Ema(student, ALWAYS, seed=0)
    answer(teacher)
    teacher.release()
    assert list(student.state_dict()) == names and switches(student) == before and not teacher.kept
