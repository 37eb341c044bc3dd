"""Attacks on a tiny pipeline: what is measured, and that each does what it says and leaves no trace."""

from unittest.mock import patch

import pytest
import torch
from image_fixtures import ByColour, Plain, PlainNoising, stable_diffusion
from test_image_attacks import PIXELS, state

from hf_clmul.evaluation.audit import picture_attacks
from hf_clmul.evaluation.audit.picture_subject import Network, PictureSubject
from hf_clmul.evaluation.audit.protocol import Absent, AuditData
from hf_clmul.evaluation.audit.quantization import rounded
from hf_clmul.evaluation.images.concepts import Sampling, see
from hf_clmul.evaluation.images.denoising import Descent
from hf_clmul.evaluation.images.inversion import disguised, invert
from hf_clmul.evaluation.images.prompts import prompts
from hf_clmul.evaluation.images.relearning import relearn

CAPTIONS = ["a red seven", "a red one", "a green one"]
ROWS = [{"id": str(i), "caption": c, "image": i, "colour": c.split()[1]} for i, c in enumerate(CAPTIONS)]
HOW = Sampling((3, 1, 4), 2, 2.0, 4)
QUICK = {"steps": 2, "learning_rate": 0.02, "batch_size": 2, "pictures": 2}


def subject(**more) -> PictureSubject:
    pipeline = stable_diffusion()
    network = Network(Plain(), PlainNoising(pipeline.scheduler), lambda row: PIXELS[row["image"]])
    given = {"begin_as": "green", "taken": frozenset(CAPTIONS), **more}
    return PictureSubject(
        pipeline, AuditData(prompts(ROWS)), ByColour(), "colour", HOW, network,
        lambda name, count, seed: [row for row in ROWS if row["colour"] == name][:count], **given,
    )  # fmt: skip


def shares(seen, names) -> list[float]:
    """Of each prompt, by hand."""
    found = [row["predicted"]["colour"] for row in seen.samples]
    return [found[3 * i : 3 * i + 3].count(name) / 3 for i, name in enumerate(names)]


def test_a_prompt_has_the_share_of_its_pictures_in_which_its_concept_is_seen():
    own = subject()
    point = own.measure("before", 0.0)
    expected = shares(see(own.pipeline, prompts(ROWS), ByColour(), HOW), ["red", "red", "green"])
    assert point.values["still_drawn"] == expected
    assert point.values["unlearning_accuracy"] == [1 - share for share in expected]
    assert sum(expected) > 0 and (point.label, point.x) == ("before", 0.0)
    assert [sample["answer"] for sample in point.samples] == CAPTIONS
    other = own.measure("other", forget=[{"id": "x", "caption": "a plain one", "colour": "red"}])
    assert (other.samples[0]["question"], other.samples[0]["answer"]) == ("a plain one", "red")


def test_relearning_is_a_curve_of_one_training_and_leaves_the_pipeline_alone():
    own = subject()
    own.measure("before")  # diffusers' own sampling leaves its arguments behind
    before = state(own.pipeline)
    points = list(picture_attacks.relearn(own, own.data, 5, **{**QUICK, "steps": 4}, points=2))
    assert [(point.label, point.x) for point in points] == [("before", 0.0), ("1 step", 1.0), ("4 steps", 4.0)]
    assert state(own.pipeline) == before
    network = own.network
    for steps, point in ((1, points[1]), (4, points[2])):
        done = relearn(
            own.pipeline, network.architecture, network.noising, PIXELS[[0, 1, 2]], CAPTIONS, Descent(steps, 0.02, 2, 5)
        )
        with done.applied(own.pipeline):
            assert own.measure("again").values == point.values


