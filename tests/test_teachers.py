"""The teacher `before_request`: the model as it was, for the price of what trains, the student untouched."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny import tiny_gpt2, tiny_llama
from torch import nn

from hf_clmul.models import adapters
from hf_clmul.models.teachers import BeforeRequest

TOKENS = torch.tensor([[3, 14, 15, 9, 26], [5, 35, 8, 9, 7]])


def llama(dropout=0.0):
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    return adapters.attach(tiny_llama(), config, "default", 1)


def new_adapter():
    return llama(dropout=0.5)


def trained_adapter():
    return change(llama(dropout=0.5))


def trained_adapter_and_norm():
    """Beside the adapter a weight of the base trains: the adapter alone is not the model before."""
    model = trained_adapter()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


KINDS = {
    "switched off": new_adapter,
    "adapter copied": trained_adapter,
    "adapter and more": trained_adapter_and_norm,
    "copied whole": tiny_gpt2,
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


def change(model, seed=0):
    """A large step on everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def output(model):
    with torch.no_grad():
        return model(TOKENS).logits


def answer(teacher):
    with teacher.answering() as model:
        assert not torch.is_grad_enabled()
        return model(TOKENS).logits


def switches(model):
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    return flags, [module.training for module in model.modules()], active


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@every_kind
def test_it_answers_as_the_model_did_and_goes_on_doing_so_while_the_student_changes(make):
    """Dropout is on in the student: in train mode the teacher would be random (trap 11)."""
    student = make()
    before = output(student.eval())
    student.train()
    teacher = BeforeRequest(student)
    assert torch.equal(answer(teacher), before)
    change(student)
    assert torch.equal(answer(teacher), before)
    assert torch.equal(answer(teacher), before)
    assert not torch.allclose(output(student.eval()), before, atol=0.1)


@every_kind
def test_after_an_answer_the_student_is_exactly_as_it_was(make):
    student = make().train()
    next(parameter for parameter in student.parameters() if parameter.requires_grad).requires_grad_(False)
    next(module for module in student.modules() if isinstance(module, nn.Dropout)).eval()
    teacher = BeforeRequest(student)
    before = switches(student)
    found = answer(teacher)
    assert switches(student) == before and torch.is_grad_enabled() and not found.requires_grad
    with pytest.raises(KeyError), teacher.answering():
        raise KeyError
    assert switches(student) == before and torch.is_grad_enabled()


def test_without_the_guard_peft_would_thaw_what_was_frozen(monkeypatch):
    """Trap 7. If this fails, PEFT has mended it, and the test above proves less than it says."""
    student = new_adapter().train()
    frozen = next(p for p in student.parameters() if p.requires_grad).requires_grad_(False)
    teacher = BeforeRequest(student)
    answer(teacher)
    assert not frozen.requires_grad and student.training
    monkeypatch.setattr(adapters, "untouched", lambda model: nullcontext())
    answer(teacher)
    assert frozen.requires_grad and not student.training


def test_without_the_guard_peft_would_leave_the_copy_in_the_place_of_the_student(monkeypatch):
    student = trained_adapter()
    teacher = BeforeRequest(student)
    trainable = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    monkeypatch.setattr(adapters, "untouched", lambda model: nullcontext())
    answer(teacher)
    assert not set(trainable) & {name for name, p in student.named_parameters() if p.requires_grad}


@every_kind
def test_gradients_of_the_student_are_the_same_with_and_without_an_answer_before(make):
    def gradients(ask):
        student = make().eval()
        teacher = BeforeRequest(student)
        if ask:
            answer(teacher)
        student(TOKENS).logits.pow(2).sum().backward()
        return {name: p.grad for name, p in student.named_parameters() if p.grad is not None}

    expected, found = gradients(ask=False), gradients(ask=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(gradient.any() for gradient in found.values())


# ---- what it costs, and how it goes ------------------------------------------------------------------------


def test_a_new_adapter_is_switched_off_and_costs_nothing():
    student = new_adapter()
    before = size(student)
    teacher = BeforeRequest(student)
    assert size(student) == before and teacher.copy is None
    assert torch.equal(answer(teacher), output(tiny_llama()))


def test_an_adapter_trained_in_place_costs_one_more_adapter_that_never_trains():
    student = trained_adapter()
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)
    before, trainable = size(student), [name for name, p in student.named_parameters() if p.requires_grad]
    teacher = BeforeRequest(student)
    # two layers, rank 4, inputs and outputs of both modules
    assert size(student) - before == adapter == 2 * 4 * (32 + 32 + 64 + 32)
    assert teacher.copy is None
    assert [name for name, p in student.named_parameters() if p.requires_grad] == trainable


