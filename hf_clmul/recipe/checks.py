"""What must fit together in a recipe: names that point at other names, terms and their roles, settings at
odds. It works on the plain tree, so that these problems are found beside those of the schema, and opens no
file."""

import re
from typing import Any

from hf_clmul.evaluation import EVALUATE_ONLY, IN_RECIPES
from hf_clmul.gradients.conflict import CONFLICT_RULES, UNOPPOSED, rule_parameters
from hf_clmul.gradients.options import OF_STEPS
from hf_clmul.models import FAMILIES
from hf_clmul.objectives import COUNTERPARTS, TERMS, term_parameters
from hf_clmul.objectives.active import DEFAULT_TERMS, odd_company
from hf_clmul.objectives.penalties import PENALTIES, penalty_parameters
from hf_clmul.objectives.preparation import NEGATED
from hf_clmul.recipe.audits import check_audit
from hf_clmul.recipe.families import check_family
from hf_clmul.recipe.problems import Key, Problems, one_of, shown, suggestion, value_problem
from hf_clmul.recipe.schema import Weight
from hf_clmul.recipe.streams import BASE, check_name, check_requests, check_teacher, check_where
from hf_clmul.recipe.training import check_training, requests
from hf_clmul.recipe.tree import Tree

TERM_TABLES: dict[Key, str] = {  # where terms are named, and the role they play there
    ("learning", "learn"): "learn",
    ("learning", "memory"): "memory",
    ("unlearning", "forget"): "forget",
    ("unlearning", "retain"): "retain",
    ("unlearning", "memory"): "memory",
}
RULE: Key = ("unlearning", "conflict")
RULES: tuple[Key, ...] = (("learning", "conflict"), RULE)
DEFAULT_FAMILY = "causal_lm"
GROUPS = ("forget", "retain", "held_out", "tasks", "unrelated")  # names of groups that have a meaning already
BUILTIN_SPLITS = ("train", "held_out")
GENERATED = ("prompts", "images_per_prompt", "guidance", "steps", "seed")
NOT_GENERATED = ("name", "split", "revision", "columns", "caption")


def check_recipe(tree: Tree, problems: Problems) -> None:
    """Adds every problem of a recipe that the schema cannot see. Wrong types are passed over: the schema has
    them."""
    check_name(tree, ("family",), FAMILIES, "family", problems)
    check_teacher(tree, problems)
    for rule in RULES:
        _check_rule(tree, rule, problems)
    suites = tree.get("evaluation", "suites")
    for i in range(len(suites) if isinstance(suites, list) else 0):
        _check_suite(tree, ("evaluation", "suites", i), problems)
    for section in ("learning", "unlearning"):
        _check_pattern(tree, (section, "trainable"), problems)
    _check_model(tree, problems)
    for name in tree.section("data"):
        _check_data(tree, ("data", name), problems)
    for group in ("held_out", "forget"):
        check_name(tree, ("evaluation", group), tree.section("data"), "data set", problems)
    for group in tree.section("evaluation", "groups"):
        _check_group(tree, ("evaluation", "groups", group), problems)
    check_requests(tree, problems)
    replays = {("requests", i, "learn", "memory"): "memory" for i, kind in requests(tree) if kind == "learn"}
    for table, role in {**TERM_TABLES, **replays}.items():
        _check_terms(tree, table, role, problems)
    for section in ("learning", "unlearning"):
        _check_penalties(tree, (section, "penalties"), problems)
    _check_edit(tree, problems)
    _check_base(tree, problems)
    _check_protect(tree, problems)
    _check_lookahead(tree, problems)
    _check_sharpness(tree, problems)
    _check_single_role(tree, problems)
    check_training(tree, problems)
    family = tree.get("family", default=DEFAULT_FAMILY)
    check_family(tree, family, problems)
    check_audit(tree, family, problems)


def _check_group(tree: Tree, key: Key, problems: Problems) -> None:
    check_name(tree, key, tree.section("data"), "data set", problems)
    if key[-1] in GROUPS:
        hint = "choose another name" if key[-1] not in ("held_out", "forget") else f"set `evaluation.{key[-1]}`"
        problems.at(tree, key, "is a group that every run has", hint=hint)


def _edits(tree: Tree) -> list[str]:
    return [name for name in tree.section("unlearning", "forget") if name in TERMS and TERMS[name].edit]


