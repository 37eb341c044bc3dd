"""The attacks as an audit calls them: one form for all, records whose figures are those of the attacked pictures, no trace."""

import pytest
from image_fixtures import ByColour, Plain, PlainNoising, stable_diffusion
from test_image_attacks import PIXELS, state

from hf_clmul.errors import RecipeError
from hf_clmul.evaluation.images.attacks import Inversion, Judge, Network, Paraphrasing, Relearning
from hf_clmul.evaluation.images.concepts import Sampling, see
from hf_clmul.evaluation.images.denoising import Descent
from hf_clmul.evaluation.images.prompts import prompts
from hf_clmul.evaluation.images.relearning import relearn

SAMPLING = Sampling((), 2, 2.0, 4)
COST = Descent(steps=2, learning_rate=0.02, batch_size=2, seed=5)
ROWS = [
    {"id": str(i), "caption": c, "image": i, "colour": "red"}
    for i, c in enumerate(["a red seven", "a red one", "a red seven"])
]


@pytest.fixture
def pipeline():
    return stable_diffusion()


def attacks(pipeline):
    judge = Judge(ByColour(), "colour", SAMPLING)
    network = Network(Plain(), PlainNoising(pipeline.scheduler), lambda row: PIXELS[row["image"]])
    texts = {"red": ["a plain one", "a plain seven"], "green": ["a plain picture"]}
    return Paraphrasing(judge, texts), Inversion(judge, network, "red", "green"), Relearning(judge, network)


def test_all_have_one_form_and_leave_no_trace(pipeline):
    see(
        pipeline, prompts(ROWS), ByColour(), Sampling((0,), 2, 2.0, 4)
    )  # diffusers' own sampling leaves its arguments behind
    before = state(pipeline)
    for attack, asked, steps in zip(attacks(pipeline), (2, 2, 2), (0, 2, 2), strict=True):
        record = attack(pipeline, ROWS, (3, 1, 4), COST)
        assert (record["name"], record["prompts"], record["pictures"]) == (attack.name, asked, 3 * asked)
        assert record["steps"] == steps and (record["seconds"] > 0) == (steps > 0) == ("after" in record)
        assert 0 <= record["worst_unlearning_accuracy"] <= record["unlearning_accuracy"] <= 1
        assert attack(pipeline, ROWS, (3, 1, 4), COST) | {"seconds": 0} == record | {"seconds": 0}  # of seeds alone
        assert state(pipeline) == before


def test_the_figures_are_those_of_the_attacked_pictures(pipeline):
    paraphrasing, _, relearning = attacks(pipeline)
    how = Sampling((3, 1, 4), 2, 2.0, 4)
    asked = [{"id": t, "caption": t, "colour": "red"} for t in ("a plain one", "a plain seven")]
    assert paraphrasing(pipeline, ROWS, how.seeds, COST)["unlearning_accuracy"] == gone(
        see(pipeline, asked, ByColour(), how)
    )
    texts = [row["caption"] for row in ROWS]
    again = relearn(pipeline, Plain(), PlainNoising(pipeline.scheduler), PIXELS, texts, COST)
    with again.applied(pipeline):
        wanted = gone(see(pipeline, prompts(ROWS), ByColour(), how))
    record = relearning(pipeline, ROWS, how.seeds, COST)
    assert (record["unlearning_accuracy"], record["after"]) == (wanted, again.after)


def gone(seen) -> float:
    return sum(row["predicted"]["colour"] != "red" for row in seen.samples) / len(seen.samples)


def test_a_concept_without_paraphrases_is_refused(pipeline):
    paraphrasing, *_ = attacks(pipeline)
    with pytest.raises(RecipeError, match="paraphrases of blue: give a list"):
        paraphrasing(pipeline, [{**ROWS[0], "colour": "blue"}], (1,), COST)
