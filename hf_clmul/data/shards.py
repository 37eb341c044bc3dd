"""A task cut into shards, each into slices that are trained one after the other, each as an adapter on the frozen
ones before it: a deletion retrains a part, and what came before that part stays as it is. Knows rows and ids; nothing
of training.

SISA (Bourtoule et al., arXiv 1912.03817) cuts so; in S3T (Basu Roy Chowdhury et al., arXiv 2406.16257) each slice
trains its own low-rank weights and leaves earlier ones as they are, so that the prefix stays usable.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from hf_clmul.data.keyed_hash import keyed_hash
from hf_clmul.data.sources import Example

Part = tuple[int, int]
"""(shard, slice), both counted from 0."""


@dataclass(frozen=True)
class Cost:
    """What requests are expected to cost: `retrained`, as a share of training everything once, and `shards_touched`."""

    retrained: float
    shards_touched: float


def assign(rows: Sequence[Example], shards: int, slices: int, seed: int) -> dict[Part, list[Example]]:
    """All parts, shard by shard, with their rows: each row where the keyed hash of (seed, id) puts it.

    So no row moves when another one is removed. Inside a part, rows stand in the order of that hash. Parts are of
    about one size and can be empty where there are few rows. Raises ValueError for less than one shard or slice, or
    an id given twice.
    """
    _check(shards, slices)
    found: dict[Part, list[Example]] = {(s, r): [] for s in range(shards) for r in range(slices)}
    placed = {str(row["id"]): row for row in rows}
    if len(placed) < len(rows):
        raise ValueError(f"{len(rows) - len(placed)} of {len(rows)} rows have the id of another row")
    # The lowest digits choose the part, the others the place in it: of one number, but independent.
    for number, name in sorted((keyed_hash("shards", seed, name), name) for name in placed):
        found[divmod(number % (shards * slices), slices)].append(placed[name])
    return found


def affected(rows_by_part: Mapping[Part, Sequence[Example]], gone_ids: Collection[object]) -> list[Part]:
    """The parts to retrain without the rows `gone_ids`: of each shard the first slice that has one, and all later ones.

    Every other part never saw the rows, nor an adapter that did. Raises ValueError for an id that no part has.
    """
    gone = {str(name) for name in gone_ids}
    held = {part: {str(row["id"]) for row in rows} & gone for part, rows in rows_by_part.items()}
    unknown = gone.difference(*held.values())
    if unknown:
        raise ValueError(f"{len(unknown)} of {len(gone)} ids are in no part, such as {min(unknown)!r}")
    first: dict[int, int] = {}
    for (shard, place), names in held.items():
        if names:
            first[shard] = min(place, first.get(shard, place))
    return sorted((shard, place) for shard, place in rows_by_part if shard in first and place >= first[shard])


def cost(shards: int, slices: int, requests: int = 1) -> Cost:
    """The expected cost of K = `requests` deletions carried out together, each of one row drawn from equal parts.

    With S shards and R slices, slice r (from 1) is trained again if a request falls on it or on an earlier slice of
    its shard: retrained = (1/R) sum over r of 1 - (1 - r/(SR))^K, for K = 1 (1/S)(R+1)/(2R);
    shards_touched = 1 - (1 - 1/S)^K.
    Raises ValueError for less than one shard or slice, or a negative number of requests.
    """
    _check(shards, slices)
    if requests < 0:
        raise ValueError(f"requests: expected 0 or more, found {requests}")
    reached = [1 - (1 - r / (shards * slices)) ** requests for r in range(1, slices + 1)]
    return Cost(sum(reached) / slices, 1 - (1 - 1 / shards) ** requests)


def _check(shards: int, slices: int) -> None:
    if shards < 1 or slices < 1:
        raise ValueError(f"shards and slices: expected 1 or more, found {shards} and {slices}")
