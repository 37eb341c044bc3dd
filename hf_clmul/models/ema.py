"""The continual teacher: a moving average of the student over the whole stream of requests, saved with checkpoints and handed
from one request to the next. It knows parameters by name; nothing of terms or requests."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hf_clmul.data.roles import derived_seed
from hf_clmul.errors import RunError
from hf_clmul.models.teacher_options import Average
from hf_clmul.models.teachers import Teacher
from hf_clmul.paths import atomic_write

FILE = "ema.safetensors"


@dataclass(frozen=True)
class EmaState:
    """The average between two requests: `values` {parameter: tensor on the CPU, in float32 or wider}, and `k`, the optimizer
    steps of all requests so far."""

    values: dict[str, Tensor] = field(default_factory=dict)
    k: int = 0

    def save(self, folder: Path) -> None:
        """Writes one file, the same bytes for the same state."""
        values = {name: value.contiguous() for name, value in self.values.items()}
        atomic_write(Path(folder) / FILE, save(values, metadata={"k": str(self.k)}))

    @classmethod
    def load(cls, folder: Path) -> "EmaState":
        """Reads what `save` wrote. Raises RunError where there is none."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise RunError(f"{folder} has no {FILE}: it was made without teacher='ema'. Start the request anew.")
        with safe_open(path, "pt") as file:
            return cls({name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["k"]))  # noqa: SIM118


class Ema(Teacher):
    """T <- m T + (1 - m) S after an optimizer step, with a probability; m = min(1 - 1/(k + 1), momentum), k the optimizer steps of
    the whole stream up to and with this one.

    UniCLUN (arXiv 2408.11374), after OCD-Net (IJCAI 2022), as the authors' code has it. T holds what trains, which begins as a
    copy of the student's, and what trained in earlier requests and is frozen now, which stays as it is in T; all else is the
    student's. Whether a step counts is a pure function of (seed, step), so that ranks and resumes agree. T is kept in float32 at
    least: a thousandth of a difference is lost in less.
    """

    def __init__(self, model: nn.Module, wanted: Average, seed: int, state: EmaState | None = None) -> None:
        """Raises ValueError if the state has a value of another shape. Values of parameters that are gone are left out."""
        super().__init__(model)
        self.wanted, self.seed = wanted, seed
        before, self.k = ({}, 0) if state is None else (state.values, state.k)
        for name, parameter in model.named_parameters():
            if name in before:
                if before[name].shape != parameter.shape:
                    raise ValueError(
                        f"teacher_state has {name} of shape {[*before[name].shape]}, and the model's is {[*parameter.shape]}: "
                        "it is of another model. Give the state that goes with this one, or none to begin anew."
                    )
                value = before[name].to(parameter.device)
            elif parameter.requires_grad:
                value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            else:
                continue
            self.kept[name] = (parameter, value.clone())
        self.followed = {name for name, (parameter, _) in self.kept.items() if parameter.requires_grad}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After optimizer step `step` of the request, counted from 1."""
        self.k += 1
        if derived_seed(self.seed, "ema", step) >= self.wanted.probability * 2**32:
            return
        new = 1 - min(1 - 1 / (self.k + 1), self.wanted.momentum)
        for name in self.followed:
            parameter, value = self.kept[name]
            value.lerp_(parameter.detach().to(value.dtype), new)  # leaves equal values alone, to the bit

    def state(self) -> EmaState:
        return EmaState({name: value.detach().cpu().clone() for name, (_, value) in self.kept.items()}, self.k)

    def save(self, folder: Path) -> None:
        self.state().save(folder)

    def load(self, folder: Path) -> None:
        """Raises RunError where the checkpoint has none, or one of other parameters."""
        found = EmaState.load(folder)
        shapes = [{n: v.shape for n, v in values.items()} for values in (found.values, self.state().values)]
        if shapes[0] != shapes[1]:
            raise RunError(
                f"{Path(folder) / FILE} is an average of other parameters: resume with the model, `trainable` and teacher_state "
                "that the request began with, or start it anew."
            )
        self.k = found.k
        for name, (_, value) in self.kept.items():
            value.copy_(found.values[name])
