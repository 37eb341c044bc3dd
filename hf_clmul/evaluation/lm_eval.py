"""The suite `lm_eval`: a model on named tasks of EleutherAI's lm-evaluation-harness (MMLU, WMDP, ...), an extra of this
package. Knows how the harness is called and how its results are read; none of its tasks, which the harness downloads
itself."""

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_clmul.errors import RunError

logger = logging.getLogger(__name__)

INSTALL = 'pip install "hf_clmul[lm-eval]"'
_NORMAL_95 = 1.959964  # standard errors on either side of a mean


def lm_eval(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Runs the tasks and returns their record; None on ranks other than the first, which the harness gives nothing.

    `num_fewshot` None is each task's own; `limit` takes the first examples of each task only, for a quick look: such
    numbers are no results, and the record says so. The model's mode and all random states are left as they were.
    Record:
        tasks     {task: {"metrics": {name: {"value", "n", "stderr", "low", "high"}}, "n_shot", "version"}}, also for
                  groups of tasks; `name` is the harness's metric, with its filter where there is one; 95 % interval
        limit, seed, num_fewshot, apply_chat_template  as asked
        versions  {"lm_eval": ...}
    Raises RunError where the harness is not installed, knows no such task, or returns nothing for one.
    """
    if not tasks:
        raise RunError(
            "lm_eval: no tasks are named. Name some, such as mmlu or wmdp; `lm-eval ls tasks` lists all of them."
        )
    of_harness, wrapper = harness()
    if limit is not None:
        logger.warning(
            "lm_eval: ONLY THE FIRST %d EXAMPLES of each task are used (limit). These numbers are for a quick look and "
            "must not be compared with published ones.", limit,
        )  # fmt: skip
    with _undisturbed(model):
        found = _evaluated(
            of_harness, tasks,
            model=wrapper(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            num_fewshot=num_fewshot, limit=limit, apply_chat_template=apply_chat_template, log_samples=False,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    if found is None:
        return None
    missing = [task for task in tasks if not found["results"].get(task)]
    if missing:
        raise RunError(f"lm_eval: the harness returned nothing for {', '.join(missing)}. Check the names of the tasks.")
    return {
        "tasks": {task: _task(found, task) for task in found["results"]},
        "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template, "seed": seed,
        "versions": {"lm_eval": _version()},
    }  # fmt: skip


def harness() -> tuple[Any, type]:
    """The package and its wrapper of a model in memory. Raises RunError where it cannot be imported."""
    try:
        import lm_eval as package
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise RunError(
            f"the suite lm_eval needs lm-evaluation-harness, which cannot be imported ({error}). Install it: {INSTALL}"
        ) from None
    return package, HFLM


def _evaluated(harness: Any, tasks: Sequence[str], **arguments: Any) -> dict[str, Any] | None:
    try:
        return harness.simple_evaluate(tasks=list(tasks), **arguments)
    except (KeyError, ValueError) as error:  # how its releases answer an unknown task
        raise RunError(
            f"lm_eval: the harness refuses {', '.join(tasks)}: {error}. `lm-eval ls tasks` lists what it knows."
        ) from error


def _task(found: Mapping[str, Any], task: str) -> dict[str, Any]:
    scores = found["results"][task]
    n = _samples(found, task)
    metrics = {}
    for key, value in scores.items():
        name, _, filtered = key.partition(",")
        if isinstance(value, bool) or not isinstance(value, int | float) or name.endswith("_stderr"):
            continue
        error = scores.get(",".join([f"{name}_stderr", *([filtered] if filtered else [])]))
        shown = name if filtered in ("", "none") else f"{name}/{filtered}"
        metrics[shown] = _estimate(float(value), n, error)
    return {
        "metrics": metrics,
        "n_shot": found.get("n-shot", {}).get(task),
        "version": found.get("versions", {}).get(task),
    }


def _estimate(value: float, n: int | None, error: Any) -> dict[str, float | int | None]:
    """The harness writes "N/A" where it has no standard error."""
    stderr = float(error) if isinstance(error, int | float) else None
    low, high = (None, None) if stderr is None else (value - _NORMAL_95 * stderr, value + _NORMAL_95 * stderr)
    return {"value": value, "n": n, "stderr": stderr, "low": low, "high": high}


def _samples(found: Mapping[str, Any], task: str) -> int | None:
    """Examples that a task was measured on; of a group, those of its tasks."""
    counted = found.get("n-samples", {})
    if task in counted:
        return counted[task]["effective"]
    below = [_samples(found, name) for name in found.get("group_subtasks", {}).get(task, [])]
    return sum(below) if below and None not in below else None


def _version() -> str | None:
    try:
        return version("lm_eval")
    except PackageNotFoundError:
        return None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The harness seeds every generator and puts the model into eval mode; a run goes on with its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, mode in modes:
            module.training = mode
