"""What must fit together in a recipe's stream of requests: tasks and their names, what is unlearned from where, what is
isolated, what is replayed. It works on the plain tree and opens no file."""

from collections.abc import Iterable
from typing import Any

from hf_clmul.models import TEACHERS
from hf_clmul.objectives import TERMS
from hf_clmul.recipe.problems import Key, Problems, dotted, one_of, suggestion
from hf_clmul.recipe.training import requests
from hf_clmul.recipe.tree import Tree

BASE = "base"
"""In place of a task: what the model knew before the first request."""
OF_BASE = "unlearn-"
"""Before a request's name: the adapter that unlearns from the base."""
STREAM = "stream"
"""The one adapter of all tasks, where they share one."""


def check_name(tree: Tree, key: Key, valid: Iterable[str], kind: str, problems: Problems) -> None:
    name = tree.get(*key)
    if isinstance(name, str) and name not in valid:
        problems.at(tree, key, f"unknown {kind}", one_of(valid), f"'{name}'", suggestion(name, valid))


def check_where(tree: Tree, key: Key, hint: str, problems: Problems) -> None:
    if tree.get(*key) == {}:
        problems.at(tree, key, "names no column", "a column and its values", hint=hint)
    for column, values in tree.section(*key).items():
        if values == []:
            problems.at(tree, (*key, column), "chooses no row", "at least one value", "an empty list", hint)


def check_teacher(tree: Tree, problems: Problems) -> None:
    check_name(tree, ("teacher",), TEACHERS, "teacher", problems)
    given = tree.section("teacher")
    if tree.get("teacher") == {} or len(given) > 1:
        problems.at(tree, ("teacher",), "must name one teacher", one_of(TEACHERS))
    for name in given:
        if name not in TEACHERS:
            hint = suggestion(name, TEACHERS)
            problems.at(tree, ("teacher", name), "unknown teacher", one_of(TEACHERS), f"'{name}'", hint)


def check_requests(tree: Tree, problems: Problems) -> None:
    """Adds what is wrong in the order of requests, and in what they need of the other sections."""
    tasks = {i: tree.get("requests", i, "learn", "task") for i, kind in requests(tree) if kind == "learn"}
    learned: dict[str, int] = {}
    unlearned: dict[str, int] = {}
    for i, kind in requests(tree):
        key: Key = ("requests", i, kind)
        check_name(tree, (*key, "data"), tree.section("data"), "data set", problems)
        if kind == "unlearn":
            _check_source(tree, (*key, "from"), tasks, learned, problems)
            _check_unlearn(tree, key, unlearned, problems)
            _check_adapter_name(tree, key, tasks.values(), problems)
            _once(tree, (*key, "name"), unlearned, i, problems)
        else:
            check_where(tree, (*key, "where"), "leave it out to learn all rows", problems)
            _check_task(tree, key, tasks[i], learned, unlearned, problems)
            _check_isolated(tree, key, problems)
            if isinstance(tasks[i], str):
                learned.setdefault(tasks[i], i)
    _check_replay(tree, problems)
    _check_slao(tree, problems)
    names = tree.get("export", "tasks")
    for i in range(len(names) if isinstance(names, list) else 0):
        check_name(tree, ("export", "tasks", i), learned, "task", problems)
    if isinstance(names, list) and tree.get("adapter") is None:
        problems.at(tree, ("export", "tasks"), "chooses adapters, and there is no `adapter`", hint="remove it")


def _once(tree: Tree, key: Key, seen: dict[str, int], i: int, problems: Problems) -> None:
    name = tree.get(*key)
    if not isinstance(name, str):
        return
    if name in seen:
        problems.at(tree, key, f"the name '{name}' is that of requests.{seen[name]}", hint="give each its own")
    seen.setdefault(name, i)


def _check_task(
    tree: Tree, key: Key, task: Any, learned: dict[str, int], unlearned: dict[str, int], problems: Problems
) -> None:
    lifts = tree.get(*key, "lifts")
    for j in range(len(lifts) if isinstance(lifts, list) else 0):
        check_name(tree, (*key, "lifts", j), unlearned, "unlearn request before this one", problems)
    if task == BASE:
        problems.at(tree, (*key, "task"), f"'{BASE}' stands for what the model knew before", hint="take another name")
    if isinstance(task, str) and task.startswith(OF_BASE):
        what = f"'{task}' could be the name of an adapter that unlearns from the base"
        problems.at(tree, (*key, "task"), what, hint=f"take a name that does not begin with '{OF_BASE}'")
    if task == STREAM and tree.get("adapter", "strategy") in ("single", "slao"):
        problems.at(tree, (*key, "task"), f"'{STREAM}' names the adapter of all tasks", hint="take another name")
    if not isinstance(task, str) or task not in learned:
        return
    first = learned[task]
    if tree.get(*key, "data") != tree.get("requests", first, "learn", "data"):
        what = f"the task '{task}' is already learned by requests.{first}, from other data"
        problems.at(tree, (*key, "task"), what, hint="give each task its own name")
    elif tree.get("requests", first, "learn", "isolated") is True or tree.get(*key, "isolated") is True:
        what = f"the task '{task}' is isolated, which is learned once (by requests.{first})"
        problems.at(tree, (*key, "task"), what, hint="give each its own name")


