"""The family of causal language models, made from a tokenizer. How such a model is called is `models.causal_lm`; here is only
what the trainer asks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import Encoded
from hf_clmul.data.roles import RoleDataset
from hf_clmul.data.sources import encode_dataset
from hf_clmul.models import causal_lm
from hf_clmul.models.teachers import random_like, uniform
from hf_clmul.objectives.active import ActiveTerm
from hf_clmul.objectives.prediction import Prediction
from hf_clmul.training.role_data import encoded_roles, pad_token_id


@dataclass
class TextFamily:
    """Examples are cut to `max_length` tokens; `accepted` are the inputs that the bound model takes."""

    processor: Any
    max_length: int | None = None
    accepted: frozenset[str] = frozenset()
    name = "causal_lm"
    own_files = False

    def check(self, model: nn.Module) -> None:
        pad_token_id(self.processor)

    def bind(self, model: nn.Module, checkpointing: bool = False, mixed: Any = None) -> None:
        self.accepted = causal_lm.accepted_inputs(model)
        if checkpointing and isinstance(model, PeftModel):
            model.enable_input_require_grads()  # else the checkpointed blocks see no input that needs a gradient

    def pattern(self, trainable: str | None) -> str | None:
        return trainable

    def encoded(self, data: Any, what: str) -> list[Encoded]:
        return encode_dataset(data, self.processor, self.max_length, what)

    def roles(self, data: Mapping[str, Any], terms: Mapping[str, Sequence[ActiveTerm]], seed: int) -> RoleDataset:
        found = {role: self.encoded(data[role], role) for role in terms}
        return encoded_roles(found, terms, self.processor, seed, self.max_length)

    def collator(self) -> RoleCollator:
        return RoleCollator(pad_token_id(self.processor))

    def predict(
        self, model: nn.Module, batch: Mapping[str, Any], needs: frozenset[str], layers: Collection[float] = ()
    ) -> Prediction:
        return causal_lm.predict(model, batch, needs, self.accepted, layers)

    def likelihood(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """Nats, of all answers of the batch."""
        return self.predict(model, batch, frozenset({"logps"})).logps.sum()

    def knows_nothing(self, student: Prediction) -> Prediction:
        return uniform(student)

    def random_like(self, model: nn.Module, seed: int) -> nn.Module:
        return random_like(model, seed)

    def readers(self, model: nn.Module) -> dict[str, nn.Parameter]:
        raise ValueError("protect is for diffusion models, whose cross-attention reads prompts: leave it out.")

    def edited(self, model: nn.Module, active: ActiveTerm, data: RoleDataset) -> dict[str, Tensor]:
        raise RuntimeError("no edit of language models reads prompts: the term breaks its contract.")

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        return None

    def save(self, model: nn.Module, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: nn.Module, folder: Path) -> None:
        saved = AutoModelForCausalLM.from_pretrained(folder, dtype=next(model.parameters()).dtype)
        model.load_state_dict(saved.state_dict())

    def label(self, card: Path) -> None:
        """Trainer's own says what there is to say."""
