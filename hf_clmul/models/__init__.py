"""The families (kinds of model) and the teachers that a recipe can name, each with one line on what it is. Importing it does
not import torch."""

FAMILIES = {
    "causal_lm": "language models: AutoModelForCausalLM",
    "diffusion": "diffusion models: a DiffusionPipeline of diffusers",
}
TEACHERS = {
    "before_request": "the model as it was when the request began",
    "ema": "a moving average of the student over all requests (UniCLUN's continual teacher)",
}

TEXT_ENCODER = "text_encoder"
"""As `trainable`: that part of a diffusion pipeline trains in the denoiser's place."""
