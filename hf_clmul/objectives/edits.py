"""Edits: changes of weights in closed form, which need no loss and no step. Pure functions of one tensor's values; they know
nothing of models."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt

if TYPE_CHECKING:
    from torch import Tensor


def task_vector(before: "Tensor", reinforced: "Tensor", *, scale: Annotated[float, Gt(0)] = 1.0) -> "Tensor":
    """before - scale (reinforced - before): the change that learning more of the forget data makes, taken backwards.

    Negation of a task vector, Ilharco et al. (arXiv 2212.04089, section 3); values of one parameter, of any shape. The
    authors choose `scale` in [0, 1] on held-out data; default 1 and the fine-tuning's defaults (5 epochs at 1e-5) as in
    the code of MUSE (arXiv 2407.06460).
    """
    return before - scale * (reinforced - before)
