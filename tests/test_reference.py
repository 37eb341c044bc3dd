"""Which recipe a reference is, and what its fingerprint depends on: plans alone, nothing is trained."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import FULL, save_base, write_recipe

from hf_clmul.data.sources import content
from hf_clmul.errors import RecipeError
from hf_clmul.plan.columns import evaluated, groups
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import Recipe, dump_recipe, load_recipe
from hf_clmul.run import reference as module
from hf_clmul.run.measuring import measuring
from hf_clmul.run.reference import about_reference, fingerprint, found_reference, reference_recipe


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_CLMUL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recipe_of(folder: Path, kind: str = "full", *changes: tuple[str, str]) -> Recipe:
    return load_recipe(write_recipe(folder, kind, *changes))


def learned(recipe: Recipe) -> dict[str, list[str]]:
    """Ids of what each task trains on, memory included."""
    found: dict[str, list[str]] = {}
    for step in plan_steps(recipe):
        for job in step.jobs:
            assert set(job.roles) <= {"learn", "memory"}
            found.setdefault(step.what, []).extend(str(row["id"]) for rows in job.roles.values() for row in rows)
    return found


def measured(recipe: Recipe) -> dict[str, list[Any]]:
    steps = plan_steps(recipe)
    chosen = evaluated(recipe, steps, groups(recipe, steps))
    return {name: sorted((chosen.rows[t]["id"], t) for t in contents) for name, contents in chosen.groups.items()}


def test_what_is_forgotten_is_left_out_and_measured(tmp_path):
    recipe = recipe_of(tmp_path)
    derived = reference_recipe(recipe)
    assert learned(derived) == {"people": [f"P01-{i}" for i in range(1, 9)]}
    assert measured(derived) == measured(recipe) and len(measured(recipe)["forget"]) == 8
    assert (derived.seed, derived.name) == (1000, "small-reference")
    assert (derived.learning, derived.model, derived.memory) == (recipe.learning, recipe.model, recipe.memory)
    (tmp_path / "again.yaml").write_text(dump_recipe(derived))
    assert load_recipe(tmp_path / "again.yaml") == derived
    assert str(tmp_path) not in dump_recipe(derived, shared=True)


def test_named_groups_are_measured_of_the_reference_too(tmp_path, cache):
    """Their data is learned by no request, and must stay in its recipe: else a run fails as soon as some reference is cached."""
    (tmp_path / "facts.jsonl").write_text('{"question": "What is one and one?", "answer": "Two."}\n')
    recipe = recipe_of(
        tmp_path, "full", ("evaluation: {", "evaluation: {groups: {world: facts}, "),
        ("  strangers:", "  facts: {path: ./facts.jsonl}\n  strangers:"),
    )  # fmt: skip
    (cache / "references" / "other-1000").mkdir(parents=True)
    (cache / "references" / "other-1000" / "results.json").write_text("{}")
    assert found_reference(recipe) is None
    assert measured(reference_recipe(recipe)) == measured(recipe) and len(measured(recipe)["world"]) == 1


def test_a_stream_loses_tasks_parts_and_ids(tmp_path):
    recipe = recipe_of(tmp_path, "stream")
    derived = reference_recipe(recipe)
    forgotten = {*(f"P02-{i}" for i in range(1, 9)), "P04-2", "P01-1", "P01-3"}
    found = learned(derived)
    assert list(found) == ["a", "b", "parts"] and not forgotten & {name for ids in found.values() for name in ids}
    assert len(found["parts"]) == 7 and len(plan_steps(derived)[-1].jobs) == 4, (
        "isolated, in shards and slices as before"
    )
    assert {name for ids in found.values() for name in ids if name.startswith("P01")} == {
        f"P01-{i}" for i in (2, 4, 5, 6, 7, 8)
    }
    assert measured(derived) == measured(recipe) and [name for name, _ in measured(recipe)["forget"]] == [
        "P01-1",
        "P01-3",
    ]


def test_rows_named_by_a_file_keep_their_numbers_and_its_columns(tmp_path):
    """Rows without ids are numbered by their place, also those behind one that is left out; the data excludes some itself."""
    rows = [{"question": f"Q{i}?", "answer": f"A{i}.", "part": "xyz"[i % 3], "gone": i == 5} for i in range(9)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [{"question": f"Q{i}?", "answer": f"A{i}.", "paraphrased_answer": f"Also A{i}."} for i in (1, 4)]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    text = FULL.replace(
        "{path: builtin:invented_people, persons: 2}", "{path: all.jsonl, exclude: {part: z, gone: true}}"
    )
    text = text.replace("where: {person: [P02]}", "data: named").replace(
        "  strangers:", "  named: {path: named.jsonl}\n  strangers:"
    )
    text = text.replace("data: people}", "data: people, where: {part: [x, y, z]}}", 1)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    derived = reference_recipe(recipe)
    assert learned(derived) == {"people": [f"people-{i}" for i in (0, 2, 3, 6, 7, 8)]}
    assert measured(derived) == measured(recipe)
    (held,) = (rows for name, rows in groups(derived, plan_steps(derived)).items() if name == "forget")
    assert [(row["id"], row["paraphrased_answer"]) for row in held] == [
        ("people-1", "Also A1."),
        ("people-4", "Also A4."),
    ]


def test_a_value_that_only_forgotten_rows_had_is_no_longer_asked_for(tmp_path):
    recipe = recipe_of(tmp_path, "full", ("data: people}", "data: people, where: {person: [P01, P02]}}"))
    assert reference_recipe(recipe).requests[0].where == {"person": ["P01"]}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("  - unlearn: {name: one, from: people, where: {person: [P02]}}\n", "", "no request unlearns anything"),
        ("from: people, where: {person: [P02]}", "from: base, data: strangers, retain: people", "pretraining cannot be repeated"),
        (", where: {person: [P02]}", "", "all that is learned is forgotten"),
        (
            "where: {person: [P02]}}\n",
            "where: {person: [P02]}}\n  - learn: {task: people, data: people, lifts: [one]}\n",
            "all that is forgotten is learned again",
        ),
    ],
)  # fmt: skip
def test_where_there_is_none_the_reason_is_said(tmp_path, old, new, reason):
    changes = [(old, new)] if "base" not in new else [(old, new), ("held_out: strangers, ", "")]
    recipe = recipe_of(tmp_path, "full", *changes)
    with pytest.raises(RecipeError, match=reason):
        reference_recipe(recipe)
    assert found_reference(recipe) is None
    said = about_reference(recipe)
    assert said is None if new == "" and "unlearn" in old else reason in said


def test_a_column_of_several_kinds_is_kept_for_what_measures_it(tmp_path):
    """Probes of an audit may be texts or questions with answers, which no parquet table holds side by side."""
    probes = ["Who is it?", {"question": "Complete: it is", "answer": "Bo."}]
    rows = [{"id": f"R{i}", "question": f"Q{i}?", "answer": f"A{i}.", "reworded_questions": probes} for i in range(3)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(
        tmp_path, "full", ("{path: builtin:invented_people, persons: 2}", "{path: all.jsonl}"),
        ("where: {person: [P02]}", "ids: [R1]"),
    )  # fmt: skip
    derived = reference_recipe(recipe)
    held = groups(derived, plan_steps(derived))["forget"]
    assert held == [rows[1]] and reference_recipe(recipe) == derived


def test_rows_of_several_formats_are_refused(tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"Line {i}."}) + "\n" for i in range(3)))
    more = "\n  - learn: {task: texts, data: texts}\n  - unlearn: {name: two, from: texts, ids: [texts-1]}\nlearning: {"
    recipe = recipe_of(
        tmp_path, "full", ("\nlearning: {", more), ("  strangers:", "  texts: {path: texts.jsonl}\n  strangers:")
    )
    with pytest.raises(RecipeError, match="of different formats"):
        reference_recipe(recipe)


SAME = [
    ("name: small", "name: other"),
    ("unlearning: {training: {learning_rate: 1e-3", "unlearning: {forget: {simnpo: {}}, conflict: sum, training: {learning_rate: 2e-3"),
    ("samples: 1", "samples: 2, score: answer_probability"),
    ("logging_steps: 1", "logging_steps: 5, save_steps: 2"),
    ("{name: one, from", "{name: two, from"),
    ("where: {person: [P02]}", "ids: [P02-1, P02-2, P02-3, P02-4, P02-5, P02-6, P02-7, P02-8]"),
    ("name: small\n", "name: small\nseed: 7\n"),
    ("name: small\n", "name: small\nteacher: ema\n"),
    ("name: small\n", "name: small\nmemory: {size: 4}\n"),  # into which nothing looks
    ("name: small\n", "name: small\naudit: {after_run: true, attacks: {relearn: {steps: 2}}}\n"),
    ("\nunlearning: {", "\nexport: {merge: false, private: false}\nunlearning: {penalties: {l2_sp: {}}, "),
    ("logging_steps: 1", "logging_steps: 1, dataloader_num_workers: 1, ddp_timeout: 60, hub_strategy: end, do_train: true"),
    ("logging_steps: 1", "logging_steps: 1, per_device_eval_batch_size: 3, include_for_metrics: [inputs]"),
]  # fmt: skip
OTHER = [
    ("where: {person: [P02]}", "where: {person: [P01]}"),
    ("where: {person: [P02]}", "ids: [P02-1]"),
    ("persons: 2", "persons: 3"),
    ("learning_rate: 3e-3", "learning_rate: 2e-3"),
    ("hidden: 32", "hidden: 64"),
    ("max_new_tokens: 4", "max_new_tokens: 5"),
    ("max_examples: 2", "max_examples: 3"),
    ("held_out: strangers, ", ""),
    ("\nlearning: {training", "\nlearning: {learn: {nll: {weight: 2.0}}, training"),
    ("\nlearning: {training", "\nlearning: {penalties: {l2_sp: {}}, training"),
    ("\nlearning: {training", "\nlearning: {conflict: pcgrad, training"),
    ("logging_steps: 1", "logging_steps: 1, bf16: true"),
    ("logging_steps: 1", "logging_steps: 1, dataloader_drop_last: true"),
    ("max_steps: 4", "max_steps: 4, max_length: 4096"),  # with which the run measures
    ("evaluation: {", "evaluation: {groups: {world: strangers}, "),
    ("evaluation: {", "evaluation: {max_length: 64, "),
]


@pytest.mark.parametrize("change", SAME, ids=lambda change: change[1][:40])
def test_the_fingerprint_leaves_out_what_moves_no_weight(tmp_path, change):
    before = recipe_of(tmp_path)
    assert fingerprint(recipe_of(tmp_path, "full", change)) == fingerprint(before)


@pytest.mark.parametrize("change", OTHER, ids=lambda change: change[1][:40])
def test_the_fingerprint_follows_what_does(tmp_path, change):
    before = recipe_of(tmp_path)
    assert fingerprint(recipe_of(tmp_path, "full", change)) != fingerprint(before)


MEASURED = [
    ("learning", "bf16: true"), ("unlearning", "bf16: true"), ("learning", "max_length: 64"), ("unlearning", "max_length: 4096"),
    ("unlearning", "max_length: null"), ("", "bf16: true"), ("", "max_length: null"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "field"), MEASURED, ids=" ".join)
def test_it_is_measured_as_the_run_which_has_more_requests_to_follow(tmp_path, section, field):
    old = f"\n{section}: {{training: {{" if section else "\ntraining: {"
    recipe = recipe_of(tmp_path, "full", (old, f"{old}{field}, "))
    how, own = measuring(recipe), measuring(reference_recipe(recipe))
    assert replace(how, max_length=how.max_length or own.max_length) == own
    assert how.max_length or own.max_length in (None, 10**9)


def test_in_which_precision_it_is_measured_is_part_of_the_fingerprint(tmp_path):
    both = recipe_of(tmp_path, "full", ("logging_steps: 1", "logging_steps: 1, bf16: true"))
    one = recipe_of(tmp_path, "full", ("\nlearning: {training: {", "\nlearning: {training: {bf16: true, "))
    assert measuring(both).bf16 and not measuring(one).bf16
    assert fingerprint(both) != fingerprint(one)


def test_the_fingerprint_follows_contents_and_not_places(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    first = fingerprint(recipe_of(one, "lora"))
    second = recipe_of(other, "lora")
    for file in (one / "base").iterdir():
        (other / "base" / file.name).write_bytes(file.read_bytes())
    assert fingerprint(second) == first
    assert fingerprint(second, 3) == first.replace("-1000", "-3")
    weights = other / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    assert fingerprint(second) != first
    save_base(other / "base")
    monkeypatch.setattr(module, "version", lambda package: "0")
    assert fingerprint(recipe_of(one, "lora")) != first


def test_a_row_with_another_text_is_another_reference(tmp_path):
    rows = [{"id": i, "question": f"Q{i}?", "answer": f"A{i}."} for i in range(4)]
    text = FULL.replace("{path: builtin:invented_people, persons: 2}", "{path: all.jsonl}").replace(
        "where: {person: [P02]}", "ids: ['2']"
    )
    found = []
    for which in (None, 0, 2):
        changed = [{**row, "answer": "B."} if row["id"] == which else row for row in rows]
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
        (tmp_path / "recipe.yaml").write_text(text)
        found.append(fingerprint(load_recipe(tmp_path / "recipe.yaml")))
    assert len(set(found)) == 3


def test_the_plan_says_what_it_would_cost(tmp_path):
    said = about_reference(recipe_of(tmp_path))
    assert said.endswith(": 4 steps") and "hf-clmul reference" in said  # 8 rows in batches of 4, twice
    assert not list((tmp_path / "cache").rglob("*.parquet")), "a plan writes no rows"


def test_contents_that_stay_are_not_excluded(tmp_path):
    recipe = recipe_of(tmp_path, "stream")
    steps = plan_steps(reference_recipe(recipe))
    whole = groups(recipe, plan_steps(recipe))
    assert {content(row) for step in steps for row in step.roles["learn"]} == {content(row) for row in whole["retain"]}


def test_the_built_in_pipeline_has_one_that_was_made_without_the_class(tmp_path):
    recipe = load_recipe("digits/quickstart", ["evaluation.max_examples=4"])
    derived = reference_recipe(recipe)
    assert derived.model.path == "builtin:coloured_digits/no-seven"
    (request,) = derived.requests
    assert (request.data, request.training) == ("others", {"max_steps": 1, "learning_rate": 0.0}), "a step of no length"
    steps, own = (module.as_measured(each, plan_steps(each)) for each in (derived, recipe))
    found, wanted = (
        evaluated(each, some, groups(each, some)).groups for each, some in ((derived, steps), (recipe, own))
    )
    assert found == wanted and len(found["forget"]) == 4 and all("seven" in text for text in found["forget"])
    (tmp_path / "again.yaml").write_text(dump_recipe(derived))
    assert load_recipe(tmp_path / "again.yaml") == derived
    other = load_recipe("digits/quickstart", ["evaluation.max_examples=4", "unlearning.training.max_steps=3"])
    assert fingerprint(other) == fingerprint(recipe) != fingerprint(load_recipe("digits/quickstart"))
    assert "makes builtin:coloured_digits/no-seven" in about_reference(recipe)


def test_of_other_pictures_there_is_none():
    for name, reason in (
        ("digits/learn-and-forget", "could draw before"),
        ("digits/sequence-plain", "cannot be repeated"),
    ):
        with pytest.raises(RecipeError, match=reason):
            reference_recipe(load_recipe(name))
