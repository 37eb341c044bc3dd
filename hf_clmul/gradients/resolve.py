"""One window under a conflict rule: the roles' gradients, as they are, with a look ahead or at the highest loss nearby, become
one in `.grad`. It knows rules and gradients by their contracts; no model, no term, no batch."""

from collections.abc import Sequence

import torch

from hf_clmul.gradients.active import ActiveRule
from hf_clmul.gradients.lookahead import Passes, looked_ahead
from hf_clmul.gradients.options import Lookahead, Sharpness
from hf_clmul.gradients.sharpness import at_highest
from hf_clmul.gradients.window import (
    Gradient,
    GradientWindow,
    agreed,
    gram_matrix,
    inner_product,
    is_finite,
    scale,
    statistics,
    total,
)


class Change:
    """What the optimizer made of a window: the inner product of each role's gradient with the change of the weights.

    To first order that is the change of the role's loss by this step, in the loss's unit. Optimizers rescale gradients
    coordinate by coordinate, so that a projected gradient may still raise the loss it was projected for.
    """

    def __init__(
        self, roles: Sequence[str], gradients: Sequence[Gradient], window: GradientWindow, loss_scale: float
    ) -> None:
        self.roles, self.loss_scale = roles, loss_scale  # the scaler may change its scale with the step
        self.gradients = [[None if t is None else t.clone() for t in gradient] for gradient in gradients]
        self.parameters = window.parameters
        self.before = [p.detach().clone() for p in window.parameters]

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        """{"change/ROLE": first-order change of its loss, "plain_cosine/ROLE/OTHER": of the roles' own gradients}."""
        moved: Gradient = [p.detach() - b for p, b in zip(self.parameters, self.before, strict=True)]
        found = {
            f"change/{role}": inner_product(gradient, moved) / self.loss_scale
            for role, gradient in zip(self.roles, self.gradients, strict=True)
        }
        of_roles = statistics(gram_matrix(self.gradients, self.loss_scale), self.roles)
        return found | {f"plain_{name}": value for name, value in of_roles.items() if name.startswith("cosine")}


def resolve(
    window: GradientWindow,
    roles: Sequence[str],
    rule: ActiveRule,
    lookahead: Lookahead | None,
    sharpness: Sharpness | None,
    passes: Passes,
    loss_scale: float,
    measure: bool,
) -> tuple[dict[str, float], Change | None]:
    """Leaves the window's update in `.grad`. Returns what is to be logged of it, and with `measure` what remains to be
    measured once the optimizer has made its step.

    `sharpness` is of one role, and does not go with a look ahead. Gradients that are not finite are added up, so
    that a loss scaler sees the overflow and skips the step; nothing is logged of them then.
    """
    change = None
    displaces = lookahead is not None or sharpness is not None
    if measure and displaces:  # the gradients to come are those of other weights
        change = Change(roles, [passes.gradient(role, again=True) for role in roles], window, loss_scale)
    if lookahead is not None:
        step = lookahead.alpha / loss_scale
        gradients = looked_ahead(roles, lookahead.inner, lookahead.mode, step, passes, total)
    elif sharpness is not None:
        gradients = [
            at_highest(role, sharpness.rho, passes) if role == sharpness.role else passes.gradient(role)
            for role in roles
        ]
    else:
        gradients = [passes.gradient(role) for role in roles]
    if measure and not displaces:
        change = Change(roles, gradients, window, loss_scale)
    gram = gram_matrix(gradients, loss_scale)
    if not is_finite(gram):
        window.combine(gradients, [1.0] * len(gram))
        return {}, None
    found = statistics(gram, list(roles))
    if "gradients" in rule.needs:
        scale(gradients, 1 / loss_scale)
        update = rule.combined(gradients, gram)
        scale([update], loss_scale)
        window.put(update)
        return found, change
    weights = rule.weights(gram)
    if rule.compares:
        weights = agreed(weights, window.parameters[0].device)
    window.combine(gradients, weights)
    return {**found, **{f"weight/{role}": w for role, w in zip(roles, weights, strict=True)}}, change
