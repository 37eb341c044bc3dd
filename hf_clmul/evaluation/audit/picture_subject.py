"""A diffusion pipeline under attack: what it still draws of what is to be forgotten, by the judge of its run. It knows pictures and
classifiers; nothing of attacks, references or records."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn, stack

from hf_clmul.errors import NotFinite
from hf_clmul.evaluation.audit.protocol import BEFORE, AuditData, Example, Point
from hf_clmul.evaluation.images.concepts import Classifier, Sampling, see
from hf_clmul.evaluation.images.denoising import Architecture, Noising
from hf_clmul.evaluation.images.prompts import told

Rows = Sequence[Mapping[str, Any]]
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Network:
    """How pictures become noisy samples of the pipeline's denoiser; `pixels` reads a row's picture, [3, H, W] in [-1, 1]."""

    architecture: Architecture
    noising: Noising
    pixels: Callable[[Mapping[str, Any]], Tensor]

    def images(self, rows: Rows) -> Tensor:
        """[N, 3, H, W]"""
        return stack([self.pixels(row) for row in rows])


@dataclass
class PictureSubject:
    """`data.forget` are the prompts of what is to be forgotten, each with its value on the `axis` of the judge.

    `pictures(concept, count, seed)` are rows with its pictures. `paraphrases` are known other prompts, `taken` all prompts of the
    data, `begin_as` a word for something near. `samples` prompts are kept of each point, and what is seen of them.
    """

    pipeline: Any
    data: AuditData
    classifier: Classifier
    axis: str
    sampling: Sampling
    network: Network
    pictures: Callable[[str, int, int], Rows]
    paraphrases: Rows = ()
    taken: frozenset[str] = field(default_factory=frozenset)
    begin_as: str | None = None
    samples: int = 3

    @property
    def model(self) -> nn.Module:
        return getattr(self.pipeline, self.network.architecture.component)

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.components.get("tokenizer")

    @property
    def reads_words(self) -> bool:
        return self.tokenizer is not None

    def knows(self, text: str) -> bool:
        """Whether each word of a text is one token to the pipeline."""
        return all(len(self.tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in text.split())

    def concepts(self) -> list[str]:
        """What is to be forgotten, each once, in the order of the prompts."""
        return list(dict.fromkeys(row[self.axis] for row in self.data.forget))

    def networks(self) -> dict[str, nn.Module]:
        """The denoiser and the text encoders."""
        names = (self.network.architecture.component, *ENCODERS)
        found = {name: self.pipeline.components.get(name) for name in names}
        return {name: network for name, network in found.items() if network is not None}

    def measure(self, label: str, x: float | None = None, forget: Sequence[Example] | None = None) -> Point:
        """`unlearning_accuracy` of each prompt, the share of its pictures in which what is to be forgotten is not seen, and
        `still_drawn`, the share in which it is. With `forget`, of these prompts. In a sample the "answer" is the own prompt
        that another one stands for, or else the concept.

        A model that an attack destroyed gives a point without values. Raises NotFinite of the untouched one: its precision is
        too low for any attack."""
        prompts, own = self.data.forget if forget is None else forget, {row["id"] for row in self.data.forget}
        try:
            seen = see(self.pipeline, self._conditioned(prompts), self.classifier, self.sampling, label).samples
        except NotFinite:
            if label == BEFORE:
                raise
            return Point(label, {}, x)
        each, values, samples = len(self.sampling.seeds), {"unlearning_accuracy": [], "still_drawn": []}, []
        for i, prompt in enumerate(prompts):
            predicted = [one["predicted"] for one in seen[i * each : (i + 1) * each]]
            share = sum(one[self.axis] == prompt[self.axis] for one in predicted) / each
            values["unlearning_accuracy"].append(1 - share)
            values["still_drawn"].append(share)
            meant = str(prompt["id"] if prompt["id"] in own else prompt[self.axis])
            samples.append(
                {"question": prompt["caption"], "answer": meant, "generated": told({"predicted": predicted})}
            )
        return Point(label, values, x, samples=samples[: self.samples])

    def _conditioned(self, prompts: Sequence[Example]) -> Rows:
        """Pipelines of classes take their numbers."""
        if self.reads_words:
            return prompts
        encode = self.network.architecture.encode_prompts
        numbers = encode(self.pipeline, [row["caption"] for row in prompts])["class_labels"].tolist()
        return [{**row, "class_label": number} for row, number in zip(prompts, numbers, strict=True)]
