"""What is measured. The table of suites, whose functions are in `suite_table`; importing it does not import torch."""

SUITES: dict[str, str] = {
    "basic": "answer and paraphrase probability, ROUGE-L recall, truth ratio, extraction strength, exact memorization, fluency",
    "tofu": "TOFU and OpenUnlearning: the truth ratio's three aggregates, normalised probability, model utility, forget quality",
    "mia": "membership inference: AUC of six attacks, forgotten against held-out examples, and the distance to the reference's",
    "continual": "what the requests did to each task: the metrics of the matrix R, such as backward transfer and relapse",
    "muse": "MUSE: verbatim and knowledge memorization, utility, PrivLeak; by `hf-clmul evaluate` alone",
    "lm_eval": "tasks of lm-evaluation-harness, such as MMLU and WMDP; by `hf-clmul evaluate` alone",
    "concepts": "what a classifier sees in a diffusion model's pictures: UA, IRA near and far, CRA, Frechet distance",
}
EVALUATE_ONLY: dict[str, str] = {
    "muse": "generates answers of its own lengths, which no stage of a run has",
    "lm_eval": "runs tasks of lm-evaluation-harness, for minutes to hours",
}
"""Suites that no recipe may name, and why: they are measured of a finished run, `hf-clmul evaluate RUN --suites NAME`."""
IN_RECIPES = tuple(name for name in SUITES if name not in EVALUATE_ONLY)
OF_NO_GROUP = ("mia", "continual", *EVALUATE_ONLY)
"""Suites that add nothing to the figures of a group: they read the same rows as the others."""
