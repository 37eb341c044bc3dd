"""Parameters of terms: what is out of range is one clear line, in a recipe and in Python; defaults are filled
in."""

import pytest
from annotated_types import Ge, Gt
from small_recipe import changed, problems

from hf_clmul.objectives import TERMS, term_parameters
from hf_clmul.objectives.active import active_terms, contexts, layers, needs
from hf_clmul.recipe.load import load_recipe


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "notes.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoiled(role, term, parameter, value):
    new = f"forget: {{npo: {{}}}}\n  {role}: {{{term}: {{{parameter}: {value}}}}}"
    if role == "forget":
        new = f"{role}: {{{term}: {{{parameter}: {value}}}}}"
    return changed(
        "forget: {npo: {beta: 0.2}}", new
    ), f"r.yaml:{14 + (role != 'forget')}: unlearning.{role}.{term}.{parameter}: "


REFUSED = [
    ("forget", "npo", "beta", "0", "expected a number above 0; found 0"),
    ("forget", "simnpo", "delta", "'1'", "expected a number; found the text '1'"),
    ("forget", "simnpo", "delta", ".inf", "expected a finite number; found inf"),
    ("forget", "wga", "beta", "-0.5", "expected a number of at least 0; found -0.5"),
    ("forget", "satimp", "beta2", "-1", "expected a number of at least 0; found -1"),
    ("forget", "undial", "beta", "0", "expected a number above 0; found 0"),
    ("forget", "ce_u", "ignore_first_n", "-1", "expected a number of at least 0; found -1"),
    ("forget", "ce_u", "ignore_first_n", "1.5", "expected a whole number; found 1.5"),
    ("forget", "bad_teacher", "weights", "zero", "expected one of random, uniform, base; found the text 'zero'"),
    ("retain", "kl", "temperature", "0", "expected a number above 0; found 0"),
    ("retain", "confident_mse", "rho", "0", "expected a number above 0; found 0"),
    ("retain", "contrastive_distill", "layer", "1.0", "expected a whole number; found 1.0"),
    ("retain", "contrastive_distill", "temperature", "0", "expected a number above 0; found 0"),
    ("forget", "dpo", "beta", "0", "expected a number above 0; found 0"),
    ("forget", "altpo", "alternatives", "0", "expected a number of at least 1; found 0"),
    ("forget", "elm", "eta", "-1", "expected a number of at least 0; found -1"),
    ("forget", "elm", "novice", "7", "expected text; found 7"),
    ("forget", "whp", "alpha", "-1", "expected a number of at least 0; found -1"),
    ("forget", "whp", "epochs", "0", "expected a number of at least 1; found 0"),
    ("forget", "rmu", "steering_coefficient", "0.0", "expected a number above 0; found 0.0"),
    ("forget", "rmu", "seed", "-1", "expected a number of at least 0; found -1"),
    ("forget", "rmu", "layer", "-1", "expected a number of at least 0; found -1"),
    ("forget", "rmu", "layer", "1.5", "expected a whole number; found 1.5"),
    ("forget", "rmu", "layer", "last", "expected a whole number; found the text 'last'"),
    ("retain", "hidden_mse", "layer", "true", "expected a whole number; found true"),
    ("retain", "answer_preservation", "beta", "-0.1", "expected a number above 0; found -0.1"),
    ("retain", "kl", "direction", "backward", "expected one of forward, reverse; found the text 'backward'"),
    ("retain", "js", "weight", "-1", "expected a number of at least 0; found -1"),
]  # fmt: skip


@pytest.mark.parametrize(("role", "term", "parameter", "value", "line"), REFUSED)
def test_a_recipe_says_where_what_and_what_was_found(role, term, parameter, value, line):
    text, start = spoiled(role, term, parameter, value)
    (found,) = problems(text)
    assert found.removesuffix("; remove the quotes").removesuffix("; put it in quotes") == start + line


@pytest.mark.parametrize(("role", "term", "parameter", "value", "line"), REFUSED)
def test_python_is_told_the_same(role, term, parameter, value, line):
    python = {"'1'": "1", ".inf": float("inf"), "last": "last", "backward": "backward", "zero": "zero", "true": True}
    given = python[value] if value in python else float(value) if "." in value else int(value)
    with pytest.raises(ValueError) as caught:
        active_terms(role, {term: {parameter: given}})
    assert str(caught.value) == f"{role}/{term}: {parameter}: {line}."


def bounded():
    for name, term in TERMS.items():
        for parameter, (annotation, _) in term_parameters(name).items():
            for bound in getattr(annotation, "__metadata__", ()):
                yield term.family, term.roles[-1], name, parameter, bound


@pytest.mark.parametrize(("family", "role", "name", "parameter", "bound"), list(bounded()))
def test_every_bound_holds_at_its_edge(family, role, name, parameter, bound):
    if isinstance(bound, Ge):
        assert active_terms(role, {name: {parameter: bound.ge}}, family)
    with pytest.raises(ValueError, match=f"{name}: {parameter}: expected a number"):
        active_terms(role, {name: {parameter: bound.ge - 1 if isinstance(bound, Ge) else bound.gt}}, family)
    assert isinstance(bound, Ge | Gt)


@pytest.mark.parametrize("layer", ["0", "7", "0.5"])
def test_a_layer_is_a_number_or_a_fraction(layer):
    text, _ = spoiled("forget", "rmu", "layer", layer)
    with open("r.yaml", "w") as file:
        file.write(text)
    assert str(load_recipe("r.yaml").unlearning.forget["rmu"]["layer"]) == layer


def test_what_is_left_out_is_filled_in():
    (active,) = active_terms("forget", {"satimp": {"beta2": 2, "weight": 3}})
    assert active.parameters == {"beta1": 5.0, "beta2": 2} and active.weight == 3.0


def test_needs_and_layers_of_terms_together():
    terms = active_terms("retain", {"nll": {}, "hidden_mse": {"layer": 3}, "answer_preservation": {}})
    terms += active_terms("forget", {"rmu": {"layer": 0.5}, "ce_u": {}, "bad_teacher": {}})
    assert needs(terms) == {"logps", "hidden", "logits", "targets"}
    assert layers(terms) == {3, 0.5}
    # Of the teacher only what the terms that compare with it need.
    assert needs(terms, of_teacher=True) == {"hidden"} and layers(terms, of_teacher=True) == {3}
    # Contexts are the teacher's affair.
    terms = active_terms("forget", {"elm": {"novice": "No."}, "npo": {}})
    assert needs(terms) == {"logps", "logits"} and needs(terms, of_teacher=True) == {"logps", "logits", "contexts"}
    assert contexts(terms)["novice"] == "No." and list(contexts(terms)) == ["novice", "expert"]


def test_counts_are_known_from_lengths_alone():
    """Answers of 3, 1 and 5 tokens, refusals of 2, 2 and 4."""

    def count(role, name, **parameters):
        (active,) = active_terms(role, {name: parameters})
        return active.count([3, 1, 5, 2, 2, 4], 3)

    assert count("forget", "npo") == 3 and count("retain", "answer_preservation") == 3
    assert count("forget", "grad_ascent") == 9
    assert count("forget", "idk_nll") == count("forget", "jensun") == 8
    assert [count("forget", "ce_u", ignore_first_n=n) for n in (0, 1, 2, 4, 5)] == [9, 6, 4, 1, 0]
    assert count("forget", "ce_u") == 6
