"""Inversion and relearning: both lower the loss that they go down, and leave the pipeline exactly as it was."""

from types import SimpleNamespace

import pytest
import torch
from image_fixtures import ByColour, Plain, PlainNoising, stable_diffusion, unconditional
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from hf_clmul.errors import RecipeError, RunError
from hf_clmul.evaluation.images.concepts import Sampling, see
from hf_clmul.evaluation.images.denoising import Descent, draw, losses, mean_loss, probe
from hf_clmul.evaluation.images.inversion import PLACEHOLDER, disguised, invert
from hf_clmul.evaluation.images.new_token import embedded
from hf_clmul.evaluation.images.paraphrases import paraphrased
from hf_clmul.evaluation.images.relearning import relearn
from hf_clmul.evaluation.images.sampling import sample
from hf_clmul.hashes import tensors_sha256

PIXELS = torch.linspace(-1, 1, 3 * 3 * 64).reshape(3, 3, 8, 8)
PROMPTS = [f"a red {PLACEHOLDER}", f"a green {PLACEHOLDER}", f"a {PLACEHOLDER}"]
PLAINLY = ["a red seven", "a green seven", "a seven"]
HOW = Descent(steps=10, learning_rate=0.02, batch_size=4, seed=5)


@pytest.fixture
def pipeline():
    return stable_diffusion()


@pytest.fixture
def noising(pipeline):
    return PlainNoising(pipeline.scheduler)


class Remembered(PlainNoising):
    """The data target is what the network itself says to "a seven": the token can reach it, and then the loss is 0."""

    def __init__(self, pipeline) -> None:
        super().__init__(pipeline.scheduler)
        self.pipeline = pipeline

    def target(self, clean, noise, times):
        with torch.no_grad():
            told = Plain().encode_prompts(self.pipeline, ["a seven"] * len(clean))
            return Plain().call(self.pipeline.unet, self.add_noise(clean, noise, times), times, told)


def state(pipeline) -> dict:
    """All of a pipeline that an attack could change."""
    parts = {name: getattr(pipeline, name) for name in ("unet", "vae", "text_encoder")}
    modules = [(name, key, module) for name, part in parts.items() for key, module in part.named_modules()]
    return {
        "components": {name: id(part) for name, part in pipeline.components.items()},
        "weights": {name: tensors_sha256(part.state_dict()) for name, part in parts.items()},
        "parameters": {name: [id(p) for p in part.parameters()] for name, part in parts.items()},
        "flags": [p.requires_grad for part in parts.values() for p in part.parameters()],
        "gradients": [
            None if p.grad is None else p.grad.sum().item() for part in parts.values() for p in part.parameters()
        ],
        "modes": [module.training for _, _, module in modules],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for _, _, module in modules],
        "vocabulary": sorted(pipeline.tokenizer.get_vocab().items()),
        "tokens": pipeline.tokenizer([*PROMPTS, *PLAINLY]).input_ids,
        "attributes": sorted(vars(pipeline)),
        "config": repr(pipeline.config),
        "noise": tuple(torch.get_rng_state().tolist()),
    }


def mixed(pipeline):
    """With modes, flags and gradients that differ from part to part."""
    pipeline.unet.train()
    pipeline.unet.mid_block.eval()
    pipeline.text_encoder.requires_grad_(False)
    parameter = next(pipeline.unet.parameters())
    parameter.grad = torch.ones_like(parameter)
    return pipeline


def test_inversion_finds_the_word_again_and_leaves_no_trace(pipeline):
    before = state(mixed(pipeline))
    arguments = (pipeline, Plain(), Remembered(pipeline), PIXELS, [f"a {PLACEHOLDER}"] * 3)
    found = invert(*arguments, HOW, initial="one")
    assert state(pipeline) == before
    assert found.after < 0.4 * found.before and len(found.losses) == found.steps == 10 and found.seconds > 0
    assert found.embeddings["text_encoder"].shape == (16,) and not found.embeddings["text_encoder"].requires_grad
    again = invert(*arguments, HOW, initial="one")
    assert again.losses == found.losses and torch.equal(*(i.embeddings["text_encoder"] for i in (found, again)))
    other = invert(*arguments, Descent(2, 0.02, 4, seed=6), initial="one")
    assert other.losses[0] != found.losses[0]


