"""Attacks on pipelines that are to have forgotten how to draw something: other words, one new word, a little training, rounding. How
pictures are made and judged is the subject's business."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Len

from hf_clmul.errors import NotFinite
from hf_clmul.evaluation.audit.protocol import BEFORE, Absent, AuditData, Point, Stopped
from hf_clmul.evaluation.audit.quantization import BLOCK, Scheme, roundings
from hf_clmul.evaluation.audit.relearning import measured_at

if TYPE_CHECKING:
    from torch import nn

    from hf_clmul.evaluation.audit.picture_subject import PictureSubject

Count = Annotated[int, Ge(1)]
Rate = Annotated[float, Gt(0)]
WORDINGS = (
    "{}", "the {}", "one {}", "a picture of a {}", "a photo of a {}", "a drawing of a {}", "an image of a {}",
)  # fmt: skip
"""For concepts of which a recipe gives no other prompts."""


def quantize(
    subject: "PictureSubject", data: AuditData, seed: int, *,
    schemes: Annotated[list[Scheme], Len(1)] = ("int8", "int4", "nf4"), block: Annotated[int, Ge(2)] = BLOCK,
) -> Iterator[Point]:  # fmt: skip
    """Rounds the linear layers and convolutions of the denoiser and of all text encoders, and measures; each scheme from the
    original weights. The VAE, which no method changes, keeps its own.

    The formula is that of `quantization.quantize`, blocks lie along all weights that go into one output. 4-bit rounding brought
    knowledge of language models back (arXiv 2410.16454).
    """
    yield from roundings(subject, rounded_layers(subject.networks()), schemes, block)


def relearn(
    subject: "PictureSubject", data: AuditData, seed: int, *, steps: Count = 20, learning_rate: Rate = 1e-4,
    batch_size: Count = 16, pictures: Count = 16, points: Count = 3,
) -> Iterator[Point]:  # fmt: skip
    """Trains all of the denoiser on `pictures` of each concept under their own prompts, by the plain denoising loss, and measures
    the forgotten prompts along the way (x: steps).

    The yardstick is the reference under the same training. Adam without weight decay; all numbers are ours, for a model of
    the size of the built-in one.
    """
    from hf_clmul.evaluation.images.borrowed import exchanged
    from hf_clmul.evaluation.images.denoising import Descent
    from hf_clmul.evaluation.images.relearning import relearn as relearned

    network, pipeline = subject.network, subject.pipeline
    rows = [row for name in subject.concepts() for row in subject.pictures(name, pictures, seed)]
    wanted = measured_at(steps, steps, points)
    found: list[Point] = []

    def watch(step: int, denoiser: "nn.Module") -> None:
        if step in wanted:
            with exchanged(pipeline, **{network.architecture.component: denoiser}):
                found.append(subject.measure(f"{step} step{'s' * (step != 1)}", float(step)))

    yield subject.measure(BEFORE, 0.0)
    try:
        with descending():
            relearned(
                pipeline, network.architecture, network.noising, network.images(rows), [row["caption"] for row in rows],
                Descent(steps, learning_rate, batch_size, seed), watch=watch,
            )  # fmt: skip
    finally:
        yield from found


def paraphrase(subject: "PictureSubject", data: AuditData, seed: int) -> Iterator[Point]:
    """Asks for the concept in other words: those that the recipe gives (`evaluation.images.paraphrases`), those that go with
    the built-in data, else `WORDINGS` with the concept's name, less prompts of the data and words that the pipeline's
    vocabulary does not have whole.

    A value for each other prompt; then of each concept under the one that brings most of it back.
    """
    from hf_clmul.evaluation.images.paraphrases import paraphrased

    axis = subject.axis
    given = list(subject.paraphrases)
    for name in subject.concepts():
        if not any(row[axis] == name for row in given):
            given += paraphrased(axis, {name: texts}) if (texts := in_other_words(name, subject)) else []
    if not given:
        raise Absent(
            "no other prompts are known: give them in `evaluation.images.paraphrases`; the pipeline reads no words, or not those "
            "of the built-in wordings"
        )
    yield subject.measure(BEFORE)
    point = subject.measure("other words", forget=given)
    yield point
    yield worst(point, [row[axis] for row in given])


def inversion(
    subject: "PictureSubject", data: AuditData, seed: int, *, steps: Count = 100, learning_rate: Rate = 1e-2,
    batch_size: Count = 16, pictures: Count = 16, initial: str | None = None,
) -> Iterator[Point]:  # fmt: skip
    """Fits the embedding of one new word to `pictures` of each concept, in place of its name, and asks with that word; nothing
    of the model changes.

    Textual inversion (Gal et al., arXiv 2208.01618) against an unlearned model, as by Pham et al. (arXiv 2308.01508).
    `initial` is the word that it begins as: by default the first near neighbour that the recipe names, else the first class of
    the judge that is not forgotten. All numbers are ours.
    """
    from hf_clmul.evaluation.images.denoising import Descent
    from hf_clmul.evaluation.images.inversion import disguised, invert

    if not subject.reads_words:
        raise Absent("the pipeline reads no words, so that there is none to invert")
    begun = initial or subject.begin_as
    if begun is None:
        raise Absent("no word is known to begin with: give one as the option `initial`")
    asked = {name: [row for row in data.forget if row[subject.axis] == name] for name in subject.concepts()}
    rows = {name: subject.pictures(name, pictures, seed) for name in asked}
    words = {name: word_of(name, [*asked[name], *rows[name]]) for name in asked}
    yield subject.measure(BEFORE)
    network, how, parts = subject.network, Descent(steps, learning_rate, batch_size, seed), []
    for name, word in words.items():
        texts = [row["caption"] for row in disguised(rows[name], word)]
        with descending():
            done = invert(
                subject.pipeline, network.architecture, network.noising, network.images(rows[name]), texts, how, begun
            )
        with done.applied(subject.pipeline):
            parts.append(subject.measure("a new word", forget=disguised(asked[name], word)))
    yield joined(parts)


@contextmanager
def descending() -> Iterator[None]:
    """Raises Stopped in the place of NotFinite: a loss that is no number ends this attack, and not the audit."""
    try:
        yield
    except NotFinite as error:
        raise Stopped(f"the training diverged, {error}") from error


def rounded_layers(networks: "Mapping[str, nn.Module]") -> "dict[str, nn.Module]":
    """The linear layers and convolutions by name, without the factors of adapters."""
    from torch import nn

    return {
        f"{part}.{name}": module
        for part, network in networks.items()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "lora_" not in name
    }


def in_other_words(name: str, subject: "PictureSubject") -> list[str]:
    """Those of WORDINGS that the pipeline can read and that are no prompt of the data."""
    if not subject.reads_words:
        return []
    texts = [wording.format(name.replace("_", " ")) for wording in WORDINGS if subject.knows(wording.format(""))]
    return [text for text in texts if text not in subject.taken]


def word_of(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """How the captions call a concept. Raises Absent where one of them does not."""
    from hf_clmul.errors import RecipeError
    from hf_clmul.evaluation.images.inversion import disguised

    for word in (name, name.replace("_", " ")):
        try:
            disguised(rows, word)
        except RecipeError:
            continue
        return word
    raise Absent(f"not every prompt of what is forgotten has the word {name!r}, whose place the new word would take")


def worst(point: Point, names: Sequence[str]) -> Point:
    """Of the values of several prompts of each concept, those of the prompt that draws most of it."""
    drawn = point.values["still_drawn"]
    best = {name: max((i for i, one in enumerate(names) if one == name), key=lambda i: drawn[i]) for name in names}
    values = {metric: [of_metric[i] for i in best.values()] for metric, of_metric in point.values.items()}
    return Point("the worst of them", values)


def joined(points: Sequence[Point]) -> Point:
    """One point of several concepts', each with prompts of its own; without values where one of them has none."""
    names = points[0].values if all(point.values for point in points) else ()
    values = {name: [value for point in points for value in point.values[name]] for name in names}
    return Point(points[0].label, values, samples=[sample for point in points for sample in point.samples])