def _check_edit(tree: Tree, problems: Problems) -> None:
    """An edit takes no step, so that nothing can be retained by one; and it works on whole weights."""
    for name in _edits(tree):
        for option, none in (*((option, None) for option in OF_STEPS), ("penalties", {})):
            if tree.get("unlearning", option, default=none) != none:
                what = f"{name} is an edit, which takes no step, so that {option} cannot act"
                problems.at(tree, ("unlearning", option), what, hint="remove it, or take another forget term")
        if tree.get("diffusion", "ema") is not None and all(kind == "unlearn" for _, kind in requests(tree)):
            what = f"{name} is an edit, which takes no step, so that there is nothing to average"
            problems.at(tree, ("diffusion", "ema"), what, hint="remove it, or take another forget term")
        if tree.get("unlearning", "retain") != {}:
            what = "is an edit, which takes no step, so that no retain term can act"
            problems.at(tree, ("unlearning", "forget", name), what, hint="add `retain: {}` to `unlearning`")
        if tree.get("adapter") is not None:
            why = "an adapter has none" if "keys_values" in TERMS[name].needs else NEGATED
            what = f"{name} works on whole weights, and {why}"
            problems.at(tree, ("adapter",), what, hint="remove `adapter`, or take another forget term")


def _check_base(tree: Tree, problems: Problems) -> None:
    """A teacher that is the base needs weights beside it that learn, and must not itself know what is to be forgotten."""
    key: Key = ("unlearning", "forget", "bad_teacher", "weights")
    if tree.get(*key) != "base":
        return
    if tree.get("adapter") is None:
        what = "`base` is the model below its adapter, and without `adapter` all its weights learn"
        problems.at(tree, key, what, hint="add `adapter`, or take `uniform`")
    for i, kind in requests(tree):
        if kind == "unlearn" and tree.get("requests", i, "unlearn", "from") == BASE:
            what = (
                "what the base knows is to be forgotten, and `bad_teacher` with `weights: base` would teach just that"
            )
            problems.at(tree, ("requests", i, "unlearn", "from"), what, hint="take `weights: uniform`")


def _check_protect(tree: Tree, problems: Problems) -> None:
    key: Key = ("unlearning", "protect")
    if tree.get(*key) is None:
        return
    if tree.get("family", default=DEFAULT_FAMILY) != "diffusion":
        problems.at(tree, key, "is for diffusion models, whose cross-attention reads prompts", hint="remove it")
    elif tree.get("unlearning", "saliency") is not None:
        what = "moves weights that saliency keeps from training"
        problems.at(tree, key, what, hint="remove one of the two")


def _check_lookahead(tree: Tree, problems: Problems) -> None:
    """Of what the trainer refuses, the part that the recipe alone tells."""
    key: Key = ("unlearning", "lookahead")
    if tree.get(*key) is not None and _rule(tree) == "alternate":
        what = "`conflict: alternate` steps on one role at a time, so that there is no other to look ahead to"
        problems.at(tree, key, what, hint="remove it, or take another rule")
    _check_displacement(tree, key, problems)


def _check_sharpness(tree: Tree, problems: Problems) -> None:
    key: Key = ("unlearning", "sharpness")
    if tree.get(*key) is not None and tree.get("unlearning", "lookahead") is not None:
        what = "and lookahead both choose where a gradient is taken"
        problems.at(tree, key, what, hint="remove one of the two")
    _check_displacement(tree, key, problems)


def _check_displacement(tree: Tree, key: Key, problems: Problems) -> None:
    if tree.get(*key) is None:
        return
    dtype, scratch = tree.get("model", "dtype"), tree.get("model", "scratch")
    if dtype in ("bfloat16", "float16") and tree.get("adapter") is None and scratch is None:
        what = f"moves the weights a little and back, which {dtype} weights round away"
        hint = "remove `model.dtype` and set `training: {bf16: true}` (mixed precision), or train an `adapter`"
        problems.at(tree, key, what, hint=hint)


def _check_single_role(tree: Tree, problems: Problems) -> None:
    """What works between roles has nothing to work on where nothing is retained."""
    if tree.get("unlearning", "retain") != {} or tree.section("unlearning", "memory"):
        return
    edits = _edits(tree)
    hint = "remove it" if edits else "remove it, or give `retain` a term"
    if _rule(tree) in CONFLICT_RULES and _rule(tree) not in UNOPPOSED:
        problems.at(tree, RULE, "`retain: {}` leaves one role, which is in conflict with none", hint=hint)
    if tree.get("unlearning", "lookahead") is not None and not edits:
        what = "`retain: {}` leaves one role, with no other to look ahead to"
        problems.at(tree, ("unlearning", "lookahead"), what, hint=hint)