def test_the_token_begins_as_the_initial_word(pipeline, noising):
    none = Descent(steps=0, learning_rate=1.0, batch_size=1, seed=0)
    found = invert(pipeline, Plain(), noising, PIXELS, PROMPTS, none, initial="seven")
    [token] = pipeline.tokenizer("seven", add_special_tokens=False).input_ids
    assert torch.equal(found.embeddings["text_encoder"], pipeline.text_encoder.get_input_embeddings().weight[token])
    plain = sample(pipeline, PLAINLY, [0], 2, 3.0, 4)
    with found.applied(pipeline):
        assert torch.equal(sample(pipeline, PROMPTS, [0], 2, 3.0, 4), plain)
    letters = invert(pipeline, Plain(), noising, PIXELS, PROMPTS, none, initial="xy")  # a word of two tokens
    tokens = pipeline.tokenizer("xy", add_special_tokens=False).input_ids
    mean = pipeline.text_encoder.get_input_embeddings().weight[tokens].mean(0)
    assert len(tokens) == 2 and torch.equal(letters.embeddings["text_encoder"], mean)


def test_the_token_is_sampled_with_and_then_unknown_again(pipeline, noising):
    found = invert(pipeline, Plain(), noising, PIXELS, PROMPTS, HOW, initial="seven")
    usual = sample(pipeline, PLAINLY, [0], 2, 3.0, 4)
    before = state(pipeline)
    with found.applied(pipeline):
        assert (sample(pipeline, PROMPTS, [0], 2, 3.0, 4) - usual).abs().max() > 1e-3
        assert torch.equal(sample(pipeline, PLAINLY, [0], 2, 3.0, 4), usual), "other prompts are not touched"
        with pytest.raises(RunError, match="already knows"), found.applied(pipeline):
            pass
        rows = disguised([{"id": "p", "caption": "a red seven", "colour": "red"}], "seven")
        assert see(pipeline, rows, ByColour(), Sampling((0,), 2, 3.0, 1)).samples[0]["caption"] == PROMPTS[0]
    assert state(pipeline) == before


def test_a_failed_inversion_leaves_no_trace_either(pipeline, noising):
    before = state(mixed(pipeline))
    long = f"a green red plain picture one seven {PLACEHOLDER}"
    with pytest.raises(RunError, match=r"not in the first 8 tokens.*text_encoder"):
        invert(pipeline, Plain(), noising, PIXELS[:1], [long], HOW, initial="seven")
    with pytest.raises(RunError, match="the loss is nan after step"):
        invert(pipeline, Plain(), noising, PIXELS * torch.nan, PROMPTS, HOW, initial="seven")
    assert state(pipeline) == before


class Cached(Plain):
    def encode_prompts(self, pipeline, prompts):
        return {name: values.detach() for name, values in super().encode_prompts(pipeline, prompts).items()}


def test_inversions_that_cannot_be_are_refused(pipeline, noising):
    for arguments, found in (
        ((pipeline, Cached(), noising, PIXELS, PROMPTS), "inversion: no gradient of the loss reaches"),
        ((pipeline, Plain(), noising, PIXELS, PROMPTS[:2]), "3 images, 2 prompts"),
        ((pipeline, Plain(), noising, PIXELS[:0], []), "at least one image"),
        ((unconditional(), Plain(), noising, PIXELS, PROMPTS), "DDPMPipeline has none"),
    ):
        with pytest.raises(RunError, match=found):
            invert(*arguments, HOW, initial="seven")


def test_a_family_that_encodes_without_gradient_is_unwrapped(pipeline, noising):
    plain = Plain()
    quiet = SimpleNamespace(
        component="unet", encode_images=plain.encode_images, call=plain.call,
        encode_prompts=torch.no_grad()(lambda pipeline, prompts: plain.encode_prompts(pipeline, prompts)),
    )  # fmt: skip
    short = Descent(steps=2, learning_rate=0.2, batch_size=4, seed=5)
    found = [invert(pipeline, kind, noising, PIXELS, PROMPTS, short, initial="seven") for kind in (plain, quiet)]
    assert found[0].losses == found[1].losses


def test_disguised_prompts():
    rows = [{"id": "p", "caption": "a red seven, seventeen", "digit": "seven"}]
    assert disguised(rows, "seven") == [{**rows[0], "caption": f"a red {PLACEHOLDER}, seventeen"}]
    assert rows[0]["caption"] == "a red seven, seventeen"
    with pytest.raises(RecipeError, match="prompt p: .*no word 'eight'"):
        disguised(rows, "eight")