def _check_isolated(tree: Tree, key: Key, problems: Problems) -> None:
    """An isolated task has an adapter that meets no other task's data."""
    isolated = tree.get(*key, "isolated") is True
    for option in ("shards", "slices"):
        if tree.get(*key, option) not in (None, 1) and not isolated:
            hint = "add `isolated: true`"
            problems.at(tree, (*key, option), "divides an isolated task, and this one is not", hint=hint)
    if not isolated:
        return
    if tree.get("adapter") is None:
        what = "keeps a task in an adapter of its own, and this recipe trains all weights"
        problems.at(tree, (*key, "isolated"), what, hint="add an `adapter` section")
    if tree.get("model", "scratch") is not None:
        what = (
            "says that to delete a task is exact, and the tokenizer of a model made from scratch learns from all texts"
        )
        problems.at(tree, (*key, "isolated"), what, hint="name a model with `model.path`, or remove `isolated`")
    if tree.section(*key, "memory"):
        what = "asks for replay, and an isolated task meets no other task's data"
        problems.at(tree, (*key, "memory"), what, hint="remove it, or `isolated`")


def _check_unlearn(tree: Tree, key: Key, unlearned: dict[str, int], problems: Problems) -> None:
    given = [option for option in ("where", "ids", "data") if tree.get(*key, option) is not None]
    check_where(tree, (*key, "where"), "leave it out to forget the whole task", problems)
    check_name(tree, (*key, "retain"), tree.section("data"), "data set", problems)
    for option in given[1:]:
        problems.at(tree, (*key, option), f"given beside {dotted(key)}.{given[0]}", hint="remove one of the two")
    from_base = tree.get(*key, "from") == BASE
    if from_base and given != ["data"]:
        what = "the base model has no rows to choose from"
        problems.at(tree, (*key, "from"), what, hint="name the rows to forget with `data` alone")
    if tree.get(*key, "filter") is True and not (from_base and tree.get("adapter") is not None):
        what = "a filter is an adapter of its own above the base"
        hint = f"needs `from: {BASE}` and an `adapter`" if not from_base else "add an `adapter` section"
        problems.at(tree, (*key, "filter"), what, hint=hint)


def _check_adapter_name(tree: Tree, key: Key, tasks: Iterable[Any], problems: Problems) -> None:
    """What is unlearned from the base has an adapter of its own, which must be no task's."""
    name = f"unlearn-{tree.get(*key, 'name')}"
    if tree.get(*key, "from") == BASE and tree.get("adapter") is not None and name in tasks:
        what = f"its adapter would be called '{name}', as that of a task is"
        problems.at(tree, (*key, "name"), what, hint="take another name")


def _check_source(tree: Tree, key: Key, tasks: dict[int, Any], learned: Iterable[str], problems: Problems) -> None:
    """What is unlearned must have been learned by an earlier request."""
    source = tree.get(*key)
    if not isinstance(source, str) or source in learned or source == BASE:
        return
    if later := [i for i, task in tasks.items() if task == source]:
        what = f"'{source}' is learned later, by requests.{later[0]}"
        problems.at(tree, key, what, hint="move this request behind it")
        return
    expected = one_of(learned) if learned else "a task that an earlier learn request names"
    problems.at(tree, key, "unknown task", expected, f"'{source}'", suggestion(source, learned))


def _check_slao(tree: Tree, problems: Problems) -> None:
    """SLAO begins a task from other factors than the last one left, which the teacher before the request would have to be."""
    if tree.get("adapter", "strategy") != "slao" or "ema" in (tree.get("teacher"), *tree.section("teacher")):
        return
    for table in (("learning", "learn"), ("learning", "memory")):
        for name in tree.section(*table):
            if name in TERMS and "teacher" in TERMS[name].needs:
                what = "asks the model before the request, and `strategy: slao` begins a task from another start"
                problems.at(tree, (*table, name), what, hint="use `teacher: ema`, or another strategy")


def _check_replay(tree: Tree, problems: Problems) -> None:
    """Terms on the memory need one that holds something."""
    size = tree.get("memory", "size")
    tables: list[Key] = [("learning", "memory"), ("unlearning", "memory")]
    tables += [("requests", i, "learn", "memory") for i, kind in requests(tree) if kind == "learn"]
    for table in tables:
        for name in tree.section(*table):
            if name in TERMS and "stored" in TERMS[name].needs and tree.get("memory", "top_k") is None:
                what = "compares with what the model once said of an example, and nothing is kept of that"
                problems.at(tree, (*table, name), what, hint="add `top_k: 64` to the section `memory`")
        if tree.section(*table) and not (isinstance(size, int) and size > 0):
            what = "acts on the memory, " + ("whose size is 0" if size == 0 else "and the recipe has none")
            problems.at(tree, table, what, hint="add a section such as `memory: {size: 64}`, or remove these terms")
