"""The suite `concepts`: each prompt and seed is judged once, in order, whatever the number of ranks."""

from types import SimpleNamespace

import pytest
import torch
from image_fixtures import ByColour, stable_diffusion, unconditional

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images import concepts
from hf_clmul.evaluation.images.concepts import Sampling, judge, labels_of, picture_rows, see
from hf_clmul.evaluation.images.sampling import sample

PROMPTS = [
    {"id": "p0", "caption": "a red one", "colour": "red", "side": "left"},
    {"id": "p1", "caption": "a green seven", "colour": "green", "side": None},
    {"id": "p2", "caption": "a plain picture", "side": "right"},
]
HOW = Sampling(seeds=(4, 2), steps=2, guidance=2.0, batch_size=4)


@pytest.fixture(scope="module")
def pipeline():
    return stable_diffusion()


@pytest.fixture(scope="module")
def seen(pipeline):
    return see(pipeline, PROMPTS, ByColour(), HOW)


def test_rows_are_the_judgement_of_the_sampled_images(pipeline, seen):
    images = sample(pipeline, [prompt["caption"] for prompt in PROMPTS], [4, 2], 2, 2.0, 4).flatten(0, 1)
    assert [(row["prompt"], row["seed"]) for row in seen.samples] == [(f"p{i}", s) for i in range(3) for s in (4, 2)]
    assert [row["caption"] for row in seen.samples[::2]] == [prompt["caption"] for prompt in PROMPTS]
    assert [row["labels"] for row in seen.samples[::2]] == [
        {"colour": "red", "side": "left"}, {"colour": "green"}, {"side": "right"},
    ]  # fmt: skip
    for row, image in zip(seen.samples, images, strict=True):
        assert row["predicted"]["colour"] == ("red" if image[0].mean() > image[1].mean() else "green")
        assert row["predicted"]["side"] == ("left" if image[..., :4].mean() > image[..., 4:].mean() else "right")
    torch.testing.assert_close(seen.features, images.mean((2, 3)))


@pytest.mark.parametrize("ranks", [2, 4])  # 4: one rank has no prompt at all
def test_ranks_share_the_prompts_and_all_get_everything(pipeline, seen, ranks, monkeypatch):
    shares: list[list] = []
    sampled: list[int] = []
    real = concepts.sample
    monkeypatch.setattr(
        concepts, "sample", lambda p, prompts, *rest: (sampled.append(len(prompts)), real(p, prompts, *rest))[1]
    )
    for rank in range(ranks):
        monkeypatch.setattr(
            concepts, "PartialState", lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=ranks)
        )
        monkeypatch.setattr(concepts, "gather_object", lambda mine: (shares.append(mine), mine)[1])
        see(pipeline, PROMPTS, ByColour(), HOW)
    assert sum(sampled) == len(PROMPTS) and max(sampled) == -(-len(PROMPTS) // ranks)
    monkeypatch.setattr(concepts, "gather_object", lambda mine: [of_prompt for share in shares for of_prompt in share])
    together = see(pipeline, PROMPTS, ByColour(), HOW)
    assert together.samples == seen.samples
    torch.testing.assert_close(together.features, seen.features, atol=1e-5, rtol=0)


def test_a_pipeline_without_prompts():
    found = see(unconditional(), [{"id": "any", "caption": None, "colour": "red"}], ByColour(), HOW)
    assert len(found.samples) == 2 and found.features.shape == (2, 3)


class Moody(ByColour):
    """A classifier with weights whose judgement depends on its mode."""

    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Dropout(0.9)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def features(self, images):
        return self.drop(super().features(images) * self.scale)


def test_the_classifier_judges_in_evaluation_mode_which_is_given_back():
    moody = Moody()
    moody.drop.eval()
    moody.train(True).drop.eval()
    images = torch.rand(5, 3, 8, 8)
    judge(images, moody, 2)
    assert moody.training and not moody.drop.training
    moody.drop.train()
    predicted, features = judge(images, moody, 2)
    torch.testing.assert_close(features, images.mean((2, 3)))
    assert len(predicted) == 5 and not features.requires_grad and moody.drop.training


def test_prompts_that_fix_nothing_known_are_refused(pipeline):
    with pytest.raises(RecipeError, match="no prompts"):
        see(pipeline, [], ByColour(), HOW)
    with pytest.raises(
        RecipeError, match="prompt x: it has none of the columns.*colour, side; found id, caption, digit"
    ):
        labels_of({"id": "x", "caption": "a", "digit": "one"}, ByColour.CLASSES)
    with pytest.raises(RecipeError, match="prompt x: the classifier knows no colour 'blue'; it knows red, green"):
        labels_of({"id": "x", "caption": "a", "colour": "blue"}, ByColour.CLASSES)


def brightness(images, prompts, batch_size):
    """Stands in for a CLIP: says of a picture how bright it is, and how long its own prompt."""
    assert len(images) == len(prompts)
    return [float(image.mean()) + 10 * len(prompt) for image, prompt in zip(images, prompts, strict=True)]


@pytest.mark.parametrize("classifier", [None, ByColour()])
def test_each_picture_is_scored_with_its_own_prompt(pipeline, classifier):
    images = sample(pipeline, [prompt["caption"] for prompt in PROMPTS], [4, 2], 2, 2.0, 4)
    rows = picture_rows(pipeline, PROMPTS, classifier, HOW, "sampling", 1, brightness)
    for row, prompt, pictures in zip(rows, PROMPTS, images, strict=True):
        wanted = [float(picture.mean()) + 10 * len(prompt["caption"]) for picture in pictures]
        assert row["clip_scores"] == pytest.approx(wanted, abs=1e-3)
        assert len(row["predicted"]) == (0 if classifier is None else 2) and len(row["pictures"]) == 1


def test_where_nobody_judges_only_what_is_shown_is_drawn(pipeline, monkeypatch):
    drawn, real = [], concepts.sample
    monkeypatch.setattr(
        concepts, "sample", lambda p, prompts, seeds, *rest: (drawn.append(seeds), real(p, prompts, seeds, *rest))[1]
    )
    rows = picture_rows(pipeline, PROMPTS, None, HOW, "sampling", 1)
    assert drawn == [(4,)] and [len(row["pictures"]) for row in rows] == [1, 1, 1]
    assert rows[0] == {**PROMPTS[0], "labels": {}, "predicted": [], "features": "", "pictures": rows[0]["pictures"]}
