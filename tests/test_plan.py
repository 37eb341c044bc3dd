"""Which examples play which role, how many steps that makes, and what it costs; the trainer itself is the judge of the steps."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_run import write_recipe
from tiny import tiny_llama, tiny_tokenizer

from hf_clmul.data.encoding import encode
from hf_clmul.data.sources import load_examples
from hf_clmul.errors import RecipeError
from hf_clmul.models import adapters
from hf_clmul.models.loading import load
from hf_clmul.plan.columns import groups, texts
from hf_clmul.plan.job_steps import draws, optimizer_steps
from hf_clmul.plan.steps import plan_steps
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Recipe
from hf_clmul.run.runner import plan_recipe
from hf_clmul.trainer import ClmulTrainer
from hf_clmul.training_args import ClmulConfig

PEOPLE = [(person, f"Who is {person}, part {i}?", f"Answer {person}{i}.") for person in "ABC" for i in range(4)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_data("people.jsonl", PEOPLE)


def write_data(name: str, rows: list[tuple[str, str, str]]) -> None:
    keys = ("person", "question", "answer")
    Path(name).write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))


def recipe(*requests: str, evaluation: str = "{}", data: str = "", more: str = "") -> Recipe:
    text = f"""\
recipe_version: 1
name: planned
model: {{scratch: {{vocab_size: 300, layers: 1, hidden: 16, heads: 2}}}}
data:
  people: {{path: people.jsonl}}
{data}
requests:
{"".join(f"  - {request}" + chr(10) for request in requests)}
evaluation: {evaluation}
{more}
"""
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml")


LEARN = "learn: {task: all, data: people}"


def unlearn(name: str, *people: str, source: str = "all") -> str:
    where = f", where: {{person: [{', '.join(people)}]}}" if people else ""
    return f"unlearn: {{name: {name}, from: {source}{where}}}"


def answers(rows: list[dict[str, Any]]) -> str:
    """A for Answer A0 and so on, each person once."""
    return "".join(dict.fromkeys(row["answer"][7] for row in rows))


def roles(planned: Recipe) -> list[dict[str, str]]:
    return [{role: answers(rows) for role, rows in step.roles.items()} for step in plan_steps(planned)]


# ---- examples of each role -----------------------------------------------------------------------------------


def test_what_was_forgotten_is_not_retained_later():
    planned = recipe(LEARN, unlearn("b", "B"), unlearn("a", "A"))
    assert [step.name for step in plan_steps(planned)] == ["00-learn-all", "01-unlearn-b", "02-unlearn-a"]
    assert roles(planned) == [{"learn": "ABC"}, {"forget": "B", "retain": "AC"}, {"forget": "A", "retain": "C"}]
    assert {name: answers(rows) for name, rows in groups(planned, plan_steps(planned)).items()} == {
        "forget": "BA",
        "retain": "C",
    }


def test_what_is_learned_again_is_no_longer_forgotten():
    again = "learn: {task: again, data: people, where: {person: [B]}, lifts: [b]}"
    planned = recipe(LEARN, unlearn("b", "B"), again, unlearn("a", "A"))
    assert roles(planned)[3] == {"forget": "A", "retain": "CB"}  # by task: what 'again' holds comes last
    assert {name: answers(rows) for name, rows in groups(planned, plan_steps(planned)).items()} == {
        "forget": "A",
        "retain": "BC",
    }


def test_a_whole_task_leaves_nothing_to_retain_unless_there_is_another():
    assert roles(recipe(LEARN, unlearn("everything")))[1] == {"forget": "ABC"}
    tasks = [f"learn: {{task: {name}, data: people, where: {{person: [{name.upper()}]}}}}" for name in "ab"]
    assert roles(recipe(*tasks, unlearn("first", source="a")))[2] == {"forget": "A", "retain": "B"}


def test_without_a_retain_term_nothing_is_retained_but_all_is_measured():
    planned = recipe(LEARN, unlearn("a", "A"), more="unlearning: {retain: {}}")
    assert roles(planned)[1] == {"forget": "A"}
    assert {name: answers(rows) for name, rows in groups(planned, plan_steps(planned)).items()} == {
        "forget": "A",
        "retain": "BC",
    }
    assert plan_recipe(planned)[1]["why"] == "no retain term: nothing holds the rest in place"


def test_forget_and_retain_may_not_share_an_example():
    write_data("people.jsonl", [*PEOPLE, ("D", *PEOPLE[0][1:])])
    with pytest.raises(RecipeError) as caught:
        plan_steps(recipe(LEARN, unlearn("a", "A")))
    message = str(caught.value)
    assert message.startswith("requests.1.unlearn: forget and retain share 1 examples, such as ")
    assert '"answer": "Answer A0."' in message and "remove duplicates" in message
    assert roles(recipe(LEARN, unlearn("both", "A", "D")))[1] == {"forget": "A", "retain": "BC"}


def test_a_text_learned_in_two_tasks_cannot_be_forgotten_in_one():
    twice = ["learn: {task: one, data: people}", "learn: {task: two, data: people}"]
    with pytest.raises(RecipeError, match="share 12 examples"):
        plan_steps(recipe(*twice, unlearn("all", source="one")))


FORGET_DATA = "unlearn: {name: some, from: all, data: forgotten}"
FORGOTTEN = "  forgotten: {path: forgotten.jsonl}"


def test_the_forget_set_may_be_given_as_data():
    """The rows are found by question and answer alone: in the order learned, under the ids learned, and once."""
    write_data("forgotten.jsonl", [("?", *row[1:]) for row in [*PEOPLE[10:], *PEOPLE[4:8], PEOPLE[4]]])
    planned = recipe(LEARN, FORGET_DATA, data=FORGOTTEN)
    learn, forget = plan_steps(planned)
    assert [row["id"] for row in forget.roles["forget"]] == [f"people-{i}" for i in (4, 5, 6, 7, 10, 11)]
    assert [row["id"] for row in forget.roles["retain"]] == [f"people-{i}" for i in (0, 1, 2, 3, 8, 9)]
    assert forget.roles["forget"] == learn.roles["learn"][4:8] + learn.roles["learn"][10:]  # its own columns stay
    whole = groups(planned, plan_steps(planned))
    assert (whole["forget"], whole["retain"]) == (forget.roles["forget"], forget.roles["retain"])


def test_further_columns_of_the_data_to_forget_are_there_for_the_evaluation():
    row = {"question": PEOPLE[4][1], "answer": PEOPLE[4][2], "paraphrased_answer": "B0 it is.", "person": "other"}
    Path("forgotten.jsonl").write_text(json.dumps(row))
    planned = recipe(LEARN, FORGET_DATA, data=FORGOTTEN)
    learn, forget = plan_steps(planned)
    assert groups(planned, [learn, forget])["forget"] == [
        {**learn.roles["learn"][4], "paraphrased_answer": "B0 it is."}
    ]
    assert [row["id"] for row in forget.roles["retain"]] == [f"people-{i}" for i in range(12) if i != 4]


def test_data_to_forget_that_was_never_learned_is_refused():
    write_data("forgotten.jsonl", [*PEOPLE[:4], ("X", "Who is X?", "Answer X0."), ("A", "Who is A, part 0?", "A0.")])
    with pytest.raises(RecipeError) as caught:
        plan_steps(recipe(LEARN, FORGET_DATA, data=FORGOTTEN))
    message = str(caught.value)
    assert message.startswith("requests.1.unlearn.data: 2 of the 6 examples of 'forgotten' were never learned in 'all'")
    assert '"answer": "A0."' in message and "mend the data" in message
    write_data("forgotten.jsonl", PEOPLE[:4])
    tasks = [f"learn: {{task: {name}, data: people, where: {{person: [{name.upper()}]}}}}" for name in "bc"]
    with pytest.raises(RecipeError, match="4 of the 4 examples of 'forgotten' were never learned in 'b'"):
        plan_steps(recipe(*tasks, FORGET_DATA.replace("all", "b"), data=FORGOTTEN))


def test_data_to_forget_takes_every_copy_of_the_task_and_none_of_another():
    write_data("people.jsonl", [*PEOPLE, ("D", *PEOPLE[0][1:])])
    write_data("forgotten.jsonl", PEOPLE[:4])
    assert [len(rows) for rows in plan_steps(recipe(LEARN, FORGET_DATA, data=FORGOTTEN))[1].roles.values()] == [5, 8]
    again = "learn: {task: again, data: people, where: {person: [A]}}"
    with pytest.raises(RecipeError, match="share 4 examples, .*widen `data`"):
        plan_steps(recipe(LEARN, again, FORGET_DATA, data=FORGOTTEN))


def test_an_empty_learn_set_is_refused():
    nothing = "learn: {task: all, data: people, where: {person: A, answer: Answer B0.}}"
    with pytest.raises(RecipeError, match="requests.0.learn: the learn set is empty: nothing of 'people' is selected"):
        plan_steps(recipe(nothing))


def test_an_empty_forget_set_is_refused():
    where = "unlearn: {name: none, from: all, where: {person: A, answer: Answer B0.}}"
    with pytest.raises(RecipeError, match="requests.1.unlearn: the forget set is empty: nothing of 'all' is selected"):
        plan_steps(recipe(LEARN, where))
    with pytest.raises(
        RecipeError, match=r"requests.1.unlearn.where.person: no example has 'Z'; values there: A, B, C"
    ):
        plan_steps(recipe(LEARN, unlearn("z", "Z")))


@pytest.mark.parametrize("group", ["held_out", "forget"])
def test_data_that_is_evaluated_as_unseen_may_not_be_learned(group):
    others = "  others: {path: others.jsonl}"
    write_data("others.jsonl", [("X", "Who is X?", "Answer X0."), PEOPLE[5]])
    overlapping = recipe(LEARN, evaluation=f"{{{group}: others}}", data=others)
    with pytest.raises(
        RecipeError, match=rf"evaluation\.{group}: 1 of its examples are learned too, such as .*Answer B1"
    ):
        groups(overlapping, plan_steps(overlapping))
    write_data("others.jsonl", [("X", "Who is X?", "Answer X0.")])
    planned = recipe(LEARN, evaluation=f"{{{group}: others}}", data=others)
    assert {name: answers(rows) for name, rows in groups(planned, plan_steps(planned)).items()} == {
        "retain": "ABC",
        group: "X",
    }


def test_a_second_task_has_a_second_adapter():
    two = recipe("learn: {task: a, data: people}", "learn: {task: b, data: people}")
    adapted = plan_steps(load_recipe("r.yaml", ["adapter.r=2", "model={path: some/model}"]))
    assert [job.adapter for step in adapted for job in step.jobs] == ["a", "b"]
    assert [job.adapter for step in plan_steps(two) for job in step.jobs] == [None, None]


def test_a_retrained_reference_has_the_tokenizer_of_the_whole_run():
    whole = recipe(LEARN, unlearn("b", "B"))
    write_data("forgotten.jsonl", [row for row in PEOPLE if row[0] == "B"])
    reference = recipe(
        "learn: {task: all, data: people, where: {person: [C, A]}}",
        evaluation="{forget: forgotten}",
        data="  forgotten: {path: forgotten.jsonl}",
    )
    both = [texts(groups(planned, plan_steps(planned))) for planned in (whole, reference)]
    assert both[0] == both[1] == sorted({text for row in PEOPLE for text in row})
    chats = [{"id": "x", "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}]
    assert texts({"retain": chats}) == ["Hi", "Ho", "assistant", "user"]


# ---- steps and costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [
    {}, {"max_steps": 5}, {"num_train_epochs": 2}, {"num_train_epochs": 1.5}, {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3, "num_train_epochs": 1.4}, {"max_steps": 5, "gradient_accumulation_steps": 2},
    {"dataloader_drop_last": True}, {"dataloader_drop_last": True, "max_steps": 3},
    {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 4}, {"max_steps": 3},
], ids=str)  # fmt: skip
def test_steps_are_those_that_the_trainer_takes(training, tmp_path):
    """Of 11 examples in batches of 4: the last batch is short."""
    tokenizer = tiny_tokenizer([row[2] for row in PEOPLE])
    step = plan_steps(recipe(LEARN))[0]
    step.roles["learn"].pop()
    training = {"per_device_train_batch_size": 4, "num_train_epochs": 1, **training}
    args = ClmulConfig(
        str(tmp_path / "out"), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **training
    )
    trainer = ClmulTrainer(tiny_llama(len(tokenizer), 8, 1), args, train_dataset=step.roles, processing_class=tokenizer)
    seen = []
    step_of = trainer.training_step
    trainer.training_step = lambda model, inputs, count: (
        seen.append(len(inputs["learn"]["labels"])) or step_of(model, inputs, count)
    )
    trainer.train()
    assert optimizer_steps(step, training) == trainer.state.global_step
    assert draws(step, training) == sum(seen)


def test_the_plan_of_an_adapter(tmp_path):
    planned = load_recipe(write_recipe(tmp_path, "lora"))
    loaded = load(planned.model, [], 0)
    config = adapters.lora_config(loaded.model, 2, 4, 0.2, "all-linear", "all")
    trainable = sum(p.numel() for p in adapters.attach(loaded.model, config, "x", 0).parameters() if p.requires_grad)
    whole = sum(p.numel() for p in loaded.model.parameters())
    # By hand: 2 layers of q, k, v, o (32 -> 32), gate, up (32 -> 64) and down (64 -> 32), each with r = 2.
    assert trainable == 2 * 2 * (4 * (32 + 32) + 3 * (32 + 64))
    learn, forget = plan_recipe(planned)
    assert (learn["request"], learn["examples"], learn["steps"]) == ("00-learn-people", {"learn": 16}, 8)
    assert (forget["request"], forget["examples"], forget["steps"]) == ("01-unlearn-one", {"forget": 8, "retain": 8}, 4)
    assert (learn["how"], forget["how"]) == ("training", "approximate")
    assert learn["trainable_parameters"] == forget["trainable_parameters"] == trainable
    people = load_examples(planned.data["people"], "people")
    length = {row["question"]: len(encode(row, loaded.tokenizer)["input_ids"]) for row in people}
    assert learn["tokens"] == 2 * sum(length.values())
    # 4 steps of 3: one pass over the 8 to forget (3 steps), then 3 more of mean length; as many of retain.
    assert forget["tokens"] == round(11 / 8 * sum(length.values()))
    # Base and adapter once, gradient and two moments of the adapter; to unlearn, a snapshot and the teacher besides.
    assert learn["memory_bytes"] == 4 * whole + 4 * 3 * trainable
    assert forget["memory_bytes"] == 4 * whole + 4 * 5 * trainable


def test_the_plan_of_a_whole_model_and_of_the_plain_sum(tmp_path):
    file = write_recipe(tmp_path, "full")
    learn, forget = plan_recipe(load_recipe(file))
    count = learn["trainable_parameters"]
    assert count == 300 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert learn["memory_bytes"] == 4 * (1 + 3) * count
    assert forget["memory_bytes"] == 4 * (1 + 3 + 1 + 1) * count
    assert plan_recipe(load_recipe(file, ["unlearning.conflict=sum"]))[1]["memory_bytes"] == 4 * (1 + 3 + 1) * count
    plain = ["unlearning.conflict=sum", "unlearning.forget=simnpo", "unlearning.retain=nll"]
    assert plan_recipe(load_recipe(file, plain))[1]["memory_bytes"] == 4 * (1 + 3) * count


def test_the_plan_of_a_moving_average_and_of_random_weights(tmp_path):
    """An average goes on in every request and costs a copy; a random teacher costs a model, a uniform one nothing."""
    file = write_recipe(tmp_path, "full")
    own = ["unlearning.conflict=sum", "unlearning.retain=nll"]
    for changes, copies in (
        (["teacher=ema", "unlearning.forget=simnpo"], (1, 1)), (["unlearning.forget=bad_teacher"], (0, 1)),
        (["unlearning.forget={bad_teacher: {weights: uniform}}"], (0, 0)), (["teacher=ema", "unlearning.forget=bad_teacher"], (1, 2)),
    ):  # fmt: skip
        planned = plan_recipe(load_recipe(file, [*own, *changes]))
        assert tuple(entry["memory_bytes"] / entry["trainable_parameters"] / 4 - 4 for entry in planned) == copies
    learn, _ = plan_recipe(load_recipe(write_recipe(tmp_path, "lora"), ["teacher=ema"]))
    plain, _ = plan_recipe(load_recipe(file))
    assert learn["memory_bytes"] - plain["memory_bytes"] == 4 * learn["trainable_parameters"]


def test_weights_of_two_bytes_and_adapters_of_four(tmp_path):
    planned = plan_recipe(load_recipe(write_recipe(tmp_path, "lora"), ["model.dtype=bfloat16"]))[0]
    base = sum(p.numel() for p in load(load_recipe(tmp_path / "recipe.yaml").model, [], 0).model.parameters())
    assert planned["memory_bytes"] == 2 * base + 4 * 4 * planned["trainable_parameters"]


def test_the_plan_names_the_example_that_cannot_be_used(tmp_path):
    write_data("people.jsonl", [*PEOPLE, ("D", "Who is D?", "")])
    with pytest.raises(
        RecipeError, match=r"00-learn-all, learn, example people-12: an example has nothing to supervise"
    ):
        plan_recipe(recipe(LEARN))


def test_the_plan_of_a_part(tmp_path):
    """Gradient, two moments, a snapshot and the teacher's copy of what matches, and of nothing else."""
    file = write_recipe(tmp_path, "full")
    pattern = ["learning.trainable='.*q_proj.*'", "unlearning.trainable='.*(up|down)_proj.*'"]
    learn, forget = plan_recipe(load_recipe(file, pattern))
    whole = 300 * 32 + 4 * 32 * 32 + 3 * 32 * 128 + 3 * 32
    assert (learn["trainable_parameters"], forget["trainable_parameters"]) == (32 * 32, 2 * 32 * 128)
    assert learn["memory_bytes"] == 4 * (whole + 3 * 32 * 32)
    assert forget["memory_bytes"] == 4 * (whole + 5 * 2 * 32 * 128)
    with pytest.raises(
        RecipeError, match="request 01-unlearn-one: trainable='q_proj' matches the whole name of none of the 11"
    ):
        plan_recipe(load_recipe(file, ["unlearning.trainable=q_proj"]))


