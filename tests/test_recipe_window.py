"""The recipe's words for a look ahead, a salient part and parameters by name: what they become, and every mistake."""

from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML
from small_recipe import RECIPE, changed, problems, write

from hf_clmul.gradients.options import Lookahead, Saliency, Sharpness, options
from hf_clmul.recipe.load import dump_recipe, load_recipe, recipe_schema
from hf_clmul.run.request import _parts
from hf_clmul.training_args import ClmulConfig

WORDS = "  lookahead: {alpha: 0.1, inner: forget}\n  saliency: {train: 0.5}\n  trainable: '.*down_proj.*'\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    monkeypatch.chdir(tmp_path)


def with_words(words: str) -> str:
    return changed("unlearning:\n", f"unlearning:\n{words}")


def test_what_they_become():
    text = with_words(WORDS).replace("learning:\n  training: {learning_rate: 2", "learning:\n  trainable: '.*q_proj.*'\n"
                                     "  training: {learning_rate: 2")  # fmt: skip
    recipe = load_recipe(write(text))
    assert recipe.unlearning.lookahead == Lookahead(alpha=0.1, inner="forget", mode="cross")
    assert (recipe.unlearning.saliency.train, recipe.unlearning.saliency.trim) == (0.5, None)
    learn, unlearn = (_parts(recipe, learns) for learns in (True, False))
    assert learn == {"trainable": ".*q_proj.*"}
    assert unlearn == {
        "trainable": ".*down_proj.*",
        "lookahead": {"alpha": 0.1, "inner": "forget", "mode": "cross"},
        "saliency": {"train": 0.5, "trim": None},
    }
    plain = load_recipe(write(RECIPE)).unlearning
    assert (plain.lookahead, plain.saliency, plain.trainable) == (None, None, None)
    defaults = load_recipe(write(RECIPE), ["unlearning.lookahead={}"]).unlearning.lookahead
    assert (defaults.alpha, defaults.inner, defaults.mode) == (0.1, "retain", "cross")


def test_the_resolved_recipe_says_the_same():
    recipe = load_recipe(write(with_words(WORDS)))
    write(dump_recipe(recipe), "again.yaml")
    assert load_recipe("again.yaml") == recipe


def test_a_child_changes_keys_and_takes_sections_back():
    write(with_words(WORDS), "base.yaml")
    child = "extends: base.yaml\nunlearning:\n  lookahead: {alpha: 0.2}\n  saliency: null\n"
    found = load_recipe(write(child)).unlearning
    assert found.lookahead == Lookahead(alpha=0.2, inner="forget")
    assert found.saliency is None and found.trainable == ".*down_proj.*"
    assert load_recipe("r.yaml", ["unlearning.lookahead=null"]).unlearning.lookahead is None


MISTAKES = {
    "{alfa: 0.1}": (
        "lookahead.alfa: unknown key; expected one of alpha, inner, mode; found 'alfa'; did you mean 'alpha'?"
    ),
    "{alpha: 0}": "lookahead.alpha: expected a number above 0; found 0",
    "{alpha: '0.1'}": "lookahead.alpha: expected a number; found the text '0.1'; remove the quotes",
    "{inner: retian}": "lookahead.inner: expected one of retain, forget; found the text 'retian'; did you mean 'retain'?",
    "{mode: second}": "lookahead.mode: expected one of first_order, cross, exact; found the text 'second'",
    "cross": "lookahead: expected a section (key: value); found the text 'cross'",
}
OF_SALIENCY = {
    "{}": "saliency: expected `train`, `trim` or both; found an empty section",
    "{trian: 0.5}": "saliency.trian: unknown key; expected one of train, trim; found 'trian'; did you mean 'train'?",
    "{train: 1}": "saliency.train: expected a number below 1; found 1",
    "{trim: 0}": "saliency.trim: expected a number above 0; found 0",
    "0.5": "saliency: expected a section (key: value); found 0.5",
}


@pytest.mark.parametrize("value", MISTAKES)
def test_mistakes_of_a_look_ahead(value):
    assert problems(with_words(f"  lookahead: {value}\n")) == [f"r.yaml:14: unlearning.{MISTAKES[value]}"]


@pytest.mark.parametrize("value", OF_SALIENCY)
def test_mistakes_of_a_salient_part(value):
    assert problems(with_words(f"  saliency: {value}\n")) == [f"r.yaml:14: unlearning.{OF_SALIENCY[value]}"]


def test_mistakes_of_a_pattern():
    expected = "missing ), unterminated subpattern at position 0; expected a regular expression; found the text '(proj'"
    assert problems(with_words("  trainable: (proj\n")) == [f"r.yaml:14: unlearning.trainable: {expected}"]
    learning = changed(
        "learning:\n  training: {learning_rate: 2", "learning:\n  trainable: (proj\n  training: {learning_rate: 2"
    )
    assert problems(learning) == [f"r.yaml:12: learning.trainable: {expected}"]
    assert problems(with_words("  trainable: 3\n")) == [
        "r.yaml:14: unlearning.trainable: expected text; found 3; put it in quotes"
    ]


