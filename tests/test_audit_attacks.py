"""Attacks on weights as pure functions and on tiny models: what they compute, in what order, and when they cannot be tried."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import norm
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from hf_clmul.evaluation.audit.attacks import attack_parameters, attacks_of
from hf_clmul.evaluation.audit.protocol import Absent, AuditData, Point
from hf_clmul.evaluation.audit.quantization import NF4, linear_layers, quantize, rounded, roundings
from hf_clmul.evaluation.audit.questions import role_play
from hf_clmul.evaluation.audit.relearning import benign, measured_at, relearn, relearn_partly, unrelated
from hf_clmul.evaluation.audit.removal import remove_adapter, remove_direction, without
from hf_clmul.evaluation.audit.subject import TextSubject
from hf_clmul.evaluation.suites import Measuring
from hf_clmul.models import FAMILIES

FACTS = [
    {"id": f"f{i}", "person": "AB"[i % 2], "question": f"Who is {name}?", "answer": f"{name} paints {thing}."}
    for i, (name, thing) in enumerate([("Ada", "doors"), ("Bo", "red boats"), ("Cy", "old maps"), ("Di", "clocks")])
]
OTHERS = [{"id": f"o{i}", "question": f"Where is {n}?", "answer": f"{n} is far away."} for i, n in enumerate("XYZ")]


class Recorder:
    """A subject that only remembers what was done to it. Its metric is the number of steps trained so far."""

    def __init__(self, data: AuditData, model: Any = None) -> None:
        self.data, self.model, self.tokenizer = data, model, None
        self.trained: list[Any] = []
        self.steps = 0

    def measure(self, label: str, x: float | None = None, forget: Any = None) -> Point:
        count = len(self.data.forget)
        scores = [float(i) for i in range(count)]
        samples = [{"question": e["question"], "answer": e["answer"], "generated": ""} for e in self.data.forget]
        return Point(label, {"m": [float(self.steps)] * count}, x, {"a": (scores, [0.5])}, samples)

    def fine_tune(self, examples: Sequence[Any], seed: int, *, steps: int, **how: Any) -> Iterator[int]:
        self.trained.append(([e["id"] for e in examples], seed, steps, how))
        for self.steps in range(1, steps + 1):
            yield self.steps


def subject(model: Any = None, forget: Sequence[Any] = FACTS, retain: Sequence[Any] = OTHERS) -> TextSubject:
    texts = [e[key] for e in [*FACTS, *OTHERS] for key in ("question", "answer")]
    tokenizer = tiny_tokenizer(texts)
    model = tiny_llama(vocab=len(tokenizer)) if model is None else model(vocab=len(tokenizer))
    return TextSubject(model, tokenizer, AuditData(forget, retain, OTHERS), Measuring(4, 4, False, None))


# ---- quantization ----------------------------------------------------------------------------------------------


def test_int4_rounds_each_block_to_sevenths_of_its_largest_weight():
    weight = torch.tensor([[7.0, 3.4, -1.6, 0.0, 70.0, 14.0, -36.0, 0.2]])
    # The first block has steps of 1, the second of 10.
    assert rounded(weight, "int4", 4).tolist() == [[7.0, 3.0, -2.0, 0.0, 70.0, 10.0, -40.0, 0.0]]


def test_int8_rounds_to_127ths_and_a_short_last_block_counts_for_itself():
    weight = torch.tensor([[127.0, 1.4, -2.6, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert rounded(weight, "int8", 3).tolist() == [[127.0, 1.0, -3.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


def test_nf4_takes_the_nearest_of_its_levels_and_keeps_zero_and_the_extremes():
    weight = 2 * torch.tensor([[-1.0, -0.7, -0.1, 0.0, 0.03, 0.05, 0.6, 1.0]])
    near = [-1.0, NF4[1], NF4[6], 0.0, 0.0, NF4[8], NF4[13], 1.0]
    assert rounded(weight, "nf4", 8).tolist() == [pytest.approx([2 * level for level in near])]


def test_the_levels_of_nf4_are_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 8 positive and 7 negative quantiles, cut off at the mean of 1 - 1/32 and 1 - 1/30, and zero."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*positive, 0.0, *negative])
    assert np.abs(levels / levels.max() - NF4).max() < 1e-6  # theirs are in single precision


def test_a_block_of_zeros_stays_and_the_type_is_kept():
    weight = torch.zeros(2, 5, dtype=torch.bfloat16)
    found = rounded(weight, "nf4", 4)
    assert found.dtype == torch.bfloat16 and not found.any()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_quantize_measures_each_scheme_on_weights_rounded_once_and_spares_the_output_layer(make):
    attacked = subject(make)
    model, seen = attacked.model, []
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    attacked.measure = lambda label, x=None: seen.append((label, {n: p.clone() for n, p in model.state_dict().items()}))
    list(quantize(attacked, attacked.data, 0, schemes=["int4", "int8"], block=8))
    assert [label for label, _ in seen] == ["before", "int4", "int8"]
    layers = {f"{name}.weight" for name in linear_layers(model)}
    assert len(layers) == (14 if make is tiny_llama else 8) and "lm_head.weight" not in layers
    for scheme, weights in seen[1:]:
        for name, weight in weights.items():
            expected = before[name]
            if name in layers:  # GPT-2 has its weights the other way round
                expected = rounded(expected, scheme, 8) if make is tiny_llama else rounded(expected.T, scheme, 8).T
            assert torch.equal(weight, expected), (scheme, name)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Conv1D])
def test_blocks_lie_along_the_inputs_of_a_layer_however_it_keeps_its_weight(kind):
    weight = torch.tensor([[7.0, 3.4, -1.6, 0.0], [70.0, 14.0, -36.0, 0.2]])  # a row for each output
    layer, seen = kind(4, 2) if kind is torch.nn.Linear else kind(2, 4), []
    turned = (lambda w: w) if kind is torch.nn.Linear else (lambda w: w.T)
    layer.weight = torch.nn.Parameter(turned(weight).clone())
    watched = SimpleNamespace(measure=lambda label: seen.append(turned(layer.weight.detach()).tolist()))
    list(roundings(watched, {"layer": layer}, ["int4"], 4))
    assert seen[1] == [[7.0, 3.0, -2.0, 0.0], [70.0, 10.0, -40.0, 0.0]]
    assert torch.equal(turned(layer.weight), weight)


# ---- fine-tuning -----------------------------------------------------------------------------------------------


def test_measured_steps_lie_at_even_ratios_with_the_first_epoch_among_them():
    assert measured_at(64, 10, 4) == [1, 4, 10, 16, 64]
    assert measured_at(5, 10, 1) == [5]  # the epoch is never reached
    assert measured_at(3, 3, 4) == [1, 2, 3]


def test_relearn_trains_on_what_was_forgotten_and_measures_start_epoch_and_end():
    found = Recorder(AuditData(FACTS, OTHERS))
    points = list(relearn(found, found.data, 7, epochs=3, batch_size=3, learning_rate=1e-3, points=1))
    assert found.trained == [(["f0", "f1", "f2", "f3"], 7, 6, {"learning_rate": 1e-3, "batch_size": 3})]
    assert [(p.label, p.x, p.values["m"][0]) for p in points] == [
        ("before", 0.0, 0.0),
        ("1 epoch", 2.0, 2.0),
        ("6 steps", 6.0, 6.0),
    ]


def test_relearn_raises_the_probability_of_what_was_forgotten_and_repeats_itself():
    runs = []
    for seed in (0, 0, 1):
        attacked = subject()
        runs.append(list(relearn(attacked, attacked.data, seed, steps=6, batch_size=2, learning_rate=3e-3, points=1)))
    first, again, other = ([np.mean(p.values["answer_probability"]) for p in points] for points in runs)
    assert first[-1] > 3 * first[0]
    assert first == again and first[0] == other[0] and first[-1] != other[-1]


def test_partial_relearning_reveals_whole_groups_and_measures_the_others():
    found = Recorder(AuditData(FACTS))
    points = list(relearn_partly(found, found.data, 0, steps=1, points=1))
    ((revealed, _, _, _),) = found.trained
    assert revealed in (["f0", "f2"], ["f1", "f3"])  # the two persons
    hidden = [i for i, fact in enumerate(FACTS) if fact["id"] not in revealed]
    for point in points:
        assert [i for i, value in enumerate(point.values["m"]) if value is not None] == hidden
        assert point.against["a"] == ([float(i) for i in hidden], [0.5])
        assert [s["question"] for s in point.samples] == [FACTS[i]["question"] for i in hidden]


def test_one_example_cannot_be_revealed_in_part():
    found = Recorder(AuditData(FACTS[:1]))
    with pytest.raises(Absent, match="cannot be divided"):
        list(relearn_partly(found, found.data, 0))


def test_benign_and_unrelated_draw_their_examples_by_the_seed_and_are_absent_without_any():
    found = Recorder(AuditData(FACTS, OTHERS, (), OTHERS))
    list(benign(found, found.data, 0, examples=2, steps=1))
    list(benign(found, found.data, 0, examples=2, steps=1))
    list(unrelated(found, found.data, 0, examples=9, steps=1))
    ids = [trained[0] for trained in found.trained]
    assert len(ids[0]) == 2 and ids[0] == ids[1] and sorted(ids[2]) == ["o0", "o1", "o2"]
    for attack in (benign, unrelated):
        with pytest.raises(Absent):
            list(attack(found, AuditData(FACTS), 0))


# ---- removal ---------------------------------------------------------------------------------------------------


def test_without_takes_the_direction_out_of_rows_or_columns():
    weight, direction = torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([0.0, 5.0])
    assert without(weight, direction, of_rows=True).tolist() == [[3.0, 0.0], [1.0, 0.0]]
    assert without(weight, direction, of_rows=False).tolist() == [[3.0, 4.0], [0.0, 0.0]]
    assert without(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), of_rows=True).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_nothing_that_the_layers_write_lies_along_the_removed_direction(make):
    from hf_clmul.evaluation.audit.removal import _states

    attacked = subject(make)
    difference = _states(attacked, FACTS, 0.5).mean(0) - _states(attacked, OTHERS, 0.5).mean(0)
    output = attacked.model.get_output_embeddings().weight.detach().clone()
    labels = [point.label for point in remove_direction(attacked, attacked.data, 0)]
    assert labels == ["before", "direction removed"]
    left = _states(attacked, FACTS, 0.5) @ (difference / difference.norm())
    if make is tiny_gpt2:  # its position embeddings write to the stream too, and are no words
        positions = attacked.model.transformer.wpe.weight @ (difference / difference.norm())
        assert left.abs().max() <= positions.abs().max() + 1e-4
    else:
        assert left.abs().max() < 1e-4
    assert torch.equal(attacked.model.get_output_embeddings().weight, output)


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer_and_plain_text_has_none():
    """Both begin with the same turns, which have no direction between them."""

    def talk(example: Any) -> dict[str, Any]:
        turns = [
            ("user", "Hello?"),
            ("assistant", "Hi."),
            ("user", example["question"]),
            ("assistant", example["answer"]),
        ]
        return {"id": example["id"], "messages": [{"role": role, "content": text} for role, text in turns]}

    attacked = subject()
    seen = attacked.model.get_input_embeddings().weight.detach().clone()
    list(remove_direction(attacked, AuditData([*map(talk, FACTS)], [*map(talk, OTHERS)]), 0))
    assert not torch.equal(attacked.model.get_input_embeddings().weight, seen)
    texts = [{"id": "t", "text": "Ada paints doors."}]
    with pytest.raises(Absent, match="plain text"):
        list(remove_direction(attacked, AuditData(texts, OTHERS), 0))
    with pytest.raises(Absent, match="that have a prompt"):
        list(remove_direction(attacked, AuditData(FACTS, texts), 0))


def test_a_filter_is_switched_off_and_other_models_have_none():
    attacked = subject()
    plain = attacked.measure("plain").values
    with pytest.raises(Absent, match="no filter"):
        list(remove_adapter(attacked, attacked.data, 0))
    attacked.model = get_peft_model(attacked.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before, after = remove_adapter(attacked, attacked.data, 0)
    assert (after.label, after.values) == ("adapter off", plain) and before.values != plain


def test_directions_need_something_retained_and_prompts_that_differ():
    attacked = subject()
    with pytest.raises(Absent, match="no examples are retained"):
        list(remove_direction(attacked, AuditData(FACTS), 0))
    with pytest.raises(Absent, match="same mean state"):
        list(remove_direction(attacked, AuditData(FACTS, FACTS), 0))
    attacked.model.config.get_text_config = lambda: SimpleNamespace(hidden_size=999, num_hidden_layers=2)
    with pytest.raises(Absent, match="not known"):
        list(remove_direction(attacked, attacked.data, 0))


# ---- the subject and the table ---------------------------------------------------------------------------------


def test_a_point_has_a_value_for_each_example_and_asks_as_told():
    attacked = subject()
    point = attacked.measure("now")
    assert set(point.values) == {"answer_probability", "rouge_l_recall", "extraction_strength", "exact_memorization"}
    assert all(len(values) == 4 for values in point.values.values())
    assert [len(side) for side in point.against["min_k_auc"]] == [4, 3] and len(point.samples) == 3
    asked = attacked.measure("asked", forget=[{**fact, "question": "Really?"} for fact in FACTS])
    assert not asked.against and asked.samples[0]["question"] == "Really?"
    assert [sample["id"] for sample in asked.samples] == [fact["id"] for fact in FACTS[:3]]
    assert asked.values["answer_probability"] != point.values["answer_probability"]


def test_a_question_that_an_attack_made_longer_is_not_cut_where_training_cuts():
    """Facts have 27 and 28 tokens, and with the scene more than 30: nothing of an answer would be left."""
    scene, probabilities = "You are an expert who knows this subject in every detail.", []
    for length in (None, 30):
        attacked = subject()
        attacked.how = replace(attacked.how, max_length=length)
        (point,) = role_play(attacked, attacked.data, 0, scenes=[scene])
        probabilities.append(point.values["answer_probability"])
    assert probabilities[0] == probabilities[1]
    with pytest.raises(Absent, match=r"example f0 has \d+ tokens, and the model reads 256"):
        list(role_play(attacked, attacked.data, 0, scenes=["word " * 300]))


def test_every_attack_has_options_with_defaults_that_fit_their_types():
    from hf_clmul.recipe.problems import value_problem

    for family in FAMILIES:
        for name in attacks_of(family):
            for option, (annotation, default) in attack_parameters(name, family).items():
                value = list(default) if isinstance(default, tuple) else default
                assert value_problem(annotation, value) == {}, (name, option)


def test_an_adapter_is_merged_unless_it_can_be_switched_off(tmp_path):
    from small_run import save_base

    from hf_clmul.errors import RunError
    from hf_clmul.evaluation.audit.subject import open_text

    base = AutoModelForCausalLM.from_pretrained(save_base(tmp_path / "base"))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "model")
    how = {"dtype": "float32", "device": torch.device("cpu")}
    data, measuring = AuditData(FACTS), Measuring(4, 4, False, None)
    merged, apart = (
        open_text(tmp_path / "model", data, measuring, switchable=switchable, **how) for switchable in (False, True)
    )
    ids = torch.tensor([[5, 6, 7]])
    assert not isinstance(merged.model, PeftModel) and isinstance(apart.model, PeftModel)
    assert torch.allclose(merged.model(ids).logits, adapted.eval()(ids).logits, atol=1e-4)
    assert torch.equal(apart.model(ids).logits, adapted(ids).logits)
    (tmp_path / "base" / "config.json").write_text(
        (tmp_path / "base" / "config.json").read_text().replace('"hidden_size": 32', '"hidden_size": 64')
    )
    with pytest.raises(
        RunError, match="could not be loaded: .* delete the folder and give `hf-clmul run` again"
    ):  # its weights have other shapes
        open_text(tmp_path / "base", data, measuring, **how)
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(RunError, match="could not be loaded"):
        open_text(tmp_path / "model", data, measuring, **how)
