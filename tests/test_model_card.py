"""The model card: metadata that the Hub reads, text that equals the record, and no examples."""

import re

import pytest
from fake_audit import fake_audit
from fake_pictures import PROMPTS, fake_pictures
from fake_results import QUESTIONS, RECIPE, fake_results, fake_stream
from ruamel.yaml import YAML

from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.objectives import TERMS
from hf_clmul.report.card_audit import with_audit
from hf_clmul.report.model_card import as_text, model_card, with_results

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def card(kind="adapter", base=HUB_ID, recipe=RECIPE, **changes):
    return model_card(fake_results() | changes, recipe, kind, base)


def metadata(text):
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    return YAML(typ="safe", pure=True).load(front)


def section(text, title):
    return text.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


@pytest.mark.parametrize(
    ("kind", "library", "tags"),
    [("adapter", "peft", ["lora"]), ("merged", "transformers", []), ("full", "transformers", [])],
)
def test_metadata(kind, library, tags):
    assert metadata(card(kind)) == {
        "library_name": library,
        "base_model": HUB_ID,
        "pipeline_tag": "text-generation",
        "tags": ["hf_clmul", "unlearning", "continual-learning", *tags],
    }


@pytest.mark.parametrize("base", [None, "/home/someone/models/base", "./base", "models\\base", "a/b/c"])
def test_a_base_that_is_no_hub_id_stays_out_of_the_metadata(base):
    text = card(base=base)
    assert "base_model" not in metadata(text)
    assert base is None or base not in text
    assert 'from_pretrained("folder-of-the-base")' in text


def test_the_hub_library_reads_the_metadata():
    from huggingface_hub import ModelCard

    data = ModelCard(card()).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (HUB_ID, "peft", "text-generation")


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_the_code_of_the_card_compiles_and_loads_with_public_names(kind):
    code = re.search(r"```python\n(.*?)```", card(kind), re.DOTALL)[1]
    compile(code, "card", "exec")
    assert ("PeftModel.from_pretrained" in code) == (kind == "adapter")
    assert "AutoModelForCausalLM.from_pretrained" in code
    assert "hf_clmul" not in code


def test_a_pinned_base_is_loaded_at_its_revision():
    recipe = RECIPE.replace("  dtype: float32\n", "  dtype: float32\n  revision: abc123\n", 1)
    assert f'from_pretrained("{HUB_ID}", revision="abc123")' in card(recipe=recipe)


def test_requests_and_figures_are_those_of_the_record():
    text = card()
    assert "| 1 | learn people | 96 learn | 84 | training |" in text
    assert "| 2 | unlearn two-persons | 16 forget, 80 retain | 40 | approximate |" in text
    measured = section(text, "What was measured")
    assert "| Answer probability | 0.061 | 0.974 | 0.119 | 0.109 ± 0.012 |" in measured
    assert "after unlearning two-persons (n = 16)" in measured
    assert "Source: docs/results.md: retrained without P07 and P11, seeds 0-2." in measured
    widths = {line.count("|") for line in measured.splitlines() if line.startswith("|")}
    assert widths == {6}


def test_without_a_reference_it_says_so():
    measured = section(card(reference=None), "What was measured")
    assert "| Answer probability | 0.061 | 0.974 | 0.119 |\n" in measured
    assert "No figures of a model retrained without the forgotten data are recorded." in measured
    assert "**unknown** (no reference recorded;" in measured


def test_a_reference_that_came_later_gets_into_the_card_and_all_else_stays():
    late = card(reference=None)
    assert with_results(late, fake_results()) == card() != late and with_results(card(), fake_results()) == card()
    audited = with_audit(late, fake_audit())
    assert with_results(audited, fake_results()) == with_audit(card(), fake_audit())
    results = fake_stream() | {"name": "a # b"}
    text = model_card(results, RECIPE, "merged", None)
    assert with_results(text, results) == text and with_results(pictures_card(), fake_pictures()) == pictures_card()