def test_the_json_schema_knows_them():
    validator = jsonschema.Draft202012Validator(recipe_schema())
    read = YAML(typ="safe", pure=True).load
    validator.validate(read(with_words(WORDS)))
    validator.validate(read(with_words("  lookahead:\n  saliency: {train: 0.5, trim: 0.1}\n")))
    for words in [f"  lookahead: {value}\n" for value in MISTAKES] + [
        f"  saliency: {value}\n" for value in OF_SALIENCY
    ]:
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(read(with_words(words)))


def test_python_users_read_the_same_words(tmp_path):
    for name, kind, given, message in (
        ("lookahead", Lookahead, {"alfa": 1.0}, "lookahead.alfa: unknown key, there are alpha, inner, mode (did you mean 'alpha'?)."),
        ("lookahead", Lookahead, {"alpha": -1.0, "mode": "x"}, "lookahead.alpha: expected a number above 0, found -1.0; "
         "lookahead.mode: expected one of first_order, cross, exact, found the text 'x'."),
        ("sharpness", Sharpness, {"rho": "far"}, "sharpness.rho: expected a number, found the text 'far'."),
        ("saliency", Saliency, {"train": 1.5}, "saliency.train: expected a number below 1, found 1.5."),
        ("saliency", Saliency, "half", "saliency: expected a section (key: value), found the text 'half'."),
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            options(kind, name, given)
        assert str(error.value) == message
        if isinstance(given, dict):
            with pytest.raises(ValueError, match=f"{name}."):
                ClmulConfig(str(tmp_path), use_cpu=True, **{name: given})
    assert options(Lookahead, "lookahead", None) is None
    assert options(Lookahead, "lookahead", Lookahead(alpha=0.5)) == Lookahead(alpha=0.5)


MODEL = "model: {path: some/model}"
TURNS = ("lookahead: `conflict: alternate` steps on one role at a time, so that there is no other to look ahead to; "
         "remove it, or take another rule")  # fmt: skip
HALF = ("lookahead: moves the weights a little and back, which float16 weights round away; remove `model.dtype` and set "
        "`training: {bf16: true}` (mixed precision), or train an `adapter`")  # fmt: skip
SHARP_TOO = "sharpness: and lookahead both choose where a gradient is taken; remove one of the two"
SHARP_HALF = HALF.replace("lookahead", "sharpness")
ALONE = "lookahead: `retain: {}` leaves one role, with no other to look ahead to; remove it, or give `retain` a term"
UNOPPOSED = "conflict: `retain: {}` leaves one role, which is in conflict with none; remove it, or give `retain` a term"
ODDS = {
    "  lookahead: {}\n  conflict: alternate\n": [TURNS],
    "  lookahead: {}\n  conflict: {alternate: {forget_epochs: 2.0}}\n": [TURNS],
    "  lookahead: {}\n  retain: {}\n": [ALONE],
    "  sharpness: {}\n  lookahead: {}\n": [SHARP_TOO],
    "  conflict: mgda\n  retain: {}\n": [UNOPPOSED],
    "  conflict: {agem: {margin: 0.1}}\n  retain: {}\n": [UNOPPOSED],
}


@pytest.mark.parametrize("words", ODDS)
def test_options_that_could_not_act(words):
    assert problems(with_words(words)) == [f"r.yaml:14: unlearning.{line}" for line in ODDS[words]]


@pytest.mark.parametrize(("option", "line"), [("lookahead", HALF), ("sharpness", SHARP_HALF)])
def test_half_precision_has_no_room_for_a_small_step(option, line):
    text = with_words(f"  {option}: {{}}\n").replace(MODEL, MODEL.replace("}", ", dtype: float16}"))
    assert problems(text) == [f"r.yaml:14: unlearning.{line}"]
    with_adapter = text.replace("data:\n", "adapter: {r: 4}\ndata:\n", 1)
    found = load_recipe(write(with_adapter)).unlearning
    assert (found.lookahead or found.sharpness) in (Lookahead(), Sharpness())


@pytest.mark.parametrize("words", ["lookahead: {}", "sharpness: {}", "saliency: {train: 0.5}", "conflict: mgda"])
def test_an_edit_takes_no_options_of_training(words):
    option, _, _ = words.partition(":")
    text = with_words(f"  {words}\n  retain: {{}}\n").replace("npo: {beta: 0.2}", "task_vector: {}")
    what = {"conflict": "`retain: {}` leaves one role, which is in conflict with none; remove it"}.get(
        option,
        f"task_vector is an edit, which takes no step, so that {option} cannot act; remove it, or take another forget term",
    )
    assert problems(text) == [f"r.yaml:14: unlearning.{option}: {what}"]


@pytest.mark.parametrize("rule", ["sum", "pcgrad_retain_first"])
def test_forgetting_alone_may_say_what_happens_anyway(rule):
    assert load_recipe(write(with_words(f"  retain: {{}}\n  conflict: {rule}\n"))).unlearning.conflict == rule
