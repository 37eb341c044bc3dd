"""What can be asked of a window beside its conflict rule, typed and checked: a look ahead, sharpness, saliency and
protected prompts. It computes nothing."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from hf_clmul.recipe.problems import explained, suggestion


class Section(BaseModel):
    """Base of all sections: unknown keys forbidden, no conversion of types (a quoted number is text)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Lookahead(Section):
    """LUR (arXiv 2503.06339): one role's gradient is taken where a step on another leads, see `lookahead.py`."""

    alpha: float = Field(0.1, gt=0, description="length of the inner step, in units of the weights per gradient")
    inner: Literal["retain", "forget"] = Field("retain", description="the role whose step is tried first")
    mode: Literal["first_order", "cross", "exact"] = Field(
        "cross",
        description="first_order: half the regulariser, no further pass; cross: one pass more; exact: a test oracle",
    )


class Sharpness(Section):
    """SAM (arXiv 2010.01412) of the forget role, against relearning (arXiv 2502.05374), see `sharpness.py`."""

    role: ClassVar[str] = "forget"

    rho: float = Field(0.01, gt=0, description="distance at which the forget loss is raised, in units of the weights")


Fraction = Annotated[float, Field(gt=0, lt=1)]


class Saliency(Section):
    """Which weights matter for the forget data, by the gradient of its likelihood before the request, see `saliency.py`."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    train: Fraction | None = Field(
        None, description="train only this part of the weights, those with the largest gradient (SalUn: 0.5)"
    )
    trim: Fraction | None = Field(
        None,
        description="draw this part anew before training, that with the largest gradient times weight (Scissorhands)",
    )

    @model_validator(mode="after")
    def _names_one(self) -> "Saliency":
        if self.train is None and self.trim is None:
            raise PydanticCustomError("empty", "`train`, `trim` or both")
        return self


class Protect(Section):
    """What keys and values of cross-attention put out for other prompts stays as it was, whatever is forgotten (CUIG,
    ICLR 2026)."""

    prompts: list[str] | None = Field(
        None, description="prompts that are protected; the captions of what is retained and remembered, if left out"
    )
    tokens: Literal["last", "all"] = Field("last", description="of a prompt: its last word's last token, or all")
    directions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="protect at most so many directions of their embeddings, the strongest"
    )


OF_STEPS = ("lookahead", "sharpness", "saliency", "protect")
"""By the names they have in recipes and training arguments."""

T = TypeVar("T", bound=Section)


def options(kind: type[T], name: str, given: Mapping[str, Any] | T | None) -> T | None:
    """From a mapping; None stays None. Raises ValueError, one line for each problem."""
    if given is None or isinstance(given, kind):
        return given
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        found = error.errors(include_url=False)
    raise ValueError("; ".join(_problem(kind, name, entry) for entry in found) + ".")


def _problem(kind: type[Section], name: str, entry: Mapping[str, Any]) -> str:
    key = ".".join(map(str, (name, *entry["loc"])))
    if entry["type"] == "extra_forbidden":
        known = list(kind.model_fields)
        hint = suggestion(entry["loc"][-1], known)
        return f"{key}: unknown key, there are {', '.join(known)}" + (f" ({hint})" if hint else "")
    why = explained(entry)
    return f"{key}: expected {why['expected']}, found {why['found']}"