def _rule(tree: Tree) -> str | None:
    """The conflict rule that the recipe names, with or without parameters."""
    rule = tree.get(*RULE)
    return rule if isinstance(rule, str) else next(map(str, tree.section(*RULE)), None)


def _check_rule(tree: Tree, key: Key, problems: Problems) -> None:
    check_name(tree, key, CONFLICT_RULES, "conflict rule", problems)
    given = tree.section(*key)
    if tree.get(*key) == {} or len(given) > 1:
        found = ", ".join(map(str, given))
        problems.at(tree, key, "must name one rule", one_of(CONFLICT_RULES), f"'{found}'" if found else "")
        return
    for name, parameters in given.items():
        if name not in CONFLICT_RULES:
            hint = suggestion(name, CONFLICT_RULES)
            expected = one_of(CONFLICT_RULES)
            problems.at(tree, (*key, name), "unknown conflict rule", expected, f"'{name}'", hint)
            continue
        known = rule_parameters(name)
        for parameter, value in (parameters if isinstance(parameters, dict) else {}).items():
            at = (*key, name, parameter)
            if parameter not in known:
                expected = one_of(known) if known else "none"
                hint = suggestion(parameter, known)
                problems.at(tree, at, "unknown parameter", expected, f"'{parameter}'", hint)
            elif problem := value_problem(known[parameter][0], value):
                problems.at(tree, at, **problem)


def _check_suite(tree: Tree, key: Key, problems: Problems) -> None:
    name = tree.get(*key)
    if isinstance(name, str) and name in EVALUATE_ONLY:
        hint = f"remove it, and give `hf-clmul evaluate RUN --suites {name}` once the run is complete"
        problems.at(tree, key, f"'{name}' is no suite of a run: it {EVALUATE_ONLY[name]}", hint=hint)
    else:
        check_name(tree, key, IN_RECIPES, "suite", problems)


def _check_pattern(tree: Tree, key: Key, problems: Problems) -> None:
    pattern = tree.get(*key)
    try:
        re.compile(pattern if isinstance(pattern, str) else "")
    except re.error as error:
        problems.at(tree, key, f"{error}", "a regular expression", shown(pattern))


def _check_model(tree: Tree, problems: Problems) -> None:
    model = tree.section("model")
    path, scratch = model.get("path"), model.get("scratch")
    if path is not None and scratch is not None:
        problems.at(tree, ("model", "scratch"), "given beside model.path", hint="remove one of the two")
    elif "model" in tree.value and isinstance(tree.value["model"], dict) and path is None and scratch is None:
        problems.at(tree, ("model",), "names no model", "path or scratch")
    if isinstance(scratch, dict) and tree.get("adapter") is not None:
        what = "a model made from scratch is trained whole, so that `model/` loads by itself"
        problems.at(tree, ("adapter",), what, hint="remove `adapter`")
    if isinstance(path, str) and path.startswith("package:"):
        package, _, file = path.removeprefix("package:").partition("/")
        if not (package and file):
            problems.at(tree, ("model", "path"), "", "package:NAME/FILE", f"'{path}'")
    flag: Key = ("model", "trust_remote_code")
    if model.get("trust_remote_code") is True and tree.place(*flag).folder is None:
        hint = "if you trust the model's code, add model.trust_remote_code=true to the command"
        problems.at(tree, flag, "a recipe from the Hub cannot switch this on", hint=hint)
    hidden, heads = tree.get("model", "scratch", "hidden"), tree.get("model", "scratch", "heads")
    # rotary position embeddings turn pairs of dimensions
    if type(hidden) is type(heads) is int and heads > 0 and hidden % (2 * heads):
        expected = f"a multiple of 2 x heads = {2 * heads}"
        problems.at(tree, ("model", "scratch", "hidden"), "", expected, shown(hidden))
    layers = tree.get("adapter", "layers")
    if layers in ("last-0", []):
        problems.at(tree, ("adapter", "layers"), "trains no layer", "last-1 or more", shown(layers))


def _check_data(tree: Tree, key: Key, problems: Problems) -> None:
    data = tree.section(*key)
    path = data.get("path")
    if isinstance(path, str) and path.startswith("builtin:"):
        check_name(tree, (*key, "split"), BUILTIN_SPLITS, "split", problems)
    elif isinstance(path, str) and data.get("persons") is not None:
        hint = "choose rows with `where`, or remove it"
        problems.at(tree, (*key, "persons"), "is for built-in data only", hint=hint)
    _check_generated(tree, key, problems)
    check_where(tree, (*key, "where"), "leave it out to take all rows", problems)


