"""What descends from what: the artefacts of a run as a graph, and the closure of a deletion in it. It knows names and
parents; what an artefact holds, and how it is made anew, is its maker's business."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

KINDS = ("data", "memory", "teacher", "adapter", "merge", "export", "cache")


@dataclass(frozen=True)
class Node:
    """An artefact, and those that it was made from. `kind` is one of KINDS."""

    name: str
    kind: str
    parents: tuple[str, ...] = ()


class Lineage:
    """The artefacts of a run. Raises ValueError for a name given twice, an unknown kind or parent, or a cycle."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: dict[str, Node] = {}
        for node in nodes:
            if node.name in self.nodes:
                raise ValueError(f"two artefacts are called {node.name!r}")
            if node.kind not in KINDS:
                raise ValueError(f"artefact {node.name!r}: expected a kind of {', '.join(KINDS)}, found {node.kind!r}")
            self.nodes[node.name] = node
        for node in self.nodes.values():
            self._known(node.parents, f"artefact {node.name!r} descends from")
        try:
            # Of several possible orders the one in which the nodes were given: a plan reads the same every time.
            self._order = tuple(TopologicalSorter({n.name: n.parents for n in self.nodes.values()}).static_order())
        except CycleError as error:
            raise ValueError(f"artefacts descend from themselves: {' -> '.join(error.args[1])}") from None

    def closure(self, names: Iterable[str]) -> list[Node]:
        """Everything that descends from the named artefacts, without them, parents before their children.

        Empty where nothing was made from them. Raises ValueError for an unknown name.
        """
        named = set(names)
        self._known(sorted(named), "there is no artefact called")
        reached = set(named)
        for name in self._order:
            if not reached.isdisjoint(self.nodes[name].parents):
                reached.add(name)
        return [self.nodes[name] for name in self._order if name in reached - named]

    def _known(self, names: Sequence[str], what: str) -> None:
        unknown = [name for name in names if name not in self.nodes]
        if unknown:
            raise ValueError(f"{what} {unknown[0]!r}; there are: {', '.join(sorted(self.nodes)) or 'none'}")
