"""What is measured. The table of suites, whose functions are in `suite_table`; importing it does not import torch."""

SUITES: dict[str, str] = {
    "basic": "answer and paraphrase probability, ROUGE-L recall, truth ratio, extraction strength, exact memorization, fluency",
    "tofu": "TOFU and OpenUnlearning: the truth ratio's three aggregates, normalised probability, model utility, forget quality",
    "concepts": "what a classifier sees in a diffusion model's pictures: UA, IRA near and far, CRA, Frechet distance",
}
