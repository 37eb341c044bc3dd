"""What can be wrong with a recipe's section `audit` that its types do not tell: names of attacks and their options. It works on the
plain tree."""

from typing import Any

from hf_clmul.evaluation.audit.attacks import ATTACKS, PICTURE_ATTACKS, attack_parameters, attacks_of
from hf_clmul.models import FAMILIES
from hf_clmul.recipe.problems import Key, Problems, one_of, suggestion, value_problem
from hf_clmul.recipe.tree import Tree

ATTACK_TABLE: Key = ("audit", "attacks")


def check_audit(tree: Tree, family: Any, problems: Problems) -> None:
    """Adds a problem for each attack or option that there is not. Without a known family all attacks may stand."""
    families = [family] if isinstance(family, str) and family in FAMILIES else list(FAMILIES)
    family_of = {name: one for one in reversed(families) for name in attacks_of(one)}
    known, every = list(family_of), {**ATTACKS, **PICTURE_ATTACKS}
    for name, given in tree.section(*ATTACK_TABLE).items():
        key = (*ATTACK_TABLE, name)
        if name not in known:
            what = "is no attack on models of this family" if name in every else "unknown attack"
            hint = "" if name in every else suggestion(name, known)
            problems.at(tree, key, what, one_of(known), f"'{name}'", hint)
            continue
        options = attack_parameters(name, family_of[name])
        for option, value in (given if isinstance(given, dict) else {}).items():
            at = (*key, option)
            if option not in options:
                hint = suggestion(option, options)
                problems.at(tree, at, "unknown option", one_of(options) if options else "none", f"'{option}'", hint)
            elif problem := value_problem(options[option][0], value):
                problems.at(tree, at, **problem)
