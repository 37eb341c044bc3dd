"""A number for an example that anyone with the seed can work out again, and that nothing else has a say in: not the
order of rows, not the number of ranks, not what happened before. It knows ids and seeds, and no rows."""

from hashlib import blake2b


def keyed_hash(purpose: str, seed: int, name: object) -> int:
    """A 128-bit number, uniform over names for each (purpose, seed).

    Two uses of one seed give different `purpose`s: otherwise what the one chooses would say what the other does.
    """
    return int.from_bytes(blake2b(str(name).encode(), key=f"{purpose}/{seed}".encode(), digest_size=16).digest(), "big")