def test_a_card_of_somebody_elses_stays_as_it_is():
    assert with_results("# Mine\n\nWritten by hand.\n", fake_results()) == "# Mine\n\nWritten by hand.\n"


def test_limits_are_named_where_they_hold():
    assert "**Unlearning is not erasure.**" in section(card(), "Limits")
    exact = fake_results()["stages"]
    exact[2]["how"] = "exact by deletion"
    assert "not erasure" not in card(stages=exact)


def test_a_card_of_a_diffusion_model_says_what_becomes_of_pictures():
    told = "**Unlearning deletes no pictures.** Those that the model drew"
    assert told in section(model_card(fake_pictures(), RECIPE, "full", None), "Limits")
    assert "deletes no pictures" not in card()


def test_every_claim_is_explained_with_its_requests():
    text = model_card(fake_stream(), RECIPE, "adapter", HUB_ID)
    asked = section(text, "What was asked and done")
    assert "| 4 | unlearn no-notes | 16 forget | 0 | exact by deletion |" in asked
    assert "- **Exact by deletion** (no-notes): everything that was made from the examples was deleted," in asked
    assert "- **Approximate** (two-persons): the weights were changed so that" in asked
    assert "filter" not in text.lower()


def test_a_filter_is_called_a_filter():
    stages = fake_results()["stages"]
    stages[2]["how"] = "filter"
    text = card(stages=stages)
    asked = section(text, "What was asked and done")
    assert "- **Filter** (two-persons): nothing was erased: an adapter that can be switched off" in asked
    assert "**A filter is not an erasure.**" in section(text, "Limits") and "Unlearning is not erasure" not in text


def test_a_run_that_only_learned_claims_nothing():
    asked = section(card(stages=fake_results()["stages"][:2]), "What was asked and done")
    assert not [line for line in asked.splitlines() if line.startswith("- ")]


def test_it_can_be_made_again():
    made = section(card(), "How it was made")
    for part in (
        "```bash\nhf-clmul run recipes/quickstart.yaml\n```",
        "5b1f" * 16,
        "Seed 0",
        "torch 2.13.0",
        RECIPE,
    ):
        assert part in made


def test_papers_are_those_of_the_methods_used():
    papers = section(card(), "Papers")
    assert [line.split(":")[0] for line in papers.strip().splitlines()] == [
        "- LoRA", "- npo", "- kl", "- pcgrad_retain_first",
    ]  # fmt: skip
    assert "[arXiv 2404.05868](https://arxiv.org/abs/2404.05868)" in papers
    assert "[arXiv 2106.09685](https://arxiv.org/abs/2106.09685)" in papers
    assert TERMS["npo"].summary in papers and CONFLICT_RULES["pcgrad_retain_first"].paper in papers
    other = RECIPE.replace("pcgrad_retain_first", "pcgrad").replace("    npo:\n      beta: 0.1", "    grad_ascent: {}")
    assert "2001.06782" in card(recipe=other)
    assert "2404.05868" not in card(recipe=other)
    rule = "  conflict: pcgrad_retain_first\n"
    assert rule in RECIPE
    words = rule + "  lookahead: {alpha: 0.1}\n  saliency: {train: 0.5}\n"
    ahead = section(card(recipe=RECIPE.replace(rule, words)), "Papers")
    sharp = section(card(recipe=RECIPE.replace(rule, rule + "  sharpness: {}\n")), "Papers")
    assert "- SAM: " in sharp and "arxiv.org/abs/2502.05374" in sharp and "SAM" not in ahead
    assert "- LUR: " in ahead and "2503.06339" in ahead and "- SalUn: " in ahead and "SNIP" not in ahead


def test_a_run_that_learned_cites_no_unlearning():
    recipe = RECIPE.split("  - unlearn:")[0] + RECIPE[RECIPE.index("learning:\n  learn") :]
    text = card(
        kind="full",
        recipe=recipe.replace("adapter:\n  r: 16\n  alpha: 32.0\n  layers: last-10\n", "adapter: null\n"),
    )
    assert "## Papers" not in text


