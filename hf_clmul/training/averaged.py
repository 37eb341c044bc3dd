"""The moving average of the weights that train, which a request leaves behind in place of the live ones: what diffusers' scripts
call `--use_ema`. It knows parameters by name; nothing of terms, roles or requests."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.distributed.fsdp import FSDPModule

from hf_clmul.errors import RunError
from hf_clmul.objectives.active import ActiveTerm
from hf_clmul.paths import atomic_write

if TYPE_CHECKING:
    from hf_clmul.training_args import ClmulConfig

FILE = "averaged.safetensors"


def check_average(
    args: "ClmulConfig", model: nn.Module, family: str, terms: Mapping[str, Sequence[ActiveTerm]]
) -> None:
    """Raises ValueError where `ema` is asked for and means nothing, or cannot be kept."""
    if args.ema is None:
        return
    if family != "diffusion":
        raise ValueError(
            f"ema={args.ema} is for diffusion models: leave it out. Of language models, see teacher='ema'."
        )
    edit = next((active.name for active in terms.get("forget", ()) if active.term.edit), None)
    if edit is not None:
        raise ValueError(f"forget/{edit} is an edit, which takes no step, so that ema cannot act: leave it out.")
    if args.load_best_model_at_end and args.save_only_model:
        raise ValueError(
            "save_only_model keeps no average in checkpoints, of which ema would need the best one's: leave it out, or "
            "load_best_model_at_end."
        )
    sharded = bool(args.fsdp) or any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or args.deepspeed is not None:
        raise ValueError("ema keeps whole parameters, and FSDP and DeepSpeed leave each rank a part: use DDP.")


class Averaged:
    """diffusers' `EMAModel` over what trains: its decay grows with the steps as (1 + n) / (10 + n), up to `decay`. None averages
    nothing. Kept in float32 at least: most of a ten-thousandth of a difference is lost in less."""

    def __init__(self, decay: float | None) -> None:
        self.decay = decay
        self.release()

    def start(self, model: nn.Module) -> None:
        """From the weights as they are now, of what trains now."""
        if self.decay is None:
            return
        from diffusers.training_utils import EMAModel

        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wide = (p.detach().to(torch.promote_types(p.dtype, torch.float32)) for p in self.parameters.values())
        self.ema = EMAModel(wide, decay=self.decay)

    def follow(self) -> None:
        """After an optimizer step."""
        if self.ema is not None:
            self.ema.step(self.parameters.values())

    def put(self) -> None:
        """The average in place of the live weights."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters.values())

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it the model has the average; afterwards the live weights, to the bit."""
        if self.ema is None:
            yield
            return
        live = [p.detach().clone() for p in self.parameters.values()]
        self.put()
        try:
            yield
        finally:
            for p, value in zip(self.parameters.values(), live, strict=True):
                p.data.copy_(value)

    def save(self, folder: Path) -> None:
        if self.ema is not None:
            named = zip(self.parameters, self.ema.shadow_params, strict=True)
            values = {name: value.contiguous() for name, value in named}
            atomic_write(Path(folder) / FILE, save(values, metadata={"steps": str(self.ema.optimization_step)}))

    def load(self, folder: Path) -> None:
        """Raises RunError where the checkpoint has no average of these parameters."""
        if self.ema is None:
            return
        path = Path(folder) / FILE
        if not path.is_file():
            raise RunError(
                f"{folder} has no {FILE}: it was made without ema. Leave ema out, or start the request anew."
            )
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            steps = int(file.metadata()["steps"])
        kept = dict(zip(self.parameters, self.ema.shadow_params, strict=True))
        if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in kept.items()}:
            raise RunError(
                f"{path} is an average of other parameters: resume with the model and `trainable` that the request began "
                "with, or start it anew."
            )
        self.ema.optimization_step = steps
        for name, value in kept.items():
            value.copy_(found[name])

    def release(self) -> None:
        """Forgets the average."""
        self.ema, self.parameters = None, {}


def put_saved(model: nn.Module, folder: Path) -> None:
    """The average that a checkpoint has, where it has one, in place of the live weights that were read from it."""
    path = Path(folder) / FILE
    if not path.is_file():
        return
    parameters = dict(model.named_parameters())
    with safe_open(path, "pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118
            parameters[name].copy_(file.get_tensor(name))
