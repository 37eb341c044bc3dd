"""What an attack is handed and what it hands back. An attack is a pure protocol: a model, data, parameters and a seed in;
measured points out. The same is done to the reference, and nothing here knows which of the two it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Example = Mapping[str, Any]
Row = Mapping[str, Any]

GROUPS = ("forget", "retain", "held_out", "unrelated")
SAMPLE = ("question", "answer", "generated")
BEFORE = "before"
"""The label of the untouched model."""


@dataclass(frozen=True)
class AuditData:
    """What attacks work with: the forgotten examples, others that were learned, examples that were never trained on, and examples
    that have nothing to do with either. Any but the first may be empty: an attack that needs it says so by `Absent`."""

    forget: Sequence[Example]
    retain: Sequence[Example] = ()
    held_out: Sequence[Example] = ()
    unrelated: Sequence[Example] = ()


@dataclass(frozen=True)
class Point:
    """One measurement of an attacked model, at `x` of the attack's own scale (steps, bits, samples, layers), or only at a `label`.

    values   {metric: a value for each forget example, in order; None where it has none}: their mean is the metric
    against  {metric: (scores of the forget examples, scores of the held-out ones)}: the metric is the AUC, 0.5 where the two cannot
             be told apart, 1 where the forget examples look like members
    samples  some texts {question, answer, generated}, the keys of SAMPLE; of language models with their "id", by which a scan knows
             an example that is asked in other words
    """

    label: str
    values: Mapping[str, Sequence[float | None]]
    x: float | None = None
    against: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()


class Absent(Exception):
    """An attack cannot be tried on this model or data. Its message is the reason, which the record keeps."""


class Stopped(Exception):
    """An attack cannot go on. What it measured until then stands; its message is the reason, which the record keeps."""


class Subject(Protocol):
    """A model under attack, loaded as a user loads it. An attack may change `model` as it likes: each attack gets a fresh one."""

    model: Any
    tokenizer: Any

    def measure(self, label: str, x: float | None = None, forget: Sequence[Example] | None = None) -> Point:
        """The point with the usual metrics of the forgotten examples: answer_probability, rouge_l_recall,
        extraction_strength, exact_memorization, and of both groups min_k_auc. With `forget` the questions are asked as
        given there (one for each example, in order) and min_k_auc is left out."""

    def fine_tune(
        self, examples: Sequence[Example], seed: int, *, steps: int, learning_rate: float, batch_size: int
    ) -> Iterator[int]:
        """Trains the model plainly on the examples, and yields the number of steps done after each."""


Attack = Callable[..., Iterator[Point]]
"""(subject, data, seed, **parameters) -> points, the first of them often the untouched model."""


@dataclass(frozen=True)
class AttackEntry:
    """One named attack. `changes` says what it touches: the weights, the question, or nothing (it only looks inside). `both` makes
    one more point of the run from the points of the run and of its reference."""

    function: Attack
    changes: Literal["weights", "question", "nothing"]
    family: Literal["causal_lm", "diffusion"]
    paper: str
    summary: str
    both: Callable[[Sequence[Point], Sequence[Point]], Point] | None = None
