"""Which teacher is wanted and how, typed and checked. No torch, no model."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from hf_clmul.gradients.options import Section, options
from hf_clmul.models import TEACHERS
from hf_clmul.recipe.problems import did_you_mean, shown


class Average(Section):
    """UniCLUN's continual teacher (arXiv 2408.11374), see `ema.py`. Defaults: the authors' code for CIFAR-10, 200 examples kept."""

    probability: float = Field(
        0.2, gt=0, le=1, description="how often the average takes a step, of the optimizer's steps"
    )
    momentum: float = Field(0.999, ge=0, lt=1, description="the most that it keeps of itself in a step")


def teacher_choice(wanted: str | Mapping[str, Any]) -> tuple[str, Average | None]:
    """From a name, or {name: {parameter: value}}: the name, and for `ema` its settings.

    Raises ValueError, one line, for an unknown teacher or parameter and a value out of its range.
    """
    if not isinstance(wanted, str) and (not isinstance(wanted, Mapping) or len(wanted) != 1):
        raise ValueError(f"teacher={wanted!r} is not one teacher: give a name, or {{name: {{parameter: value}}}}.")
    (name, given), *_ = [(wanted, None)] if isinstance(wanted, str) else wanted.items()
    if name not in TEACHERS:
        raise ValueError(
            f"teacher={name!r} is not known; there are {', '.join(TEACHERS)}.{did_you_mean(name, TEACHERS)}"
        )
    if name == "ema":
        if given is not None and not isinstance(given, Mapping | Average):
            raise ValueError(f"teacher.ema: expected a section (key: value), found {shown(given)}.")
        return name, options(Average, "teacher.ema", given or {})
    if given:
        raise ValueError(f"teacher={name!r} has no parameters; found {shown(given)}.")
    return name, None
