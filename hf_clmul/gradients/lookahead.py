"""LUR, learning to unlearn while retaining: the gradient of one role is taken where a step on another role leads, so that
the two come to agree. It knows roles by name and gradients by the passes it is given; no model, no loss.

With I the loss of the inner role and O that of all others, the objective is I(w) + O(w - alpha grad I(w)); to first order
in alpha that is I + O - alpha <grad I, grad O> (Patel and Qiu, arXiv 2503.06339; the paper's method section was not at
hand, its title and a re-implementation name retaining as the inner role: that is the default).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from hf_clmul.gradients.window import Gradient

Mode = Literal["first_order", "cross", "exact"]


class Passes(Protocol):
    """What a window can work out. A gradient is that of the whole window, over all ranks, at the weights of the moment."""

    def gradient(self, role: str, again: bool = False) -> "Gradient":
        """Of a role's loss. `again`: its loss was counted already."""

    def displaced(self, gradient: "Gradient", step: float) -> AbstractContextManager[None]:
        """Within it, the weights are moved by `step` times `gradient`; afterwards they are what they were, bit for bit."""

    def curvature(self, role: str, direction: "Gradient") -> "Gradient":
        """The Hessian of a role's loss times a direction, by double backward."""


def looked_ahead(
    roles: Sequence[str],
    inner: str,
    mode: Mode,
    alpha: float,
    passes: Passes,
    total: "Callable[[Sequence[Gradient]], Gradient]",
) -> "list[Gradient]":
    """The gradients of the roles, in their order, whose sum is the gradient of I(w) + O(w - alpha grad I(w)).

    An outer role has o = grad O(w'), w' = w - alpha grad I(w). The inner role has, by mode,
    - exact: grad I(w) - alpha H_I o, with a double backward;
    - cross: grad I(w - alpha o), the same up to alpha^2 / 2 times a third derivative, in one more pass;
    - first_order: grad I(w). This drops H_I o, which is half of the regulariser's gradient.

    Passes of forward and backward, where plain training takes one for each role: none more for first_order, one more of
    the inner role for cross. `total` adds gradients up without overwriting them.
    """
    own = passes.gradient(inner)
    with passes.displaced(own, -alpha):
        found = {role: passes.gradient(role) for role in roles if role != inner}
    if mode != "first_order":
        outer = total(list(found.values()))
        if mode == "cross":
            del own  # its memory is needed for the one that takes its place
            with passes.displaced(outer, -alpha):
                own = passes.gradient(inner, again=True)
        else:
            own = _moved(own, passes.curvature(inner, outer), -alpha)
    found[inner] = own
    return [found[role] for role in roles]


def _moved(gradient: "Gradient", by: "Gradient", step: float) -> "Gradient":
    """gradient + step * by, in the storage of `gradient`."""
    return [
        g if b is None else b.mul_(step) if g is None else g.add_(b, alpha=step)
        for g, b in zip(gradient, by, strict=True)
    ]
