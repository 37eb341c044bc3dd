"""What the tests of conflict rules share: random gradients, and a rule's update with its rounding error."""

from functools import partial

import numpy as np
import pytest

from hf_clmul.gradients.conflict import CONFLICT_RULES

RULES = {name: rule.function for name, rule in CONFLICT_RULES.items() if rule.needs == {"gram"}}
LENGTHS = {f"bisector {length}": partial(RULES["bisector"], length=length) for length in ("imtl", "nash", "unit")}
AGREEMENTS = {f"bome {how}": partial(RULES["bome"], agreement=how) for how in ("projection", "cosine")}
VARIANTS = {name: rule for name, rule in RULES.items() if name not in ("bisector", "bome")} | LENGTHS | AGREEMENTS
every_variant = pytest.mark.parametrize("name", VARIANTS)


def gram_of(gradients):
    return (gradients @ gradients.T).tolist()


def random_gradients(roles, count=200, decades=2):
    """Gradients [m, d] with lengths over twice as many decades; about half of the pairs conflict. One pair
    in seven lies on a line, and with fewer dimensions than roles the Gram matrix is singular."""
    rng = np.random.default_rng(roles)
    for i in range(count):
        scale = 10.0 ** rng.integers(-decades, decades + 1, size=(roles, 1))
        yield rng.normal(size=(roles, 1 + i % 7)) * scale


def independent_gradients(roles, count=200, decades=2):
    """The same in enough dimensions that the gradients are independent."""
    rng = np.random.default_rng(roles + 10)
    for _ in range(count):
        yield rng.normal(size=(roles, roles + 4)) * 10.0 ** rng.integers(-decades, decades + 1, size=(roles, 1))


def update_of(rule, gradients):
    """g = sum of w_i g_i, and the rounding error of its inner product with each gradient."""
    weights = np.asarray(rule(gram_of(gradients)))
    lengths = np.linalg.norm(gradients, axis=1)
    return weights @ gradients, 1e-10 * (np.abs(weights) @ lengths) * lengths