def test_the_plan_of_a_look_ahead_and_of_a_schedule(tmp_path):
    """The first keeps one gradient and the weights to put back, SAM one of them at a time; the second adds losses up."""
    file = write_recipe(tmp_path, "full")
    expected = {
        "lookahead={}": 4 + 1 + 1 + 1,
        "sharpness={}": 4 + 1 + 1,  # a snapshot of the forget gradient, or before it the weights
        "conflict=pdu": 4 + 1,
        "conflict=gru": 4 + 1 + 1 + 1,
    }
    for change, copies in expected.items():
        _, forget = plan_recipe(load_recipe(file, [f"unlearning.{change}"]))
        assert forget["memory_bytes"] == 4 * copies * forget["trainable_parameters"], change


PLAIN = ["unlearning.conflict=sum", "unlearning.forget=simnpo", "unlearning.retain=nll"]


@pytest.mark.parametrize(
    ("changes", "learn_bytes", "forget_bytes"),
    [
        ([], 16, 16),  # weights, gradient and two moments, 4 bytes each
        (["unlearning.saliency={train: 0.25}"], 16, 16 + 1 + 3),  # a mask, and three quarters of the weights
        (["unlearning.saliency={train: 0.25, trim: 0.1}"], 16, 20),  # to choose: 4 + 4 + 4 + 4 + 1 + 1 are less
        (["unlearning.saliency={trim: 0.1}"], 16, 4 + 4 + 4 + 4 + 1),  # weights, gradient, scores, in a row, marked
        # In two bytes: the choice is 2 + 2 + 2 + 4 + 1, training 8 or 8 + 1 + 1
        (["model.dtype=bfloat16", "unlearning.saliency={trim: 0.1}"], 8, 11),
        (["model.dtype=bfloat16", "unlearning.saliency={train: 0.5}"], 8, 11),
        # A snapshot, two gradients and the weights; of one role, its gradient, the weights and their change
        (["training.change_steps=2"], 16 + 4 * 3, 16 + 4 * (1 + 3)),
        (["training.change_steps=2", "unlearning.conflict=gru"], 28, 16 + 4 * (1 + 1 + 3)),
        (["unlearning.training.change_steps=2", "unlearning.lookahead={}"], 16, 16 + 4 * (1 + 1 + 3)),
    ],
    ids=str,
)
def test_the_plan_of_a_salient_part_and_of_measured_changes(tmp_path, changes, learn_bytes, forget_bytes):
    """Bytes for each weight of a model that trains whole."""
    file = write_recipe(
        tmp_path, "lora", ("\nadapter: {r: 2, alpha: 4, dropout: 0.2}", "")
    )  # one from a folder has a dtype
    planned = plan_recipe(load_recipe(file, [*PLAIN, *changes]))
    per_weight = [entry["memory_bytes"] / entry["trainable_parameters"] for entry in planned]
    assert per_weight == [learn_bytes, forget_bytes]