def _check_generated(tree: Tree, key: Key, problems: Problems) -> None:
    """Pictures that the model itself draws, and the settings that are theirs alone."""
    data = tree.section(*key)
    if data.get("path") != "generated":
        for name in (name for name in GENERATED if data.get(name) is not None):
            what = "is for `path: generated` only: pictures that the model draws"
            problems.at(tree, (*key, name), what, hint="remove it, or set `path: generated`")
        return
    if tree.get("family", default=DEFAULT_FAMILY) != "diffusion":
        what = "a language model draws no pictures"
        problems.at(tree, (*key, "path"), what, hint="name a file or a Hub id, or set `family: diffusion`")
    if data.get("prompts") is None:
        problems.at(tree, key, "names no prompts to draw", "prompts: a text, or a list of texts or rows")
    for name in (name for name in NOT_GENERATED if data.get(name) is not None):
        problems.at(tree, (*key, name), "says nothing of pictures that the model draws", hint="remove it")


def _check_terms(tree: Tree, table: Key, role: str, problems: Problems) -> None:
    family = tree.get("family", default=DEFAULT_FAMILY)
    known = isinstance(family, str) and family in DEFAULT_TERMS  # else this is said of the family, and nothing of terms
    fitting = [name for name, t in TERMS.items() if role in t.roles and (t.family == family or not known)]
    optional = role in ("retain", "memory")  # to forget without retaining, and to learn without replay, are baselines
    if tree.get(*table) == {} and not optional:
        problems.at(tree, table, "names no term", one_of(fitting))
    if problem := odd_company([name for name in tree.section(*table) if name in fitting]):
        problems.at(tree, table, problem)
    for name, given in tree.section(*table).items():
        key = (*table, name)
        if name not in TERMS:
            hint = suggestion(name, fitting)
            problems.at(tree, key, f"unknown {role} term", one_of(fitting), f"'{name}'", hint)
        elif known and TERMS[name].family != family:
            what = f"is a term for {_models(TERMS[name].family)} and not for {_models(family)}"
            hint = f"did you mean '{_counterpart(name, family, role, fitting)}'?"
            problems.at(tree, key, what, one_of(fitting), f"'{name}'", hint)
        elif name not in fitting:
            what = f"is a term for {' and '.join(TERMS[name].roles)} and not for {role}"
            problems.at(tree, key, what, one_of(fitting), f"'{name}'")
        elif isinstance(given, dict):
            _check_parameters(tree, key, _term_types(name), given, problems)


def _models(family: str) -> str:
    return FAMILIES[family].partition(":")[0]


def _counterpart(name: str, family: str, role: str, fitting: list[str]) -> str:
    """The term of the recipe's family that comes nearest to another one's, else what the role has by default."""
    pairs = [*COUNTERPARTS.items(), *((other, one) for one, other in COUNTERPARTS.items())]
    near = (other for one, other in pairs if one == name and other in fitting)
    return next(near, DEFAULT_TERMS[family][role])


def _check_penalties(tree: Tree, table: Key, problems: Problems) -> None:
    for name, given in tree.section(*table).items():
        if name not in PENALTIES:
            hint = suggestion(name, PENALTIES)
            problems.at(tree, (*table, name), "unknown penalty", one_of(PENALTIES), f"'{name}'", hint)
            continue
        if isinstance(given, dict):
            types = {parameter: annotation for parameter, (annotation, _) in penalty_parameters(name).items()}
            _check_parameters(tree, (*table, name), {**types, "weight": Weight}, given, problems)
        if PENALTIES[name].of_adapters and tree.get("adapter") is None:
            what = "acts on the factors of an adapter, and there is none"
            problems.at(tree, (*table, name), what, hint="add an `adapter` section, or take ewc")


def _term_types(term: str) -> dict[str, Any]:
    types = {name: annotation for name, (annotation, _) in term_parameters(term).items()}
    return types if TERMS[term].edit else {**types, "weight": Weight}


def _check_parameters(tree: Tree, key: Key, types: dict[str, Any], given: dict[str, Any], problems: Problems) -> None:
    for name, value in given.items():
        if name not in types:
            hint = suggestion(name, types)
            problems.at(tree, (*key, name), "unknown parameter", one_of(types), f"'{name}'", hint)
            continue
        if problem := value_problem(types[name], value):
            problems.at(tree, (*key, name), **problem)
