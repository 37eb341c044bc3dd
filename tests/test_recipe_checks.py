"""The exact words and places of every kind of mistake in a recipe."""

from pathlib import Path

import pytest
from small_recipe import changed, problems, write

from hf_clmul.evaluation import IN_RECIPES
from hf_clmul.gradients.conflict import CONFLICT_RULES
from hf_clmul.models import FAMILIES, TEACHERS
from hf_clmul.objectives import COUNTERPARTS, TERMS, terms_of
from hf_clmul.recipe.load import dump_recipe, load_recipe
from hf_clmul.recipe.problems import one_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes are written to, and named relative to, a folder that holds the small recipe's data."""
    (tmp_path / "notes.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What is changed in the recipe, and the one line that must come of it.
MISTAKES = {
    "unknown parameter": ("{beta: 0.2}", "{betta: 0.2}",
        "r.yaml:14: unlearning.forget.npo.betta: unknown parameter; expected one of beta, weight; found "
        "'betta'; did you mean 'beta'?"),
    "parameter out of bounds": ("{beta: 0.2}", "{beta: 0}",
        "r.yaml:14: unlearning.forget.npo.beta: expected a number above 0; found 0"),
    "weight as text": ("{beta: 0.2}", "{weight: '2'}",
        "r.yaml:14: unlearning.forget.npo.weight: expected a number; found the text '2'; remove the quotes"),
    "unknown term": ("{npo:", "{npoo:",
        "r.yaml:14: unlearning.forget.npoo: unknown forget term; expected <forget terms>; "
        "found 'npoo'; did you mean 'npo'?"),
    "term in a role it does not have": ("{npo: {beta: 0.2}}", "{kl: {}}",
        "r.yaml:14: unlearning.forget.kl: is a term for <roles of kl> and not for forget; "
        "expected <forget terms>; found 'kl'"),
    "term of another family": ("{npo: {beta: 0.2}}", "{esd: {}}",
        "r.yaml:14: unlearning.forget.esd: is a term for diffusion models and not for language models; expected "
        "<forget terms>; found 'esd'; did you mean 'elm'?"),
    "term of language models": ("name: small\n", "name: small\nfamily: diffusion\n",
        "r.yaml:15: unlearning.forget.npo: is a term for language models and not for diffusion models; expected "
        "<forget terms of diffusion>; found 'npo'; did you mean 'esd'?"),
    "no forget term": ("{npo: {beta: 0.2}}", "{}",
        "r.yaml:14: unlearning.forget: names no term; expected <forget terms>"),
    "two sources of second answers": ("{npo: {beta: 0.2}}", "{dpo: {}, npo: {}, idk: {}}",
        "r.yaml:14: unlearning.forget: dpo and idk ask for different second answers (column and refusal), and an "
        "example gets one at a time: take one of them, or put them into two requests."),
    "an edit beside another term": ("forget: {npo: {beta: 0.2}}", "forget: {task_vector: {}, npo: {}}\n  retain: {}",
        "r.yaml:14: unlearning.forget: task_vector is an edit, which takes no step and stands alone: put the other terms "
        "into a further request."),
    "an edit and a retain term": ("{npo: {beta: 0.2}}", "{task_vector: {}}",
        "r.yaml:14: unlearning.forget.task_vector: is an edit, which takes no step, so that no retain term can act; add "
        "`retain: {}` to `unlearning`"),
    "an edit and a penalty": ("forget: {npo: {beta: 0.2}}",
        "forget: {task_vector: {}}\n  retain: {}\n  penalties: {l1_sp: {}}",
        "r.yaml:16: unlearning.penalties: task_vector is an edit, which takes no step, so that penalties cannot act; remove it, "
        "or take another forget term"),
    "unknown penalty to unlearn with": ("  forget: {npo: {beta: 0.2}}", "  penalties: {l2: {}}",
        "r.yaml:14: unlearning.penalties.l2: unknown penalty; expected one of ewc, o_lora, n_lora, l1_sp, l2_sp; found 'l2'"),
    "protected prompts of a language model": ("forget: {npo: {beta: 0.2}}",
        "forget: {npo: {beta: 0.2}}\n  protect: {}",
        "r.yaml:15: unlearning.protect: is for diffusion models, whose cross-attention reads prompts; remove it"),
    "an edit with a weight": ("forget: {npo: {beta: 0.2}}", "forget: {task_vector: {weight: 2}}\n  retain: {}",
        "r.yaml:14: unlearning.forget.task_vector.weight: unknown parameter; expected one of scale, epochs, learning_rate; "
        "found 'weight'"),
    "an edit of an adapter": ("unlearning:\n  forget: {npo: {beta: 0.2}}",
        "adapter: {r: 4}\nunlearning:\n  forget: {task_vector: {}}\n  retain: {}",
        "r.yaml:13: adapter: task_vector works on whole weights, and to negate an adapter's factors is not to negate their "
        "product; remove `adapter`, or take another forget term"),
    "the base as a teacher, without an adapter": ("{npo: {beta: 0.2}}", "{bad_teacher: {weights: base}}",
        "r.yaml:14: unlearning.forget.bad_teacher.weights: `base` is the model below its adapter, and without `adapter` all its "
        "weights learn; add `adapter`, or take `uniform`"),
    "the base as a teacher of what it knows itself": (
        "people, where: {person: [P01, P02]}}\nlearning:\n  training: {learning_rate: 2e-3, num_train_epochs: 3}\n"
        "unlearning:\n  forget: {npo: {beta: 0.2}}",
        "base, data: notes}\nadapter: {r: 4}\nunlearning:\n  forget: {bad_teacher: {weights: base}}",
        "r.yaml:10: requests.2.unlearn.from: what the base knows is to be forgotten, and `bad_teacher` with `weights: base` would "
        "teach just that; take `weights: uniform`"),
    "unknown section": ("learning:\n  training: {learning_rate: 2", "lerning:\n  training: {learning_rate: 2",
        "r.yaml:11: lerning: unknown key; expected one of recipe_version, name, seed, family, model, diffusion, "
        "adapter, memory, data, requests, "
        "learning, unlearning, teacher, training, evaluation, audit, export; found 'lerning'; did you mean "
        "'learning'?"),
    "misspelled required key": ("requests:", "reqests:",
        "r.yaml:7: reqests: unknown key; expected one of recipe_version, name, seed, family, model, diffusion, "
        "adapter, memory, data, requests, "
        "learning, unlearning, teacher, training, evaluation, audit, export; found 'reqests'; did you mean "
        "'requests'?"),
    "training field in the wrong section": ("{npo: {beta: 0.2}}\n", "{npo: {beta: 0.2}}\n  bf16: true\n",
        "r.yaml:15: unlearning.bf16: unknown key; expected one of forget, retain, memory, penalties, gamma, conflict, "
        "lookahead, sharpness, saliency, protect, trainable, training; found 'bf16'; it belongs under `unlearning.training`"),
    "key of another section": ("name: small\n", "name: small\nconflict: sum\n",
        "r.yaml:3: conflict: unknown key; expected one of recipe_version, name, seed, family, model, diffusion, "
        "adapter, memory, data, requests, "
        "learning, unlearning, teacher, training, evaluation, audit, export; found 'conflict'; it belongs under "
        "`learning` or `unlearning`"),
    "missing section": ("model: {path: some/model}\n", "",
        "r.yaml:1: model: missing; expected a section with `path` or `scratch`"),
    "missing key of a request": ("{task: people, data: people}", "{task: people}",
        "r.yaml:8: requests.0.learn.data: missing; expected a name from the section `data`"),
    "newer version": ("recipe_version: 1", "recipe_version: 2",
        "r.yaml:1: recipe_version: expected 1; found 2"),
    "list for a number": ("persons: 4", "persons: [4]",
        "r.yaml:5: data.people.persons: expected a whole number; found the list [4]"),
    "flag for a number": ("persons: 4", "persons: true",
        "r.yaml:5: data.people.persons: expected a whole number; found true"),
    "number for text": ("name: small", "name: 2024",
        "r.yaml:2: name: expected text; found 2024; put it in quotes"),
    "name that is no file name": ("name: small", "name: My Recipe",
        "r.yaml:2: name: expected lower-case letters, digits, - and _ only; found the text 'My Recipe'"),
    "wrong choice": ("{path: some/model}", "{path: some/model, dtype: float23}",
        "r.yaml:3: model.dtype: expected one of float32, bfloat16, float16; found the text 'float23'; did "
        "you mean 'float32'?"),
    "union": ("name: small\n", "name: small\nadapter: {target_modules: 3}\n",
        "r.yaml:3: adapter.target_modules: expected all-linear, attention or a list of module names; found 3"),
    "no layers": ("name: small\n", "name: small\nadapter: {layers: last-0}\n",
        "r.yaml:3: adapter.layers: trains no layer; expected last-1 or more; found the text 'last-0'"),
    "text for a section": ("{path: some/model}", "some/model",
        "r.yaml:3: model: expected a section (key: value); found the text 'some/model'"),
    "unknown kind of request": ("- unlearn: {name", "- unlern: {name",
        "r.yaml:10: requests.2: expected one of `learn: {...}` and `unlearn: {...}`; found a section with "
        "the keys unlern; did you mean 'unlearn'?"),
    "two requests in one": ("- learn: {task: notes, data: notes}\n  - unlearn:", "- learn: {task: notes, "
    "data: notes}\n    unlearn:",
        "r.yaml:9: requests.1: expected one of `learn: {...}` and `unlearn: {...}`; found a section with "
        "the keys learn, unlearn"),
    "unknown data set": ("data: notes}", "data: note}",
        "r.yaml:9: requests.1.learn.data: unknown data set; expected one of people, notes; found 'note'; "
        "did you mean 'notes'?"),
    "unknown task": ("from: people", "from: peple",
        "r.yaml:10: requests.2.unlearn.from: unknown task; expected one of people, notes; found 'peple'; "
        "did you mean 'people'?"),
    "task learned twice": ("task: notes", "task: people",
        "r.yaml:9: requests.1.learn.task: the task 'people' is already learned by requests.0, from other data; give "
        "each task its own name"),
    "unlearn before learn": ("requests:\n", "requests:\n  - unlearn: {name: early, from: notes}\n",
        "r.yaml:8: requests.0.unlearn.from: 'notes' is learned later, by requests.2; move this request "
        "behind it"),
    "empty forget set": ("[P01, P02]", "[]",
        "r.yaml:10: requests.2.unlearn.where.person: chooses no row; expected at least one value; found an "
        "empty list; "
        "leave it out to forget the whole task"),
    "empty where": ("{person: [P01, P02]}", "{}",
        "r.yaml:10: requests.2.unlearn.where: names no column; expected a column and its values; leave it "
        "out to forget the whole task"),
    "unknown data to forget": ("where: {person: [P01, P02]}", "data: peple",
        "r.yaml:10: requests.2.unlearn.data: unknown data set; expected one of people, notes; found 'peple'; "
        "did you mean 'people'?"),
    "two forget sets": ("where: {person: [P01, P02]}", "where: {person: [P01]}, data: people",
        "r.yaml:10: requests.2.unlearn.data: given beside requests.2.unlearn.where; remove one of the two"),
    "rows to forget in place of a name": ("where: {person: [P01, P02]}", "data: {path: notes.jsonl}",
        "r.yaml:10: requests.2.unlearn.data: expected text; found a section with the keys path"),
    "unknown rule": ("unlearning:\n", "unlearning:\n  conflict: pcgard\n",
        "r.yaml:14: unlearning.conflict: unknown conflict rule; expected <rules>; found 'pcgard'; "
        "did you mean 'pcgrad'?"),
    "unknown rule with parameters": ("unlearning:\n", "unlearning:\n  conflict: {agen: {margin: 0.1}}\n",
        "r.yaml:14: unlearning.conflict.agen: unknown conflict rule; expected <rules>; found 'agen'; "
        "did you mean 'agem'?"),
    "unknown rule parameter": ("unlearning:\n", "unlearning:\n  conflict: {agem: {magin: 0.1}}\n",
        "r.yaml:14: unlearning.conflict.agem.magin: unknown parameter; expected margin; found 'magin'; "
        "did you mean 'margin'?"),
    "parameter of a rule without": ("unlearning:\n", "unlearning:\n  conflict: {mgda: {c: 0.1}}\n",
        "r.yaml:14: unlearning.conflict.mgda.c: unknown parameter; expected none; found 'c'"),
    "rule parameter out of bounds": ("unlearning:\n", "unlearning:\n  conflict: {cagrad: {c: 1}}\n",
        "r.yaml:14: unlearning.conflict.cagrad.c: expected a number below 1; found 1"),
    "rule parameter of the wrong kind": ("unlearning:\n", "unlearning:\n  conflict: {gru: {cos_clip: '-0.5'}}\n",
        "r.yaml:14: unlearning.conflict.gru.cos_clip: expected a number; found the text '-0.5'; remove the "
        "quotes"),
    "rule parameter with names": ("unlearning:\n", "unlearning:\n  conflict: {bisector: {length: nahs}}\n",
        "r.yaml:14: unlearning.conflict.bisector.length: expected one of imtl, nash, unit; found the text "
        "'nahs'; did you mean 'nash'?"),
    "two rules": ("unlearning:\n", "unlearning:\n  conflict: {agem: {}, mgda: {}}\n",
        "r.yaml:14: unlearning.conflict: must name one rule; expected <rules>; found 'agem, mgda'"),
    "no rule": ("unlearning:\n", "unlearning:\n  conflict: {}\n",
        "r.yaml:14: unlearning.conflict: must name one rule; expected <rules>"),
    "rule of the wrong kind": ("unlearning:\n", "unlearning:\n  conflict: 3\n",
        "r.yaml:14: unlearning.conflict: expected a conflict rule, or {rule: {parameter: value}}, such as "
        "{agem: {margin: 0.1}}; found 3"),
    "unknown teacher": ("name: small\n", "name: small\nteacher: before\n",
        "r.yaml:3: teacher: unknown teacher; expected <teachers>; found 'before'; did you mean "
        "'before_request'?"),
    "unknown suite": ("name: small\n", "name: small\nevaluation: {suites: [basics]}\n",
        "r.yaml:3: evaluation.suites.0: unknown suite; expected <suites>; found 'basics'; did you mean "
        "'basic'?"),
    "unknown family": ("name: small\n", "name: small\nfamily: causal\n",
        "r.yaml:3: family: unknown family; expected <families>; found 'causal'; did you mean 'causal_lm'?"),
    "family of the wrong kind": ("name: small\n", "name: small\nfamily: [diffusion]\n",
        "r.yaml:3: family: expected text; found the list ['diffusion']"),
    "unknown held-out set": ("name: small\n", "name: small\nevaluation: {held_out: rest}\n",
        "r.yaml:3: evaluation.held_out: unknown data set; expected one of people, notes; found 'rest'"),
    "unknown split": ("persons: 4", "split: heldout",
        "r.yaml:5: data.people.split: unknown split; expected one of train, held_out; found 'heldout'; did "
        "you mean 'held_out'?"),
    "persons of a file": ("{path: notes.jsonl}", "{path: notes.jsonl, persons: 3}",
        "r.yaml:6: data.notes.persons: is for built-in data only; choose rows with `where`, or remove it"),
    "two models": ("{path: some/model}", "{path: some/model, scratch: {vocab_size: 300, layers: 1, hidden: "
    "8, heads: 2}}",
        "r.yaml:3: model.scratch: given beside model.path; remove one of the two"),
    "no model": ("{path: some/model}", "{dtype: float32}",
        "r.yaml:3: model: names no model; expected path or scratch"),
    "odd heads": ("{path: some/model}", "{scratch: {vocab_size: 300, layers: 1, hidden: 6, heads: 2}}",
        "r.yaml:3: model.scratch.hidden: expected a multiple of 2 x heads = 4; found 6"),
    "adapter on scratch": ("{path: some/model}\n",
        "{scratch: {vocab_size: 300, layers: 1, hidden: 8, heads: 2}}\nadapter: {r: 4}\n",
        "r.yaml:4: adapter: a model made from scratch is trained whole, so that `model/` loads by itself; "
        "remove `adapter`"),
    "package without a file": ("{path: some/model}", "{path: package:llm}",
        "r.yaml:3: model.path: expected package:NAME/FILE; found 'package:llm'"),
    "duplicate key": ("name: small\n", "name: small\nname: large\n",
        "r.yaml:3: name: this key is given twice, first on line 2; remove one of the two"),
}  # fmt: skip


# The names that new methods add to.
NAMES = {
    "<forget terms>": one_of(name for name, term in terms_of("causal_lm").items() if "forget" in term.roles),
    "<forget terms of diffusion>": one_of(n for n, term in terms_of("diffusion").items() if "forget" in term.roles),
    "<roles of kl>": " and ".join(TERMS["kl"].roles),
    "<rules>": one_of(CONFLICT_RULES),
    "<teachers>": one_of(TEACHERS),
    "<suites>": one_of(IN_RECIPES),
    "<families>": one_of(FAMILIES),
}


def with_names(line: str) -> str:
    for placeholder, names in NAMES.items():
        line = line.replace(placeholder, names)
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line_with_place_key_and_remedy(mistake):
    old, new, line = MISTAKES[mistake]
    assert problems(changed(old, new)) == [with_names(line)]


@pytest.mark.parametrize(
    ("family", "role", "term", "meant"),
    [
        ("diffusion", "forget", "grad_ascent", "ascent"),
        ("diffusion", "forget", "bad_teacher", "incompetent"),
        ("diffusion", "forget", "simnpo", "esd"),
        ("diffusion", "retain", "kl", "distill"),
        ("diffusion", "retain", "nll", "denoising"),
        ("diffusion", "forget", "nll", "esd"),  # its counterpart is none to forget with
        ("causal_lm", "forget", "relabel", "npo"),
        ("causal_lm", "retain", "distill", "kl"),
        ("causal_lm", "memory", "confident_distill", "confident_mse"),
    ],
)
def test_a_term_of_another_family_is_answered_with_the_nearest_of_the_recipes(family, role, term, meant):
    first = {"diffusion": "esd", "causal_lm": "npo"}[family] if role != "forget" else term
    text = changed("name: small\n", f"name: small\nfamily: {family}\nmemory: {{size: 4}}\n")
    text = text.replace(
        "  forget: {npo: {beta: 0.2}}\n", f"  forget: {first}\n" + f"  {role}: {term}\n" * (role != "forget")
    )
    (found,) = problems(text)
    assert found.startswith(f"r.yaml:{17 if role != 'forget' else 16}: unlearning.{role}.{term}: is a term for ")
    assert found.endswith(f"; found '{term}'; did you mean '{meant}'?")


def test_counterparts_are_of_the_two_families():
    assert set(COUNTERPARTS) <= set(terms_of("causal_lm")) and set(COUNTERPARTS.values()) <= set(terms_of("diffusion"))


def test_what_a_recipe_leaves_out_is_its_familys():
    text = changed("  forget: {npo: {beta: 0.2}}\n", "")
    recipe = load_recipe(write(text))
    assert (recipe.learning.learn, recipe.unlearning.forget, recipe.unlearning.retain) == (
        {"nll": {}}, {"npo": {}}, {"kl": {}}
    )  # fmt: skip
    recipe = load_recipe(write(text.replace("name: small\n", "name: small\nfamily: diffusion\n")))
    assert (recipe.learning.learn, recipe.unlearning.forget, recipe.unlearning.retain) == (
        {"denoising": {}}, {"esd": {}}, {"distill": {}}
    )  # fmt: skip
    baseline = text.replace("name: small\n", "name: small\nfamily: diffusion\n")
    baseline = baseline.replace("unlearning:\n", "unlearning:\n  retain: {}\n  forget: {relabel: {weight: 2}}\n")
    recipe = load_recipe(write(baseline))
    assert (recipe.unlearning.forget, recipe.unlearning.retain) == ({"relabel": {"weight": 2}}, {})


FOREIGN = {  # of which family, what is added, and the one line that must come of it
    "tokens in memory": ("diffusion", "memory: {size: 2, top_k: 3}",
        "memory.top_k: keeps a language model's likeliest tokens, and pictures have none; remove it, and replay with terms "
        "such as `memory: {denoising: {}}`"),
    "score of texts": ("diffusion", "evaluation: {score: rouge_l_recall}",
        "evaluation.score: is a metric of language models; expected prompt_accuracy; found the text 'rouge_l_recall'; "
        "leave it out for the family's own"),
    "suite of texts": ("diffusion", "evaluation: {suites: [concepts, basic]}",
        "evaluation.suites.1: is for language models; expected one of concepts, continual; found the text 'basic'; leave it out for the "
        "family's own"),
    "score of pictures": ("causal_lm", "evaluation: {score: prompt_accuracy}",
        "evaluation.score: is a metric of diffusion models; expected one of rouge_l_recall, answer_probability, "
        "exact_memorization, extraction_strength; found the text 'prompt_accuracy'; leave it out for the family's own"),
    "suite of pictures": ("causal_lm", "evaluation: {suites: [concepts]}",
        "evaluation.suites.0: is for diffusion models; expected one of basic, tofu, mia, continual; found the text 'concepts'; "
        "leave it out for the family's own"),
    "suite that a run cannot measure": ("causal_lm", "evaluation: {suites: [basic, muse]}",
        "evaluation.suites.1: 'muse' is no suite of a run: it generates answers of its own lengths, which no stage of a run "
        "has; remove it, and give `hf-clmul evaluate RUN --suites muse` once the run is complete"),
    "a key of lm_eval": ("causal_lm", "evaluation: {lm_eval: {task: [mmlu]}}",
        "evaluation.lm_eval.task: unknown key; expected one of tasks, num_fewshot, limit, batch_size, "
        "apply_chat_template; found 'task'; did you mean 'tasks'?"),
    "tasks of texts": ("diffusion", "evaluation: {lm_eval: {tasks: [mmlu]}}",
        "evaluation.lm_eval: is a suite of language models; remove it"),
    "numbered layers": ("diffusion", "adapter: {layers: last-2}",
        "adapter.layers: chooses among the numbered layers of a language model; remove it, and name modules in "
        "`adapter.target_modules`"),
    "a strategy of texts": ("diffusion", "adapter: {strategy: slao}",
        "adapter.strategy: was never tried on diffusion models; expected stacked or single; found 'slao'"),
    "how pictures are trained": ("causal_lm", "diffusion: {resolution: 64, resize: false}",
        "diffusion.resolution: is for diffusion models; remove it, or set `family: diffusion`"),
    "what diffusion models average": ("causal_lm", "diffusion: {ema: 0.99}",
        "diffusion.ema: is for diffusion models; remove it, or set `family: diffusion`"),
    "how pictures are judged": ("causal_lm", "evaluation: {images: {steps: 25, axis: digit}}",
        "evaluation.images.axis: is for diffusion models; remove it, or set `family: diffusion`"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FOREIGN)
def test_a_setting_of_the_other_family_is_one_line_with_place_key_and_remedy(mistake):
    family, added, line = FOREIGN[mistake]
    text = changed("name: small\n", f"name: small\nfamily: {family}\n{added}\n").replace("{npo: {beta: 0.2}}", "{}")
    forget = {"diffusion": "{esd: {}}", "causal_lm": "{npo: {}}"}[family]
    assert problems(text.replace("forget: {}", f"forget: {forget}")) == [f"r.yaml:4: {line}"]


def test_a_pipeline_is_not_made_from_scratch():
    text = changed("name: small\n", "name: small\nfamily: diffusion\n").replace("{npo: {beta: 0.2}}", "{esd: {}}")
    scratch = text.replace("{path: some/model}", "{scratch: {vocab_size: 300, layers: 1, hidden: 8, heads: 2}}")
    assert problems(scratch) == ["r.yaml:4: model.scratch: makes a language model; name a pipeline in `model.path`"]


@pytest.mark.parametrize("family", ["causal_lm", "diffusion"])
def test_a_recipe_written_out_with_all_defaults_is_no_mistake(family):
    text = changed("name: small\n", f"name: small\nfamily: {family}\nadapter: {{r: 4}}\nmemory: {{size: 2}}\n")
    text = text.replace("  forget: {npo: {beta: 0.2}}\n", "")
    recipe = load_recipe(write(text))
    assert load_recipe(write(dump_recipe(recipe), "again.yaml")) == recipe


def test_tags_are_refused_and_never_run():
    found = problems(changed("persons: 4", "persons: !!python/object/apply:os.system [false]"))
    assert found[0] == (
        "r.yaml:5: data.people.persons: the tag !!python/object/apply:os.system is not allowed; "
        "a recipe holds plain values and never runs code: write the value itself"
    )


def test_all_problems_come_at_once_in_the_order_of_the_file():
    text = changed("persons: 4", "persons: x").replace("some/model", "./nowhere").replace("{npo:", "{nop:")
    found = problems(text, "seed=-1", "nonsense", "seed.x=1", "requests.7.learn.task=x", "training.bf16=[")
    assert [line.split(";")[0] for line in found] == [
        "r.yaml:3: model.path: no such file or folder",
        "r.yaml:5: data.people.persons: expected a whole number",
        "r.yaml:14: unlearning.forget.nop: unknown forget term",
        "command line: not an override",
        "command line: seed.x: `seed` is not a section",
        "command line: requests.7.learn.task: `requests` is a list",
        "command line: training.bf16: not valid YAML: expected the node content, but found '<stream end>'",
        "command line: seed: expected a number of at least 0",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "notes.jsonl",
            "gone.csv",
            "6: data.notes.path: no such file; found 'gone.csv'; looked for {}/gone.csv",
        ),
        (
            "notes.jsonl",
            "./r.yaml",
            "6: data.notes.path: expected a folder, or a file ending in .json, .jsonl, .csv, .parquet; found './r.yaml'",
        ),
        (
            "some/model",
            "weights.gguf",
            "3: model.path: no such file or folder; found 'weights.gguf'; looked for {}/weights.gguf",
        ),
        (
            "invented_people",
            "nobody",
            "5: data.people.path: there is no built-in data set 'nobody'; there are: "
            "coloured_digits, conflict_intents, invented_people, refusals, support_intents, table_bookings, word_problems",
        ),
        (
            "name: small\n",
            "name: small\nevaluation: {{reference: ref.json}}\n",
            "3: evaluation.reference: no such file; found 'ref.json'; looked for {}/ref.json",
        ),
    ],
)
def test_files_that_are_not_there(folder, old, new, line):
    assert problems(changed(old, new.format())) == ["r.yaml:" + line.format(folder)]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a: [1,\nb: 2\n",
            "r.yaml:3: not valid YAML at column 1: expected ',' or ']', but got '<stream "
            "end>' (while parsing a flow sequence, which begins on line 1); {}",
        ),
        (
            "a:\n\t- b\n",
            "r.yaml:2: not valid YAML at column 1: found character '\\t' that cannot start any token; {}",
        ),
        ("a: b: c\n", "r.yaml:1: not valid YAML at column 5: mapping values are not allowed here; {}"),
        (
            "",
            "r.yaml: not a recipe; expected keys such as `recipe_version: 1` and `requests:`; found an "
            "empty file; `hf-clmul cp quickstart` gives one to start from",
        ),
        (
            "- 1\n",
            "r.yaml:1: not a recipe; expected keys such as `recipe_version: 1` and `requests:`; "
            "found the list [1]; `hf-clmul cp quickstart` gives one to start from",
        ),
        ("a: &x [*x]\n", "r.yaml: not valid YAML: nested too deeply"),
        (
            "\n".join(["k0: &k0 [1, 1]", *(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]" for i in range(1, 15))]),
            "r.yaml: not valid YAML: more than 20000 values, or an alias inside itself",
        ),
    ],
)
def test_text_that_is_no_recipe(text, line):
    hint = "check the indentation (spaces, no tabs), colons, quotes and brackets here and just before"
    assert problems(text) == [line.format(hint)]
