"""SAM, sharpness-aware minimisation, of one role: its gradient is taken where its loss is highest nearby, so that it ends low
in a whole neighbourhood. It knows roles by name and gradients by the passes it is given; no model, no loss.

With F the role's loss the objective is max over |d| <= rho of F(w + d); to first order d = rho grad F / |grad F|, and what
d does to the gradient is left out (Foret et al., arXiv 2010.01412, equations 2 and 3). Of the forget loss alone, beside a
plain retain gradient: Fan et al., arXiv 2502.05374, for whom d is what a relearning attack adds to the weights.
"""

import math
from typing import TYPE_CHECKING

from hf_clmul.gradients.lookahead import Passes
from hf_clmul.gradients.window import inner_product

if TYPE_CHECKING:
    from hf_clmul.gradients.window import Gradient


def at_highest(role: str, rho: float, passes: Passes) -> "Gradient":
    """grad F(w + rho grad F(w) / |grad F(w)|), the norm over all that trains, the whole window and all ranks.

    One pass of forward and backward more than the plain gradient, which it is where that is zero. A loss scale cancels out
    of the way; the loss counts as it is at w.
    """
    own = passes.gradient(role)
    norm = math.sqrt(inner_product(own, own))
    if norm == 0.0:
        return own
    with passes.displaced(own, rho / norm):
        del own
        return passes.gradient(role, again=True)
