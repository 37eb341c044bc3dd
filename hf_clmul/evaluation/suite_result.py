"""What a suite found, and what it could not: a metric without data is absent with a reason, and never a number. Also which
examples a run and its reference have in common."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from hf_clmul.evaluation.estimates import Estimate
from hf_clmul.evaluation.metrics import Row

Tables = Mapping[str, Sequence[Row]]
"""{group: rows}"""

NO_REFERENCE = "no reference: no model that was trained without the forgotten data was measured"


class Missing(Exception):
    """A metric has no value here. The message is the reason, for the reader of a record."""


@dataclass(frozen=True)
class SuiteResult:
    """{metric: estimate}, and {metric: reason} of the metrics that have none."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, compute: Callable[[], Estimate]) -> None:
        """The metric, or why it is Missing."""
        try:
            self.metrics[name] = compute()
        except Missing as reason:
            self.absent[name] = str(reason)


def rows_of(tables: Tables, group: str) -> Sequence[Row]:
    """The group's rows. Raises Missing if there are none."""
    if not tables.get(group):
        raise Missing(f"no examples of the group {group} were measured")
    return tables[group]


def common(tables: Tables, reference: Tables | None, groups: Sequence[str]) -> tuple[dict, dict]:
    """Both tables with those examples of the groups that both have, in the same order: row i is of the same example.

    Examples are the same if question and answer are, as ids carry names of data sections, which two recipes may choose
    differently; the n-th of equal ones goes with the n-th. Raises Missing without a reference, or where a group has none
    in common.
    """
    if reference is None:
        raise Missing(NO_REFERENCE)
    own: dict[str, list[Row]] = {}
    other: dict[str, list[Row]] = {}
    for group in groups:
        waiting = defaultdict(list)
        for row in rows_of(reference, group) if reference.get(group) else ():
            waiting[row["question"], row["answer"]].append(row)
        pairs = [
            (row, waiting[key].pop(0))
            for row in rows_of(tables, group)
            if waiting[key := (row["question"], row["answer"])]
        ]
        if not pairs:
            raise Missing(f"the reference was measured on none of the examples of the group {group}")
        own[group], other[group] = ([pair[side] for pair in pairs] for side in range(2))
    return own, other