def test_a_full_model_is_copied_once_and_frozen():
    student = tiny_llama()
    before = size(student)
    teacher = BeforeRequest(student)
    assert size(student) == before == size(teacher.copy)
    assert not any(parameter.requires_grad for parameter in teacher.copy.parameters())
    shared = {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.copy.parameters()}
    assert not shared


@every_kind
def test_release_takes_the_copy_out_again(make):
    student = make().train()
    names, before = list(student.state_dict()), switches(student)
    teacher = BeforeRequest(student)
    teacher.release()
    assert list(student.state_dict()) == names and switches(student) == before
    assert teacher.copy is None and not teacher.is_adapter_copy
    BeforeRequest(student).release()  # the next request can have a teacher of its own
    assert list(student.state_dict()) == names


def test_it_is_taken_from_the_live_weights_and_never_read_from_disk_again(tmp_path):
    """Trap 11: in a sequence of requests the model's recorded name is an older model."""
    tiny_llama().save_pretrained(tmp_path)
    student = type(tiny_llama()).from_pretrained(tmp_path)
    assert torch.equal(output(student), output(tiny_llama()))
    change(student)
    live = output(student)
    teacher = BeforeRequest(student)
    change(student, seed=1)
    assert torch.equal(answer(teacher), live)


def test_making_a_teacher_leaves_the_generator_alone():
    for make in KINDS.values():
        student = make()
        before = torch.random.get_rng_state()
        BeforeRequest(student)
        assert torch.equal(torch.random.get_rng_state(), before)


# ---- on a stack of adapters ----------------------------------------------------------------------------------


def stack(trains, new):
    """Three adapters that all do something and are all active; the one that trains is `new` if it does nothing yet."""
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model, names = tiny_llama(), ["first", "second", "third"]
    for i, name in enumerate(names):
        model = adapters.attach(model, config, name, i)
        if name != trains or not new:
            change(model, seed=i)
    adapters.activate(model, names, trains)
    return model


STACKS = pytest.mark.parametrize("trains", ["first", "second", "third"])


@STACKS
@pytest.mark.parametrize("new", [True, False], ids=["new", "trained further"])
def test_the_teacher_of_a_request_on_a_stack_is_the_stack_before_it_to_the_bit(trains, new):
    """A new adapter is left out, one trained further is the one before; the frozen ones stay where they are."""
    student = stack(trains, new)
    before = output(student.eval())
    student.train()
    switched, names = switches(student), adapters.active(student)
    teacher = BeforeRequest(student)
    assert teacher.is_adapter_copy is not new and teacher.copy is None
    for seed in range(2):
        assert torch.equal(answer(teacher), before)
        change(student, seed)
    assert torch.equal(answer(teacher), before)
    assert adapters.active(student) == names and adapters.trained(student) == trains
    assert not torch.allclose(output(student.eval()), before, atol=0.1)
    teacher.release()
    assert switches(student.train()) == switched, "no flag, mode or adapter but those of the request"


@STACKS
@pytest.mark.parametrize("new", [True, False], ids=["new", "trained further"])
def test_on_a_stack_only_what_trains_costs_anything(trains, new):
    student = stack(trains, new)
    before = size(student)
    adapter = sum(p.numel() for p in student.parameters() if p.requires_grad)
    BeforeRequest(student)
    assert size(student) - before == (0 if new else adapter) and adapter == 2 * 4 * (32 + 32 + 64 + 32)


@STACKS
def test_the_flags_of_frozen_adapters_survive_answers_and_their_weights_never_move(trains):
    """Trap 7: PEFT's switch thaws every active adapter on its way out."""
    student = stack(trains, new=False)
    frozen = {name: p.detach().clone() for name, p in student.named_parameters() if not p.requires_grad}
    teacher = BeforeRequest(student)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        target = answer(teacher)
        (student(TOKENS).logits - target).pow(2).sum().backward()
        assert {name for name, p in student.named_parameters() if p.grad is not None}.isdisjoint(frozen)
        optimizer.step()
    named = dict(student.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in frozen.items())
