"""The table of conflict rules: what each needs and where it comes from. No torch, no model, no state.

Row and column 0 of a Gram matrix belong to the role that the request is about (`learn` or `forget`); the
others are to be kept. Values must be finite: where they are not, the trainer adds the gradients up.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_clmul.gradients.balance import aligned_mtl, bisector, cagrad, mgda
from hf_clmul.gradients.elementwise import gru, pcgrad_per_layer, sago
from hf_clmul.gradients.projection import agem, blur, bome, pcgrad, pcgrad_retain_first, upgrad
from hf_clmul.gradients.schedule import alternate, pdu

DEFAULT_RULE = "pcgrad_retain_first"
UNOPPOSED = (DEFAULT_RULE, "sum")
"""What may stand where a single role acts, whose gradient is simply taken: the default, and what happens."""


@dataclass(frozen=True)
class ConflictRule:
    """One named rule.

    `needs` names what its function takes: nothing (gradients are simply added up, there is no function),
    "gram" (a Gram matrix [m, m] -> weights [m]), "gradients" (see `elementwise.py`), "state" (a gradient
    kept from window to window), "schedule" (weights known beforehand, see `schedule.py`), "losses" (of a
    schedule: also those of roles that it gives no weight).
    """

    function: Callable[..., Any] | None
    needs: frozenset[str]
    paper: str
    summary: str


def _rule(function: Callable[..., Any] | None, needs: str, paper: str, summary: str) -> ConflictRule:
    return ConflictRule(function, frozenset(needs.split()), paper, summary)


# fmt: off
CONFLICT_RULES: dict[str, ConflictRule] = {
    "sum": _rule(None, "", "-", "adds the gradients up; conflicts are left alone"),
    "pcgrad": _rule(pcgrad, "gram", "arXiv 2001.06782", "each gradient gives up what conflicts with another"),
    "pcgrad_retain_first": _rule(
        pcgrad_retain_first, "gram", "arXiv 2604.14808", "only the forget gradient gives way"),
    "pcgrad_per_layer": _rule(
        pcgrad_per_layer, "gradients", "arXiv 2604.14808", "the same within each parameter tensor by itself"),
    "agem": _rule(
        agem, "gram", "arXiv 1812.00420", "the forget gradient alone, kept from raising the retain loss"),
    "gru": _rule(
        gru, "gradients state", "arXiv 2503.09117", "as agem, against an average of past retain gradients"),
    "sago": _rule(
        sago, "gradients", "arXiv 2604.14808", "the retain gradient wherever the signs are opposed"),
    "blur": _rule(blur, "gram", "arXiv 2506.08164", "retaining moves only at right angles to forgetting"),
    "bome": _rule(
        bome, "gram", "arXiv 2209.08709", "retains, and adds just enough forgetting (EraseDiff's bilevel weight)"),
    "upgrad": _rule(
        upgrad, "gram", "arXiv 2406.16232", "pcgrad that conflicts with no role, however many there are"),
    "mgda": _rule(
        mgda, "gram", "arXiv 1810.04650", "the shortest compromise; zero where no step helps all roles"),
    "cagrad": _rule(
        cagrad, "gram", "arXiv 2110.14048", "near the mean, the step that is best for the worst role"),
    "bisector": _rule(
        bisector, "gram", "arXiv 2202.01017", "halves the angle (IMTL-G, Nash-MTL, MUNBa, NGDiff)"),
    "aligned_mtl": _rule(
        aligned_mtl, "gram", "arXiv 2305.19000", "gives the gradients' principal directions one strength"),
    "pdu": _rule(
        pdu, "schedule losses", "arXiv 2506.05314", "weighs the retain loss so that it stays below a bound (primal-dual)"),
    "alternate": _rule(
        alternate, "schedule", "arXiv 2302.09880", "forgets and retains in turn, then only retains (SCRUB's turns)"),
}
# fmt: on


def rule_parameters(name: str) -> dict[str, tuple[Any, Any]]:
    """The parameters of a rule, {name: (type, default)}, read from its function's keyword-only arguments."""
    function = CONFLICT_RULES[name].function
    signature = inspect.signature(function).parameters.values() if function is not None else ()
    return {p.name: (p.annotation, p.default) for p in signature if p.kind is p.KEYWORD_ONLY}


def rule_name(wanted: str | Mapping[str, Any]) -> str:
    """The name in `agem` or `{agem: {margin: 0.1}}`."""
    return wanted if isinstance(wanted, str) else next(iter(wanted))
