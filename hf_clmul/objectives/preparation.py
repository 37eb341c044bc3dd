"""What some terms need made from the live model before the first step, with their settings: parameters of the term that no
loss sees. No torch, no model."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True, kw_only=True)
class Generated:
    """`alternatives`: other answers to each example, written by the model itself.

    5 is the number of AltPO (arXiv 2409.13474), whose grid for beta is 0.05, 0.1 and 0.5.
    """

    alternatives: Annotated[int, Ge(1)] = 5
