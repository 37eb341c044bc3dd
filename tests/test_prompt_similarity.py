"""Likeness of prompts to a concept: by hand on small vectors, and what the trainer, the collator and a pipeline make of
it."""

import pytest
import tiny_pipelines
import torch
from diffusion_bed import make as of_pipeline
from peft import LoraConfig
from pipeline_bed import both, make, rows

from hf_clmul.errors import RecipeError
from hf_clmul.models.diffusion.encoding import Encoder
from hf_clmul.models.diffusion.similarity import apartness, gate, similarity

SPM_TRAINS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
ANCHORED = {"forget": {"esd": {}}, "retain": {"latent_anchoring": {}}}


def states(*prompts):
    """[N, 2, 2] of four numbers for each prompt."""
    return torch.tensor(prompts, dtype=torch.float64).view(-1, 2, 2)


def test_cosine_with_the_nearest_concept():
    concepts = states([1, 0, 0, 0], [0, 0, 0, 2])
    # Lengths 5, 1 and 2: (3/5, 4/5), (-1, 0) and (1/2, 1/2) with the two concepts
    found = similarity(states([3, 0, 0, 4], [-1, 0, 0, 0], [1, 1, 1, 1]), concepts)
    assert found.tolist() == pytest.approx([0.8, 0.0, 0.5])
    assert similarity(states([0, 0, 0, 0]), concepts).tolist() == [0.0]
    assert similarity(1e3 * concepts, concepts).tolist() == [1.0, 1.0]


def test_apartness_by_hand():
    alike = torch.tensor([1.0, 0.5, 0.0, -0.9])  # 1 - s, at most 1: 0, 1/2, 1, 1, the mean 5/8
    assert apartness(alike).tolist() == pytest.approx([0, 0.8, 1.6, 1.6])
    assert apartness(alike, 2.0).tolist() == pytest.approx([0, 4 / 9, 16 / 9, 16 / 9])  # 0, 1/4, 1, 1: 9/16
    assert apartness(alike, 0.0).tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="every anchor is the concept itself"):
        apartness(torch.ones(3))


def test_examples_to_retain_count_by_their_prompt(tmp_path):
    data = {"forget": rows(("a red seven",), 2, 1), "retain": rows(("a red one", "a red seven", "a blue two"), 6, 2)}
    trainer = make(tmp_path, data, **ANCHORED)
    encoder = trainer.family.encoder
    one, two, seven = (
        encoder.prompt(text)["encoder_hidden_states"] for text in ("a red one", "a blue two", "a red seven")
    )
    shares = 1 - similarity(torch.stack([one, two]), seven[None])
    expected = [float(3 * share / shares.sum()) for share in shares]  # the concept itself counts nothing
    found = [float(example["apartness"]) for example in trainer.train_dataset.roles["retain"]]
    assert found == pytest.approx([expected[0], 0, expected[1]] * 2, abs=1e-6)
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(2)])["retain"]
    said = trainer.family.predict(trainer.model, batch, frozenset({"output"}))
    drawn = [trainer.train_dataset[draw]["retain"]["apartness"] for draw in range(2)]
    assert said.apartness.tolist() == [float(share) for share in drawn]
    plain = make(tmp_path, data, forget={"esd": {}}, retain={"distill": {}})
    assert "apartness" not in plain.train_dataset.roles["retain"][0]


def test_power_of_the_recipe(tmp_path):
    trainer = make(tmp_path, both(), forget={"esd": {}}, retain={"latent_anchoring": {"alpha": 0.0}})
    assert {float(example["apartness"]) for example in trainer.train_dataset.roles["retain"]} == {1.0}


def test_what_has_no_anchors_is_refused(tmp_path):
    same = {"forget": rows(("a red seven",), 2, 1), "retain": rows(("a red seven",), 2, 2)}
    with pytest.raises(RecipeError, match="retain/latent_anchoring: every anchor is the concept itself: give other"):
        make(tmp_path, same, **ANCHORED)
    classes = {"forget": rows(("1",), 2, 1), "retain": rows(("2",), 2, 2)}
    with pytest.raises(RecipeError, match="weighs prompts by their embeddings, and this network reads none"):
        make(tmp_path, classes, pipeline=tiny_pipelines.dit(), **ANCHORED)
    with pytest.raises(RecipeError, match="embeddings, which change as the text encoder trains: take `distill`"):
        of_pipeline(tiny_pipelines.stable_diffusion(), both(), tmp_path, trainable="text_encoder", **ANCHORED)
    learned = {"learn": rows(("a red seven",), 2, 1), "retain": rows(("a red one",), 2, 2)}
    with pytest.raises(RecipeError, match="likeness to those to be forgotten, and there are none: take `distill`"):
        make(tmp_path, learned, learn="denoising", retain=ANCHORED["retain"])


def test_the_adapter_that_spm_trains_loads_at_any_strength(tmp_path):
    """Rank 1 on linear and convolutional layers."""
    config = LoraConfig(r=1, lora_alpha=1, target_modules=SPM_TRAINS)
    trainer = make(tmp_path, both(), **ANCHORED, peft_config=config, max_steps=2, learning_rate=0.05)
    trainer.train()
    trainer.save_model()
    fresh = tiny_pipelines.stable_diffusion()
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([500])
    states = Encoder(fresh).prompt("a red seven")["encoder_hidden_states"][None]

    def output(unet):
        with torch.no_grad():
            return unet(noisy, times, states).sample

    base, tuned = output(fresh.unet), output(trainer.model)
    fresh.load_lora_weights(tmp_path, adapter_name="seven")
    torch.testing.assert_close(output(fresh.unet), tuned, rtol=1e-5, atol=1e-6)
    fresh.set_adapters(["seven"], [0.0])
    torch.testing.assert_close(output(fresh.unet), base, rtol=1e-5, atol=1e-6)
    assert (base - tuned).abs().max() > 1e-3


def test_gate_of_a_prompt():
    encoder = Encoder(tiny_pipelines.stable_diffusion())
    assert gate(encoder, "a seven", ["one", "a seven"]) == pytest.approx(1.0)
    states = [encoder.prompt(text)["encoder_hidden_states"] for text in ("one", "tone")]
    by_embedding = float(similarity(states[0][None], states[1][None]))
    # A token a letter: three of four stand in "one"
    assert gate(encoder, "one", ["tone"]) == pytest.approx(max(by_embedding, 3 / 4))
    assert gate(encoder, "note", ["tone"]) == 1.0  # the same tokens, whatever their order
