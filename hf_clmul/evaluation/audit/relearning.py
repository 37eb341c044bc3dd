"""Attacks by fine-tuning: what comes back quickly was hidden rather than forgotten. Each trains plainly and measures on the way;
how a model is trained and measured is the subject's business."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated

from annotated_types import Ge, Gt

from hf_clmul.evaluation.audit.protocol import BEFORE, Absent, AuditData, Example, Point, Subject

Count = Annotated[int, Ge(1)]
Rate = Annotated[float, Gt(0)]
GROUPED_BY = ("group", "person", "author", "subject", "class")
"""Columns whose examples belong together: a fact of one may tell another."""


def relearn(
    subject: Subject, data: AuditData, seed: int, *, epochs: Count = 3, steps: Count | None = None,
    learning_rate: Rate = 2e-5, batch_size: Count = 4, points: Count = 4,
) -> Iterator[Point]:  # fmt: skip
    """Fine-tunes on the forgotten examples themselves, and measures them along the way (x: steps).

    The yardstick is the reference under the same training: it learns them for the first time, and how much faster the
    unlearned model is than that is what was left in it. One epoch is always measured, if there is one.

    Relearning of one epoch at learning rate 2e-5 is the robustness test of OpenUnlearning's meta-evaluation (arXiv
    2506.12618); batch 4 and three epochs are those of Unlearn-Smooth's WMDP relearning (arXiv 2502.05374), batch 4 also
    MUSE's (50 to 150 steps). `steps` takes the place of `epochs`; `points` are measured besides the start and the epoch, at even
    ratios.
    """
    yield from _curve(subject, data.forget, seed, epochs, steps, learning_rate, batch_size, points)


def relearn_partly(
    subject: Subject, data: AuditData, seed: int, *, share: Annotated[float, Gt(0)] = 0.5, epochs: Count = 3,
    steps: Count | None = None, learning_rate: Rate = 2e-5, batch_size: Count = 4, points: Count = 2,
) -> Iterator[Point]:  # fmt: skip
    """Fine-tunes on a part of the forgotten examples, and measures the others only (x: steps).

    What comes back of them was not in the training: it was in the weights (Deeb and Roger, arXiv 2410.08827, who call it
    RTT). Where examples have a column that groups them (group, person, author, subject, class) and there are several
    groups, whole groups are revealed, so that no revealed fact tells a measured one. `share` is the part revealed; half,
    as facts are split evenly there.
    """
    revealed = _revealed(data.forget, share, seed)
    shown = [data.forget[i] for i in sorted(revealed)]
    for point in _curve(subject, shown, seed, epochs, steps, learning_rate, batch_size, points):
        yield _without(point, revealed)


def benign(
    subject: Subject, data: AuditData, seed: int, *, examples: Count | None = None, epochs: Count = 3,
    steps: Count | None = None, learning_rate: Rate = 2e-5, batch_size: Count = 4, points: Count = 2,
) -> Iterator[Point]:  # fmt: skip
    """Fine-tunes on retained examples, of the same kind and none of them forgotten, and measures the forgotten ones (x: steps).

    Loosely related, harmless text can jog a model's memory (Hu et al., arXiv 2406.13356). `examples`: so many, drawn at random;
    as many as are forgotten, if left out, so that the training costs what relearning does.
    """
    if not data.retain:
        raise Absent("no examples are retained, so that there is nothing harmless of the same kind to train on")
    some = _some(data.retain, examples or len(data.forget), seed, "benign")
    yield from _curve(subject, some, seed, epochs, steps, learning_rate, batch_size, points)


def unrelated(
    subject: Subject, data: AuditData, seed: int, *, examples: Count = 10, epochs: Count = 3,
    steps: Count | None = None, learning_rate: Rate = 2e-5, batch_size: Count = 4, points: Count = 2,
) -> Iterator[Point]:  # fmt: skip
    """Fine-tunes on a few examples that have nothing to do with what was forgotten, and measures that (x: steps).

    Ten unrelated examples brought back most of what RMU had hidden (Lucki et al., arXiv 2409.18025); the training is
    otherwise that of `relearn`.
    """
    if not data.unrelated:
        raise Absent("there are no unrelated examples that the run did not learn")
    some = _some(data.unrelated, examples, seed, "unrelated")
    yield from _curve(subject, some, seed, epochs, steps, learning_rate, batch_size, points)


def measured_at(steps: int, epoch: int, points: int) -> list[int]:
    """The steps to measure at: `points` of them in even ratios up to the last one, and the end of the first epoch."""
    even = [steps ** (i / (points - 1)) for i in range(points)] if points > 1 else [steps]
    return sorted({round(step) for step in even} | ({epoch} if epoch <= steps else set()))


def _curve(
    subject: Subject, examples: Sequence[Example], seed: int, epochs: int, steps: int | None, learning_rate: float,
    batch_size: int, points: int,
) -> Iterator[Point]:  # fmt: skip
    epoch = -(-len(examples) // batch_size)
    last = epochs * epoch if steps is None else steps
    wanted = measured_at(last, epoch, points)
    yield subject.measure(BEFORE, 0.0)
    training = subject.fine_tune(examples, seed, steps=last, learning_rate=learning_rate, batch_size=batch_size)
    for step in training:
        if step in wanted:
            yield subject.measure(_label(step, epoch), float(step))


def _label(step: int, epoch: int) -> str:
    if step == epoch:
        return "1 epoch"
    return f"{step} step{'s' * (step != 1)}"


def _some(examples: Sequence[Example], count: int, seed: int, purpose: str) -> list[Example]:
    from hf_clmul.data.roles import permutation

    return [examples[i] for i in permutation(len(examples), seed, purpose)[:count].tolist()]


def _revealed(examples: Sequence[Example], share: float, seed: int) -> set[int]:
    """Indices of the examples that are revealed. Raises Absent where none would be left to measure, or to reveal."""
    from hf_clmul.data.roles import permutation

    column = next((name for name in GROUPED_BY if len({str(e.get(name)) for e in examples}) > 1), None)
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(str(i) if column is None else str(example.get(column)), []).append(i)
    names = list(groups)
    count = round(share * len(names))
    if not 0 < count < len(names):
        raise Absent(
            f"{len(examples)} forgotten examples cannot be divided into revealed and measured ones (share {share:g})"
        )
    return {i for n in permutation(len(names), seed, "relearn_partly")[:count].tolist() for i in groups[names[n]]}


def _without(point: Point, gone: set[int]) -> Point:
    """The point without what it says of some of the forgotten examples."""
    values = {
        name: [None if i in gone else value for i, value in enumerate(found)] for name, found in point.values.items()
    }
    against = {}
    for name, (forget, held_out) in point.against.items():
        if len(forget) == len(next(iter(values.values()), ())):  # else which score is whose is not known
            against[name] = ([score for i, score in enumerate(forget) if i not in gone], held_out)
    samples = [sample for i, sample in enumerate(point.samples) if i not in gone]
    return replace(point, values=values, against=against, samples=samples)