def test_a_token_is_inverted_for_each_concept_and_values_stay_with_their_prompts():
    own = subject()
    own.measure("before")
    before = state(own.pipeline)
    _, point = picture_attacks.inversion(own, own.data, 5, **QUICK)
    assert state(own.pipeline) == before
    expected, network = [], own.network
    for name, count in (("red", 2), ("green", 1)):
        rows = [row for row in ROWS if row["colour"] == name]
        texts = [row["caption"] for row in disguised(rows, name)]
        done = invert(
            own.pipeline, network.architecture, network.noising, network.images(rows), texts, Descent(2, 0.02, 2, 5), "green"
        )  # fmt: skip
        with done.applied(own.pipeline):
            expected += shares(see(own.pipeline, disguised(prompts(rows), name), ByColour(), HOW), [name] * count)
    assert point.values["still_drawn"] == expected
    assert [sample["question"] for sample in point.samples] == [
        "a <concept> seven",
        "a <concept> one",
        "a <concept> one",
    ]


def test_a_concept_that_its_prompts_do_not_name_cannot_be_inverted():
    own = subject()
    rows = [{**row, "colour": "crimson_red"} for row in ROWS[:1]]
    with pytest.raises(Absent, match="not every prompt of what is forgotten has the word 'crimson_red'"):
        picture_attacks.word_of("crimson_red", rows)
    assert picture_attacks.word_of("crimson_red", [{**rows[0], "caption": "a crimson red seven"}]) == "crimson red"
    with pytest.raises(Absent, match="option `initial`"):
        list(picture_attacks.inversion(subject(begin_as=None), own.data, 5, **QUICK))


def test_other_words_are_those_given_and_else_wordings_that_the_pipeline_has_whole():
    known = [{"id": t, "caption": t, "colour": "green"} for t in ("a plain one", "plain")]
    own = subject(paraphrases=known)
    _, point, worst = picture_attacks.paraphrase(own, own.data, 0)
    # "the", "photo" and "drawing" are no words of this tokenizer; "a picture of a" has one that is none.
    assert picture_attacks.in_other_words("red", own) == ["red", "one red"]
    assert [sample["question"] for sample in point.samples] == ["a plain one", "plain", "red"]
    asked = [*known, *({"id": t, "caption": t, "colour": "red"} for t in ("red", "one red"))]
    expected = shares(see(own.pipeline, asked, ByColour(), HOW), ["green", "green", "red", "red"])
    assert point.values["still_drawn"] == expected
    assert worst.values["still_drawn"] == [max(expected[:2]), max(expected[2:])]
    assert worst.values["unlearning_accuracy"] == [1 - share for share in worst.values["still_drawn"]]
    assert picture_attacks.in_other_words("red", subject(taken=frozenset({"red"}))) == ["one red"]


def test_rounding_reaches_denoiser_and_text_encoder_and_gives_the_weights_back():
    own, seen = subject(), {}
    weights = {
        name: own.networks()[name].state_dict() for name in ("unet", "text_encoder")
    }  # the tensors themselves, not copies
    kept = {part: {name: value.clone() for name, value in of.items()} for part, of in weights.items()}
    conv, linear = (
        ("unet", "conv_in.weight"),
        ("text_encoder", next(n for n in kept["text_encoder"] if "fc1.weight" in n)),
    )

    def measure(label):
        seen[label] = {at: weights[at[0]][at[1]].clone() for at in (conv, linear)}
        return label

    with patch.object(own, "measure", measure):
        assert list(picture_attacks.quantize(own, own.data, 0, schemes=["int4"], block=8)) == ["before", "int4"]
    for at in (conv, linear):
        original = kept[at[0]][at[1]]
        assert torch.equal(seen["before"][at], original)
        assert torch.equal(seen["int4"][at], rounded(original, "int4", 8)) and not torch.equal(
            seen["int4"][at], original
        )
        assert torch.equal(weights[at[0]][at[1]], original)


def test_a_convolution_is_rounded_in_blocks_of_all_that_goes_into_an_output():
    weight = torch.tensor([[[[1.0, 0.5]], [[-0.26, 0.1]]], [[[2.0, 0.0]], [[0.0, 0.3]]]])  # [2, 2, 1, 2]
    expected = torch.tensor([[[[7, 4]], [[-2, 1]]], [[[14, 0]], [[0, 2]]]]) / 7
    assert torch.allclose(rounded(weight, "int4", 64), expected)