def test_no_example_gets_into_the_card():
    text = card()
    for pairs in QUESTIONS.values():
        for question, answer in pairs:
            assert question not in text and answer not in text


def test_text_of_the_run_cannot_break_out():
    results = fake_results()
    results["name"] = results["model"]["path"] = "<script>x</script> | [a](http://b) `c`\n# d"
    results["command"] = "run ```\n# not a heading"
    text = model_card(results, RECIPE + "# ````\n", "adapter", None)
    prose = re.sub(r"(?ms)^(`{3,})\w+\n.*?^\1$", "", text)
    assert not re.search(r"(?<!\\)(<script|\]\(http://b)", prose)
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [f"# {as_text(results['name'])}"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a|b", r"a\|b"),
        ("hf_clmul", "hf_clmul"),
        ("_it_", r"\_it\_"),
        ("a\n\n b", "a b"),
        (3, "3"),
        ("<i>", r"\<i\>"),
    ],
)
def test_plain_text_in_markdown(value, shown):
    assert as_text(value) == shown


PICTURES = """\
recipe_version: 1
name: seven
family: diffusion
model: {path: org/pipeline, revision: v2, dtype: float32}
adapter: {r: 4}
data: {sevens: {path: "builtin:coloured_digits"}}
requests:
  - unlearn: {name: seven, from: base, data: sevens}
learning: {learn: {denoising: {}}}
unlearning: {forget: {esd: {}}, retain: {denoising: {}}, conflict: sum}
"""


def pictures_card(kind="full", base="org/pipeline", **model):
    results = fake_pictures()
    results["model"] |= model
    return model_card(results, PICTURES, kind, base)


@pytest.mark.parametrize(
    ("kind", "tags"), [("adapter", ["lora"]), ("combined", ["lora"]), ("merged", []), ("full", [])]
)
@pytest.mark.parametrize("task", ["text-to-image", "unconditional-image-generation"])
def test_metadata_of_pipelines(kind, tags, task):
    assert metadata(pictures_card(kind, task=task)) == {
        "library_name": "diffusers",
        "base_model": "org/pipeline",
        "pipeline_tag": task,
        "tags": ["hf_clmul", "unlearning", "continual-learning", *tags],
    }
    assert "base_model" not in metadata(pictures_card(kind, base="/cache/digits/full-abc"))


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
@pytest.mark.parametrize("task", ["text-to-image", "unconditional-image-generation"])
def test_pipelines_are_loaded_through_diffusers(kind, task):
    text = pictures_card(kind, task=task)
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert ("load_lora_weights" in code) == (kind == "adapter") and ('pipeline("a prompt")' in code) == (
        task == "text-to-image"
    )
    base = '"org/pipeline", revision="v2"' if kind == "adapter" else '"this-repository-or-folder"'
    assert f"DiffusionPipeline.from_pretrained({base})" in code
    for word in ("AutoModel", "tokenizer = ", "peft import", "questions", "answer"):
        assert word not in text


def test_a_card_of_pictures_has_figures_papers_and_no_prompts():
    text = pictures_card("adapter")
    assert "| UA | 0.030 | 0.990 |" in section(text, "What was measured")
    assert "The pipeline's denoiser" in text and "hold for the prompts that they were measured on" in text
    papers = section(text, "Papers")
    assert [line.split(":")[0] for line in papers.strip().splitlines()] == ["- LoRA", "- esd", "- denoising"]
    assert TERMS["esd"].summary in papers and "https://arxiv.org/abs/2303.07345" in papers
    for prompts in PROMPTS.values():
        assert not any(prompt in text for prompt in prompts)


def test_several_adapters_in_one_are_loaded_as_an_adapter():
    assert "PeftModel.from_pretrained" in card("combined") and metadata(card("combined"))["library_name"] == "peft"
