"""How a diffusion model is trained, beside what every model has: the recipe's section `diffusion`. It imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import Field

from hf_clmul.gradients.options import Section

Decay = Annotated[float, Field(gt=0, lt=1)]


class Diffusion(Section):
    """How images become training samples of a diffusion model."""

    resolution: Annotated[int, Field(ge=1)] | None = Field(
        None, description="pixels of an image each way; what the model was made for, if left out"
    )
    resize: bool = Field(False, description="scale images of another size and cut out their middle")
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="caps the weight of times with little noise (Min-SNR, arXiv 2303.09556: 5)"
    )
    density: Literal["uniform", "logit_normal", "mode"] | None = Field(
        None, description="of the times; the usual one of the architecture, if left out"
    )
    prompt_drop: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the samples to learn or keep that are shown without their prompt"
    )
    ema: Decay | None = Field(
        None,
        description="decay of the moving average of what trains, which a request leaves behind (0.9999); none, if left out",
    )
