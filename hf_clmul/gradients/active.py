"""The conflict rule of a training run, checked and ready to call, with its state. Knows the table; no
trainer, no recipe."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_clmul.errors import RunError
from hf_clmul.gradients.conflict import CONFLICT_RULES, rule_name, rule_parameters
from hf_clmul.gradients.schedule import Progress
from hf_clmul.paths import atomic_write
from hf_clmul.recipe.problems import did_you_mean, value_problem

if TYPE_CHECKING:
    from torch.nn import Parameter

    from hf_clmul.gradients.window import Gradient

Weigh = Callable[[list[list[float]]], Sequence[float]]
STATE, SCHEDULE = "conflict_state.safetensors", "conflict_weights.json"
"""In a checkpoint: the gradient that a stateful rule keeps, and the next weights of a scheduled one."""


class ActiveRule:
    """A rule with its parameters and what it keeps from one window to the next: `state`, a gradient or None; `scheduled`, the
    weights of the window to come, for a rule that knows them beforehand, else None."""

    def __init__(self, name: str, function: Callable[..., Any] | None, needs: frozenset[str]) -> None:
        self.name, self.function, self.needs = name, function, needs
        self.state: Gradient | None = None
        self.scheduled: list[float] | None = None

    @property
    def compares(self) -> bool:
        """Whether it needs the gradients of the roles apart."""
        return bool(self.needs & {"gram", "gradients"})

    def weights(self, gram: list[list[float]]) -> list[float]:
        """One weight for each role. Raises ValueError if a user's own rule returns another number of them."""
        if not self.compares:
            return [1.0] * len(gram) if self.scheduled is None else self.scheduled
        weights = [float(w) for w in self.function(gram)]
        if len(weights) != len(gram):
            raise ValueError(
                f"the conflict rule returned {len(weights)} weights for {len(gram)} roles: it must "
                "return one weight for each row of the Gram matrix."
            )
        return weights

    def combined(self, gradients: "Sequence[Gradient]", gram: list[list[float]]) -> "Gradient":
        """The update of a rule that needs the gradients; they may be overwritten."""
        if "state" not in self.needs:
            return self.function(gradients, gram)
        update, self.state = self.function(gradients, gram, self.state)
        return update

    def start(self, roles: int) -> None:
        """Forgets what it kept; a schedule's first weights, for so many roles."""
        self.state = None
        self.scheduled = self.function(None, None, Progress(roles, 0.0)) if "schedule" in self.needs else None

    def advance(self, losses: list[float], epoch: float) -> None:
        """The next window's weights of a schedule, from this window's mean losses [m] over all ranks."""
        if self.scheduled is not None:
            self.scheduled = self.function(self.scheduled, losses, Progress(len(losses), epoch))

    def save(self, folder: Path) -> None:
        """Writes what it keeps into a checkpoint."""
        if "state" in self.needs:
            from hf_clmul.gradients.window import save_gradient

            save_gradient(self.state or [], folder / STATE)  # none yet where every window overflowed
        if self.scheduled is not None:
            atomic_write(folder / SCHEDULE, json.dumps(self.scheduled) + "\n")

    def load(self, folder: Path, parameters: "Sequence[Parameter]") -> None:
        """Reads what `save` wrote. Raises RunError if it is missing, or of other parameters."""
        for file, expected in ((STATE, "state" in self.needs), (SCHEDULE, self.scheduled is not None)):
            if expected and not (folder / file).is_file():
                raise RunError(
                    f"{folder} has no {file}: it was made without conflict={self.name!r}. Start the request anew."
                )
        if "state" in self.needs:
            from hf_clmul.gradients.window import load_gradient

            self.state = load_gradient(folder / STATE, parameters)
        if self.scheduled is not None:
            self.scheduled = json.loads((folder / SCHEDULE).read_text("utf-8"))


def active_rule(wanted: str | Mapping[str, Any] | Weigh) -> ActiveRule:
    """From a name, {name: {parameter: value}}, or any callable Gram [m][m] -> weights [m].

    Raises ValueError, one line, for an unknown rule or parameter and a value out of its range.
    """
    if callable(wanted):
        return ActiveRule("conflict_rule", wanted, frozenset({"gram"}))
    if not isinstance(wanted, str) and (not isinstance(wanted, Mapping) or len(wanted) != 1):
        raise ValueError(f"conflict={wanted!r} is not one rule: give a name, or {{name: {{parameter: value}}}}.")
    name = rule_name(wanted)
    if name not in CONFLICT_RULES:
        raise ValueError(
            f"conflict={name!r} is not known; there are {', '.join(CONFLICT_RULES)}."
            + did_you_mean(name, CONFLICT_RULES)
        )
    parameters = {} if isinstance(wanted, str) else dict(wanted[name] or {})
    known = rule_parameters(name)
    for parameter, value in parameters.items():
        if parameter not in known:
            there = f"there are {', '.join(known)}" if known else "the rule has none"
            raise ValueError(
                f"conflict {name}: unknown parameter {parameter!r}; {there}.{did_you_mean(parameter, known)}"
            )
        if problem := value_problem(known[parameter][0], value):
            raise ValueError(f"conflict {name}: {parameter}: expected {problem['expected']}, found {problem['found']}.")
    rule = CONFLICT_RULES[name]
    return ActiveRule(name, partial(rule.function, **parameters) if rule.function is not None else None, rule.needs)
