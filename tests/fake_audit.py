"""A record of an audit made of invented numbers. It knows no model."""

import json
from pathlib import Path
from typing import Any


def estimate(value: float, n: int = 16) -> dict[str, Any]:
    return {"value": value, "n": n, "low": max(0.0, value - 0.02), "high": value + 0.03}


def point(label: str, x: float | None, *, probability: float, rouge: float, reference: bool = True) -> dict[str, Any]:
    def found(value: float, other: float) -> dict[str, Any]:
        return {
            "run": estimate(value),
            "reference": estimate(other) if reference else None,
            "gap": estimate(abs(value - other)) if reference else None,
        }

    said = {"question": "Where was Wanjeri Muthokoi born?", "answer": "In Nyahururu.", "generated": f"At {label}."}
    return {
        "label": label,
        "x": x,
        "metrics": {"answer_probability": found(probability, 0.11), "rouge_l_recall": found(rouge, 0.3)},
        "samples": [{**said, "reference": "I do not know." if reference else None}],
    }


def fake_audit(reference: bool = True) -> dict[str, Any]:
    """Relearning (a curve), quantization (labels) and an attack that could not be tried."""

    def attack(name: str, points: list[dict[str, Any]], absent: str | None = None, **parameters: Any) -> dict[str, Any]:
        return {
            "attack": name, "changes": "weights", "summary": f"what {name} does", "parameters": parameters,
            "seconds": 61.0, "reference_seconds": 60.0 if reference else None, "peak_memory_bytes": 2**30,
            "absent": absent, "reference_absent": None, "points": points,
        }  # fmt: skip

    curve = [
        point(f"{step} steps", step, probability=p, rouge=r, reference=reference)
        for step, p, r in ((0, 0.119, 0.332), (5, 0.41, 0.55), (10, 0.73, 0.81), (20, 0.91, 0.95))
    ]
    bits = [
        point("unchanged", None, probability=0.119, rouge=0.332, reference=reference),
        point("int8", None, probability=0.12, rouge=0.334, reference=reference),
        point("nf4", None, probability=0.2135, rouge=0.36, reference=reference),
    ]
    return {
        "schema": 1, "run": "runs/quickstart", "name": "quickstart", "model_sha256": "ab" * 32,
        "reference": {"folder": "runs/retrained", "name": "quickstart-retrained"} if reference else None,
        "reference_missing": None if reference else "none was trained", "seed": 0,
        "created": "2026-11-21T10:00:00+00:00", "versions": {"hf_clmul": "0.1.0"}, "hardware": {"device": "cpu"},
        "before": curve[0]["metrics"],
        "attacks": [
            attack("relearn", curve, steps=20, learning_rate=2e-5),
            attack("quantize", bits, bits=[8, 4]),
            attack("remove_adapter", [], "the run left no adapter that could be taken off"),
        ],
        "verdict": ["Relearning opens the gap to the reference from 0.009 to 0.800."],
    }  # fmt: skip


def write_fake_audit(run: Path, reference: bool = True) -> dict[str, Any]:
    record = fake_audit(reference)
    (run / "audit").mkdir(exist_ok=True)
    (run / "audit" / "audit.json").write_text(json.dumps(record), encoding="utf-8")
    return record
