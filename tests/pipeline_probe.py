"""Whether two pipelines are the same: by what the denoiser puts out, and by all weights."""

from typing import Any

import torch
from torch import Tensor, nn

from hf_clmul.hashes import tensors_sha256
from hf_clmul.models.diffusion.architectures import architecture_of
from hf_clmul.models.diffusion.encoding import image_size, latent_shape
from hf_clmul.models.diffusion.noising import noising_of


@torch.no_grad()
def probe(pipeline: Any) -> Tensor:
    """The denoiser's raw output [1, C, h, w], float32, for a fixed noisy sample, time and prompt."""
    architecture = architecture_of(pipeline)
    model: nn.Module = getattr(pipeline, architecture.component)
    shape = (1, *latent_shape(pipeline, architecture, image_size(pipeline, architecture)))
    noisy = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    given = architecture.encode_prompts(pipeline, ["a photograph" if "tokenizer" in architecture.needs else "0"])
    times = noising_of(pipeline.scheduler).times(torch.tensor([0.5]))
    modes = [(module, module.training) for module in model.modules()]
    try:
        return architecture.call(model.eval(), noisy, times, given).float()
    finally:
        for module, mode in modes:
            module.training = mode


def pipeline_sha256(pipeline: Any) -> str:
    """Hash over all weights of all components, adapters among them."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return tensors_sha256(
        {f"{name}.{k}": value for name, part in parts.items() for k, value in part.state_dict().items()}
    )
