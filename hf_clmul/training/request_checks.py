"""What a trainer is asked to do, understood and checked as a whole before anything trains: terms, rule, look ahead and data
against the model. The trainer begins with it; a run tries all its requests so before the first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_clmul.data.roles import RoleDataset, derived_seed
from hf_clmul.families import Family
from hf_clmul.gradients.active import ActiveRule, active_rule
from hf_clmul.gradients.conflict import UNOPPOSED, rule_name
from hf_clmul.gradients.options import Lookahead, Sharpness, options
from hf_clmul.models import adapters
from hf_clmul.objectives import FORGET
from hf_clmul.objectives.penalties import active_penalties
from hf_clmul.training.averaged import check_average
from hf_clmul.training.penalised import check_penalties
from hf_clmul.training.preparation import check_preparations
from hf_clmul.training.protected import check_protected
from hf_clmul.training.refusals import refuse
from hf_clmul.training.role_data import Terms, acting_data, check_layers, role_terms

if TYPE_CHECKING:
    from hf_clmul.training_args import ClmulConfig


@dataclass(frozen=True)
class Understood:
    """What the trainer works with; `model` has the new adapter where one was asked for."""

    model: Any
    terms: Terms
    rule: ActiveRule
    lookahead: Lookahead | None
    sharpness: Sharpness | None
    data: RoleDataset | None


def understood(
    args: "ClmulConfig",
    model: Any,
    datasets: Any,
    family: Family,
    conflict_rule: Callable[[list[list[float]]], list[float]] | None = None,
    peft_config: Any = None,
    given: Mapping[str, Any] | None = None,
) -> Understood:
    """Raises ValueError for whatever of it cannot be honoured. Weights are not looked at, so that the model may be on the
    meta device; nothing of it changes but for a new adapter of `peft_config`. `given`: see `refuse`."""
    terms = role_terms(args, datasets, family.name)
    several = len(terms) > 1  # one role has nothing to be in conflict with
    rule = active_rule((conflict_rule or args.conflict) if several else "sum")
    lookahead = options(Lookahead, "lookahead", args.lookahead) if several else None
    sharpness = options(Sharpness, "sharpness", args.sharpness)
    refuse(args, model, peft_config, rule, lookahead, sharpness, terms, dict(given or {}))
    if peft_config is not None:
        model = adapters.attach(model, peft_config, "default", derived_seed(args.seed, "adapter"))
    check_layers(model, terms, family.pattern(args.trainable))
    check_preparations(args, model, terms)
    check_average(args, model, family.name, terms)
    check_protected(args, model, family, FORGET in terms)
    check_penalties(model, active_penalties(args.penalties))
    if not several and args.retain == {}:
        _check_single_role(args, conflict_rule)
    family.check(model)
    if datasets is None:
        return Understood(model, terms, rule, lookahead, sharpness, None)
    seed = args.data_seed if args.data_seed is not None else args.seed
    data = family.roles(acting_data(datasets, terms), terms, seed)
    return Understood(model, terms, rule, lookahead, sharpness, data)


def _check_single_role(args: "ClmulConfig", conflict_rule: Any) -> None:
    """Raises ValueError for what works between roles where the caller wants nothing retained."""
    between = {
        "conflict_rule": conflict_rule is not None,
        "conflict": rule_name(args.conflict) not in UNOPPOSED,
        "lookahead": args.lookahead is not None,
    }
    for option in (option for option, given in between.items() if given):
        raise ValueError(
            f"retain={{}} leaves one role, so that {option} has no other to work with: leave {option} out, or give a retain "
            "term."
        )
