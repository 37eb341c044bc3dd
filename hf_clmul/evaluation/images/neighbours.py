"""Which concepts are near neighbours of what is to be forgotten, where nobody named them: those whose text means most nearly the
same to the pipeline. It knows embeddings and names; nothing of requests or networks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

COUNT = 2
RECIPE, EMBEDDINGS = "recipe", "text embeddings"


@dataclass(frozen=True)
class Near:
    """Near neighbours, on one axis, of what is to be forgotten: whence they are (RECIPE or EMBEDDINGS; None where there are none),
    and of chosen ones how alike each candidate is, the most alike first."""

    names: tuple[str, ...] = ()
    source: str | None = None
    similarity: Mapping[str, float] | None = None


def candidates(
    rows: Sequence[Mapping[str, Any]], forgotten: Sequence[Mapping[str, Any]], axis: str
) -> tuple[list[str], list[str]]:
    """The names on the axis of what is forgotten, and of all other prompts, each once and in order."""
    gone = list(dict.fromkeys(row[axis] for row in forgotten if row.get(axis) is not None))
    kept = dict.fromkeys(row[axis] for row in rows if row.get(axis) is not None)
    return gone, [name for name in kept if name not in gone]


def similarities(gone: Tensor, others: Tensor) -> list[float]:
    """How alike each of the others [M, T, D] is to the one of what is forgotten [N, T, D] that it is most like: the cosine of
    their states' means over positions, less the mean of all, since the start and the padding are the same in each text."""
    import torch

    every = torch.cat([gone, others]).double().mean(1)
    every = torch.nn.functional.normalize(every - every.mean(0), dim=-1)
    return (every[len(gone) :] @ every[: len(gone)].T).amax(1).tolist()


def nearest(similarity: Mapping[str, float]) -> tuple[str, ...]:
    """COUNT names, the most alike first; fewer where no name would be left to be far. Ties go by name."""
    order = sorted(similarity, key=lambda name: (-round(similarity[name], 6), name))
    return tuple(order[: min(COUNT, max(1, len(order) - 1))])
