"""Which parameters train, by name. It knows modules and flags; nothing of terms, requests or adapters."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_clmul.recipe.problems import nearest


@contextmanager
def only_trainable(model: nn.Module, pattern: str | None) -> Iterator[None]:
    """Within it, of the trainable parameters only those train whose whole name matches; the others hold no gradient.

    None leaves everything as it is. Raises ValueError for a pattern that is no regular expression or matches nothing.
    """
    if pattern is None:
        yield
        return
    chosen = set(matching(model, pattern))
    frozen = [p for p in model.parameters() if p.requires_grad and p not in chosen]
    for p in frozen:
        p.requires_grad_(False)
        p.grad = None
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def matching(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """The trainable parameters whose whole name matches. Raises ValueError if there is none."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"trainable={pattern!r} is not a regular expression: {error}.") from error
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = [p for name, p in named.items() if expression.fullmatch(name)]
    if not found:
        example = nearest(pattern, named) or list(named)[len(named) // 2]
        raise ValueError(
            f"trainable={pattern!r} matches the whole name of none of the {len(named)} trainable parameters, such as "
            f"{example!r}. Write `.*` where anything may stand, as in '.*layers\\.[5-7]\\.mlp\\.down_proj\\.weight'."
        )
    return found
