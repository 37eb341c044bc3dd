"""What counts as a quotation of an erased example: its texts whole, or so many words of one in a row. Pure functions of texts;
which examples are erased, and where texts lie, others know."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

SHORTEST = 16  # characters: a shorter text, such as a label, is no quotation by itself
PIECE = 10  # words in a row: evaluation cuts passages, and a model's answer quotes parts of one

Texts = tuple[str, ...]


@dataclass(frozen=True)
class Needles:
    """What to search for: {hash of an erased example: alternatives}, of which a file holds all texts of one; and {piece: hash of
    the erased example that it is from}."""

    ways: dict[str, list[Texts]] = field(default_factory=dict)
    pieces: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: "Needles") -> "Needles":
        return Needles(self.ways | other.ways, self.pieces | other.pieces)

    def __bool__(self) -> bool:
        return bool(self.ways or self.pieces)


def quoted(needles: Needles, text: str) -> set[str]:
    """Hashes of the erased examples that a text quotes."""
    shown = plain(text)
    words = set(re.findall(r"\w+", shown))

    def holds(needle: str) -> bool:  # looking up words first spares most searches
        return words.issuperset(re.findall(r"\w+", needle)) and needle in shown

    found = {hashed for hashed, ways in needles.ways.items() if any(all(map(holds, way)) for way in ways)}
    return found | {needles.pieces[piece] for piece in pieces(shown) if piece in needles.pieces}


def pieces(text: str) -> Iterator[str]:
    """Every `PIECE` words in a row."""
    words = re.findall(r"\w+", text)
    return (" ".join(words[i : i + PIECE]) for i in range(len(words) - PIECE + 1))


def pieces_of(erased: dict[Texts, str], kept: Iterable[Texts], others: Iterable[Texts]) -> dict[str, str]:
    """{piece: hash} of erased texts that is in no kept one, nor in another text that is no cut of an erased one itself."""
    found = {piece: hashed for texts, hashed in erased.items() for text in texts for piece in pieces(text)}
    if not found:
        return {}
    for text in (text for texts in kept for text in texts):
        for piece in pieces(text):
            found.pop(piece, None)
    wholes = "\n".join(plain(text) for texts in erased for text in texts)  # plain texts have no line breaks
    for text in (text for texts in others for text in texts):
        shared = found.keys() & pieces(text)
        if shared and plain(text) not in wholes:  # the few that share words: a search for each of all takes minutes
            for piece in shared:
                del found[piece]
    return found


def plain(text: str) -> str:
    return " ".join(text.split())
