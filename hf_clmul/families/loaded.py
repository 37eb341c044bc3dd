"""A language model in memory with what goes with it: what a run asks of it beside training. Knows files and loaders; nothing of
recipes or requests."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_clmul.data.encoding import encode_prompt
from hf_clmul.evaluation.suites import Measuring, Row, measure, score_generated, summary
from hf_clmul.families.text import TextFamily
from hf_clmul.hashes import tensors_sha256
from hf_clmul.models import adapters

if TYPE_CHECKING:
    from hf_clmul.recipe.schema import Adapter


@dataclass
class Loaded:
    """A language model in memory. `base` is the Hub id or folder to load it from again, None for one made from scratch;
    `options` are the arguments of `from_pretrained` for that, less dtype."""

    model: Any
    tokenizer: Any
    base: str | None
    options: dict[str, Any] = field(default_factory=dict)
    adapter_files = (adapters.WEIGHTS, adapters.CONFIG)

    @property
    def revision(self) -> str | None:
        """Of the base, on the Hub."""
        return self.options.get("revision")

    def family(self, max_length: int | None) -> TextFamily:
        """What a trainer asks; it keeps so many tokens of an example."""
        return TextFamily(self.tokenizer, max_length)

    def to(self, device: torch.device) -> Any:
        """Takes it there; returns the model."""
        return self.model.to(device)

    def adapter(self, chosen: "Adapter") -> "Adapter":
        """As the recipe has it."""
        return chosen

    @property
    def about(self) -> dict[str, Any]:
        """What the record says of the model beside its size: nothing."""
        return {}

    @property
    def judged(self) -> dict[str, Any]:
        """What the record says of how answers are judged: nothing."""
        return {}

    def hashes(self, model: Any) -> dict[str, str]:
        """Of the weights of the bare model, and of what encodes its data."""
        return {"weights_sha256": weights_sha256(model), "tokenizer_sha256": tokenizer_sha256(self.tokenizer)}

    def blank(self, model: Any) -> Any:
        """Its like without weights."""
        with torch.device("meta"):
            return type(model)(deepcopy(model.config))

    def arguments(self, model: Any) -> dict[str, Any]:
        """Trainer writes its own `use_cache`, false, into the model's config, and so into what is exported."""
        return {"use_cache": model.config.to_dict().get("use_cache", False)}

    # ---- what is measured ----------------------------------------------------------------------------------------

    def measure(self, model: Any, rows: Sequence[Mapping[str, Any]], how: Measuring, title: str) -> list[Row]:
        """What the model says of each example, complete on every rank."""
        return measure(model, self.tokenizer, {"rows": rows}, how, title)["rows"]

    def score_generated(
        self, base: Any, examples: Sequence[Mapping[str, Any]], rows: list[Row], how: Measuring, title: str
    ) -> None:
        """Adds to measured rows what a base model thinks of their generated answers."""
        score_generated(base, self.tokenizer, examples, rows, how, title)

    def summary(
        self, groups: Mapping[str, Sequence[Row]], first: Mapping[str, Sequence[Row]], samples: int
    ) -> dict[str, Any]:
        """{group: {"examples", "metrics", "samples"}} of groups of measured rows; `first` are those before the first request."""
        return summary(groups, samples)

    # ---- what is exported ----------------------------------------------------------------------------------------

    def probe(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Token ids of what is asked in these examples."""
        return [encode_prompt(row, self.tokenizer) for row in rows]

    @torch.no_grad()
    def outputs(self, model: Any, probe: Sequence[list[int]]) -> torch.Tensor:
        """Logits of each probe text, one after the other, [sum of lengths, V]."""
        device = next(model.parameters()).device
        return torch.cat([model(input_ids=torch.tensor([ids], device=device)).logits[0] for ids in probe])

    def write_adapter(self, model: PeftModel, name: str, folder: Path) -> None:
        adapters.save(model, name, folder, self.base)

    def write_merged(self, model: PeftModel, name: str, folder: Path) -> None:
        """The base with this adapter merged in, as a whole model. The live model stays as it is."""
        adapters.save(model, name, folder, self.base)
        whole = self.load_back(folder, model, whole=False).merge_and_unload()
        for file in self.adapter_files:
            (folder / file).unlink()
        whole.save_pretrained(folder)

    def write_whole(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def write_rest(self, folder: Path) -> None:
        """What a model needs beside its weights."""
        self.tokenizer.save_pretrained(folder)

    def load_back(self, folder: Path, like: Any, whole: bool) -> Any:
        """As a user would, where `like` is and in its precision: nothing of this package takes part."""
        first = next(like.parameters())
        if not whole:
            base = AutoModelForCausalLM.from_pretrained(self.base, dtype=first.dtype, **self.options)
            return PeftModel.from_pretrained(base, folder).eval().to(first.device)
        options = {name: value for name, value in self.options.items() if name != "revision"}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=first.dtype, **options).eval().to(first.device)


def weights_sha256(model: torch.nn.Module) -> str:
    """Hash over the names, shapes, types and bytes of all weights, sorted by name."""
    return tensors_sha256(model.state_dict())


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash over the vocabulary and the chat template."""
    known = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    return sha256(repr(known).encode()).hexdigest()