def test_clip_with_the_old_end_token_still_finds_the_end_of_a_prompt():
    torch.manual_seed(0)
    config = {
        "vocab_size": 12,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    old = CLIPTextModel(CLIPTextConfig(**config, eos_token_id=2)).eval()  # takes the highest number for the end
    with torch.no_grad():
        usual = old(torch.tensor([[0, 5, 7, 11]])).pooler_output
        vector = old.get_input_embeddings().weight[7].clone()
        with embedded(old, 99, vector, ordinary=3):
            assert torch.equal(old(torch.tensor([[0, 5, 99, 11]])).pooler_output, usual)
            assert torch.equal(old(input_ids=torch.tensor([[0, 5, 99, 11]])).pooler_output, usual)
            assert torch.equal(old(torch.tensor([[0, 5, 7, 11]])).pooler_output, usual)


def test_t5_gets_the_embedding_too():
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).eval()
    with torch.no_grad():
        usual = t5(torch.tensor([[3, 9, 1]])).last_hidden_state
        with embedded(t5, 20, t5.get_input_embeddings().weight[9].clone(), ordinary=3):
            assert torch.equal(t5(torch.tensor([[3, 20, 1]])).last_hidden_state, usual)


def test_relearning_lowers_the_loss_on_a_copy(pipeline, noising):
    before = state(mixed(pipeline))
    how = Descent(steps=8, learning_rate=5e-3, batch_size=4, seed=5)
    found = relearn(pipeline, Plain(), noising, PIXELS, PLAINLY, how)
    assert state(pipeline) == before
    assert found.after < 0.95 * found.before and len(found.losses) == found.steps == 8 and found.seconds > 0
    assert tensors_sha256(found.denoiser.state_dict()) != before["weights"]["unet"]
    assert all(parameter.grad is None for parameter in found.denoiser.parameters())
    again = relearn(pipeline, Plain(), noising, PIXELS, PLAINLY, how)
    assert again.losses == found.losses
    assert tensors_sha256(again.denoiser.state_dict()) == tensors_sha256(found.denoiser.state_dict())
    usual = sample(pipeline, PLAINLY, [0], 2, 3.0, 4)
    with found.applied(pipeline):
        assert (sample(pipeline, PLAINLY, [0], 2, 3.0, 4) - usual).abs().max() > 1e-3
    assert torch.equal(sample(pipeline, PLAINLY, [0], 2, 3.0, 4), usual)


def test_relearning_may_train_a_part(pipeline, noising):
    how = Descent(steps=2, learning_rate=3e-3, batch_size=2, seed=5)
    found = relearn(pipeline, Plain(), noising, PIXELS, PLAINLY, how, trained=r".*\.attn2\.to_[kv]\..*")
    changed = {
        name for (name, a), b in zip(pipeline.unet.named_parameters(), found.denoiser.parameters(), strict=True)
        if not torch.equal(a, b)
    }  # fmt: skip
    assert changed and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in changed)
    with pytest.raises(RunError, match="no parameter of the denoiser is called 'nothing'"):
        relearn(pipeline, Plain(), noising, PIXELS, PLAINLY, how, trained="nothing")


def test_the_loss_is_weighted_and_a_mean_over_elements():
    class Zero(Plain):
        def call(self, model, noisy, times, conditioning):
            return torch.zeros_like(noisy)

    noising = SimpleNamespace(
        times=lambda u: 10 * u, add_noise=lambda clean, noise, times: clean, weights=lambda times: times,
        target=lambda clean, noise, times: noise,
    )  # fmt: skip
    clean = torch.zeros(5, 1, 2, 2)
    draws = draw(torch.Generator().manual_seed(0), clean, 3)
    found = losses(torch.nn.Identity(), Zero(), noising, clean, draws, {})
    torch.testing.assert_close(found, 10 * draws.u * (draws.noise**2).mean((1, 2, 3)))
    fixed = probe(torch.Generator().manual_seed(0), clean)
    assert sorted(fixed.images.tolist()) == sorted([*range(5)] * 4)
    assert sorted(fixed.u.tolist()) == pytest.approx([(i + 0.5) / 20 for i in range(20)])
    means = [mean_loss(lambda some: some.u * some.images, fixed, size) for size in (3, 100)]
    assert means == pytest.approx([float((fixed.u * fixed.images).mean())] * 2)


def test_paraphrases_fix_the_concept_alone():
    assert paraphrased("digit", {"seven": ["the number 7", "a 7"], "one": ["a 1"]}) == [
        {"id": "seven/paraphrase-0", "caption": "the number 7", "digit": "seven"},
        {"id": "seven/paraphrase-1", "caption": "a 7", "digit": "seven"},
        {"id": "one/paraphrase-0", "caption": "a 1", "digit": "one"},
    ]
    for texts in ([], ["a 7", "a 7"], "a 7"):
        with pytest.raises(RecipeError, match="seven"):
            paraphrased("digit", {"seven": texts})
