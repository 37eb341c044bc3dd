"""What terms need made from the live model before it is trained: for now, alternatives that it writes itself. It is the last
to see the weights as they were before the request; it takes no step."""

from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from hf_clmul.models.alternatives import encoded_alternatives, own_alternatives
from hf_clmul.objectives.active import ActiveTerm

if TYPE_CHECKING:
    from hf_clmul.trainer import ClmulTrainer


def prepare(trainer: "ClmulTrainer") -> None:
    """Makes it, on every rank alike."""
    for role, terms in trainer.terms.items():
        for active in terms:
            if "generated" in active.term.needs:
                _write_alternatives(trainer, role, active)


def _write_alternatives(trainer: "ClmulTrainer", role: str, active: ActiveTerm) -> None:
    """The main process writes them, or finds them in its cache; the others are told."""
    data, tokenizer = trainer.train_dataset, trainer.processing_class
    texts = [None]
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        texts = [own_alternatives(model, tokenizer, data.roles[role], active.preparation.alternatives, data.seed)]
    (found,) = broadcast_object_list(texts)
    data.own_alternatives[role] = encoded_alternatives(found, data.roles[role], tokenizer, trainer.args.max_length)
