"""A finished run folder of a diffusion model made of invented numbers and plain colours. It knows no model."""

import base64
import copy
import io
import json
from pathlib import Path
from typing import Any

from fake_results import fake_results, write_fake_run

METRICS = {
    "base": {
        "forget": {"prompt_accuracy": 0.96, "digit_accuracy": 0.97, "unlearning_accuracy": 0.03, "frechet_distance": 0.0},
        "retain": {"prompt_accuracy": 0.95, "digit_accuracy": 0.96, "near_retain_accuracy": 0.94, "far_retain_accuracy": 0.97,
                   "cross_retain_accuracy": 0.99, "frechet_distance": 0.0},
    },
    "00-unlearn-seven": {
        "forget": {"prompt_accuracy": 0.01, "digit_accuracy": 0.01, "unlearning_accuracy": 0.99, "frechet_distance": 6.5},
        "retain": {"prompt_accuracy": 0.94, "digit_accuracy": 0.95, "near_retain_accuracy": 0.92, "far_retain_accuracy": 0.98,
                   "cross_retain_accuracy": 0.99, "frechet_distance": 0.25},
    },
}  # fmt: skip
PROMPTS = {"forget": ["a red seven", "a blue seven"], "retain": [f"a red {n}" for n in ("one", "two", "three", "four")]}
SEEN = {"base": "8 x seven red", "00-unlearn-seven": "7 x one red, 1 x two red"}
SEEDS = 3
JUDGED = {
    "classifier": "builtin:coloured_digits", "clip": None, "axis": "digit", "near": ["nine", "one"],
    "near_from": "text embeddings", "similarity": {"nine": 0.9312, "one": 0.9101, "two": 0.8804},
}  # fmt: skip


def fake_pictures() -> dict[str, Any]:
    """A complete record of one unlearn request without a reference; every call gives a fresh copy."""
    results = fake_results()
    base, _, unlearn = results["stages"]
    base["title"] = "before unlearning"
    results["stages"] = [base, {**unlearn, "stage": "00-unlearn-seven", "title": "after unlearning seven",
                                "log": "requests/00-unlearn-seven/log.jsonl"}]  # fmt: skip
    for stage in results["stages"]:
        stage["groups"] = {
            group: {
                "examples": len(PROMPTS[group]),
                "metrics": dict(metrics),
                "samples": [
                    {"question": prompt, "answer": "", "generated": SEEN[stage["stage"]]} for prompt in PROMPTS[group]
                ],
            }
            for group, metrics in METRICS[stage["stage"]].items()
        }
    results |= {
        "name": "seven", "source": "recipes/digits/seven.yaml", "command": "hf-clmul run recipes/digits/seven.yaml",
        "reference": None, "judged": JUDGED,
    }  # fmt: skip
    results["model"] |= {
        "family": "diffusion", "path": "builtin:coloured_digits", "pipeline": "StableDiffusionPipeline", "component": "unet",
        "task": "text-to-image", "parameters": 1_000_000, "trainable_parameters": 1_000_000,
    }  # fmt: skip
    return copy.deepcopy(results)


def colour(stage: int, group: str, prompt: int, seed: int) -> tuple[int, int, int]:
    """Of one picture; no other has it, and neither has the page."""
    return 40 + 60 * stage + 10 * seed, 77 if group == "forget" else 177, 31 + 10 * prompt


def write_pictures(folder: Path, results: dict[str, Any] | None = None) -> Path:
    """Writes the run folder with the rows of each stage, 8 x 8 pixels a picture, and returns it."""
    from PIL import Image

    results = results or fake_pictures()
    write_fake_run(folder, results)
    (folder / "recipe.yaml").write_text("recipe_version: 1\nname: seven\nfamily: diffusion\n", encoding="utf-8")
    for at, stage in enumerate(results["stages"]):
        place = folder / ("base" if stage["kind"] == "base" else f"requests/{stage['stage']}")
        place.mkdir(parents=True, exist_ok=True)
        lines = []
        for group, prompts in PROMPTS.items():
            for i, prompt in enumerate(prompts):
                pictures = []
                for seed in range(SEEDS):
                    out = io.BytesIO()
                    Image.new("RGB", (8, 8), colour(at, group, i, seed)).save(out, "PNG")
                    pictures.append(base64.b64encode(out.getvalue()).decode())
                lines.append({"group": group, "task": None, "id": prompt, "caption": prompt, "pictures": pictures})
        (place / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
