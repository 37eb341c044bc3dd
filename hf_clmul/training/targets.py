"""What the terms of a role are measured against on a batch: which teachers a request has, and what they say. It knows terms'
needs and teachers by their contracts; no loss."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_clmul.models import stored
from hf_clmul.models.ema import Ema
from hf_clmul.models.teacher_options import teacher_choice
from hf_clmul.models.teachers import REINFORCED, BeforeRequest, Teacher
from hf_clmul.objectives.active import ActiveTerm, layers, needs
from hf_clmul.objectives.prediction import Prediction
from hf_clmul.objectives.preparation import WITHOUT_A_MODEL

if TYPE_CHECKING:
    from hf_clmul.trainer import ClmulTrainer

Batch = dict[str, Any]
OWN = frozenset({"logits", "output"})
"""What other models than the student and its teacher say."""


def new_teacher(trainer: "ClmulTrainer", model: nn.Module) -> Teacher | None:
    """The teacher that `args.teacher` names, from the live weights. The moving average goes on where no term asks for it."""
    _, average = teacher_choice(trainer.args.teacher)
    if average is not None:
        return Ema(model, average, trainer.args.seed, trainer.teacher_state)
    asked = any("teacher" in active.term.needs for terms in trainer.terms.values() for active in terms)
    return BeforeRequest(model) if asked else None


def of_teacher(trainer: "ClmulTrainer", terms: list[ActiveTerm], batch: Batch) -> Prediction | None:
    """What the teacher says, and the reinforced model where a term asks for it."""
    asked = needs(terms, of_teacher=True)
    if not asked:
        return None
    with trainer.teacher.answering() as teacher, trainer.accelerator.autocast():
        said = trainer.family.predict(teacher, batch, asked, layers(terms, of_teacher=True))
    if not any("reinforced" in active.term.needs for active in terms):
        return said
    with trainer.reinforced.answering() as reinforced, trainer.accelerator.autocast():
        after = trainer.family.predict(reinforced, batch, needs(terms) & OWN)
    return replace(said, variants={**(said.variants or {}), REINFORCED: after})


def said_of(
    trainer: "ClmulTrainer", active: ActiveTerm, student: Prediction, batch: Batch, said: Prediction | None
) -> Prediction | None:
    """What a term is measured against: what nobody's teacher says, what was stored, or else what the teacher `said`."""
    if "incompetent" in active.term.needs:
        return of_nobody(trainer, active, student, batch)
    return stored.said(batch) if "stored" in active.term.needs else said


def of_nobody(trainer: "ClmulTrainer", active: ActiveTerm, student: Prediction, batch: Batch) -> Prediction:
    """What the incompetent teacher says to a term that asks for it."""
    if active.preparation.weights == WITHOUT_A_MODEL[active.term.family]:
        return trainer.family.knows_nothing(student)
    with trainer.incompetent.answering() as model, trainer.accelerator.autocast():
        return trainer.family.predict(model, batch, active.term.needs & OWN)
