"""Runs the quickstart and its retrained reference over seeds, and records their figures.

    python scripts/bench_quickstart.py                 three seeds of both (about 30 minutes on 2 cores)
    python scripts/bench_quickstart.py --record        also writes recipes/quickstart.reference.json

Prints the tables of docs/results.md. It holds no library logic: recipes in, run folders out.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hf_clmul import load_recipe, run_recipe
from hf_clmul.paths import atomic_write, builtin_recipes
from hf_clmul.run.comparison import compare

METRICS = (
    "answer_probability",
    "rouge_l_recall",
    "paraphrase_probability",
    "truth_ratio",
    "extraction_strength",
    "fluency",
)
RETRAINED_SEED = 1000
"""Added to a quickstart's seed: the reference must differ from it in everything but the data."""


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}


def collected(runs: list[dict[str, Any]], stage: int) -> dict[str, dict[str, dict[str, float]]]:
    """{group: {metric: {"mean", "std"}}} over runs, at a stage."""
    first = runs[0]["stages"][stage]["groups"]
    return {
        group: {
            name: spread([run["stages"][stage]["groups"][group]["metrics"][name] for run in runs]) for name in METRICS
        }
        for group in first
    }


def lines(title: str, table: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    return [
        f"| {title} | {group} | " + " | ".join(f"{v['mean']:.3f} ± {v['std']:.3f}" for v in metrics.values()) + " |"
        for group, metrics in table.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument("--record", action="store_true", help="write recipes/quickstart.reference.json")
    parser.add_argument("--reference-only", action="store_true", help="only the retrained models")
    parser.add_argument("overrides", nargs="*", help="key.path=value for the quickstart")
    wanted = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {"quickstart-retrained": [], "quickstart": []}
    if wanted.reference_only:
        del found["quickstart"]
    for name, runs in found.items():
        for seed in wanted.seeds:
            output = wanted.output / f"{name}-{seed}"
            own = seed + (RETRAINED_SEED if name == "quickstart-retrained" else 0)
            alone = ["evaluation.reference=null", "audit.after_run=false"]
            run_recipe(load_recipe(name, [f"seed={own}", *alone, *wanted.overrides]), output)
            runs.append(json.loads((output / "results.json").read_text("utf-8")))
    print("| stage | group | " + " | ".join(METRICS) + " |\n|" + "---|" * (len(METRICS) + 2))
    for i, stage in enumerate(found["quickstart"][0]["stages"] if not wanted.reference_only else ()):
        print("\n".join(lines(stage["title"], collected(found["quickstart"], i))))
    reference = collected(found["quickstart-retrained"], -1)
    print("\n".join(lines("retrained without the two", reference)))
    for i, seed in enumerate(wanted.seeds if not wanted.reference_only else ()):
        folders = [wanted.output / f"{name}-{seed}" for name in ("quickstart", "quickstart-retrained")]
        run = found["quickstart"][i]
        print(
            f"\nseed {seed}: {run['seconds']:.0f} s, {run['peak_memory_bytes'] / 2**30:.2f} GiB, "
            + ", ".join(f"{name} {value:.3g}" for name, value in compare(*folders).items())
        )
    if wanted.record:
        seeds = ", ".join(str(seed + RETRAINED_SEED) for seed in wanted.seeds)
        source = (
            f"recipes/quickstart-retrained.yaml, seeds {seeds}, recorded {date.today().isoformat()} by "
            "scripts/bench_quickstart.py --record"
        )
        atomic_write(
            builtin_recipes() / "quickstart.reference.json",
            json.dumps({"source": source, "groups": reference}, indent=1) + "\n",
        )


if __name__ == "__main__":
    main()
