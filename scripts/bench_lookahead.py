"""Judges LUR: every mode, both inner roles, several alphas, against the plain sum and retain-first PCGrad at equal compute.

    python scripts/bench_lookahead.py                     the mini bed, seeds 0 1 2 (about half an hour)
    python scripts/bench_lookahead.py --methods npo --seeds 0

`equal compute` gives the rivals as many passes as LUR's cross mode has: 1.5 times the steps. `cosine` is that of the two roles'
own gradients at the same weights, measured every fifth step; `gap` the mean distance to models retrained without the forget
data. Results are kept in --output (jsonl); a stopped comparison goes on. It holds no library logic.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from bed import Bed, figures
from bench_methods import KL, Records

METHODS: dict[str, dict[str, Any]] = {
    "npo": {"forget": {"npo": {"beta": 0.1}}, "retain": KL, "learning_rate": 1e-3},
    "npo, retain nll": {"forget": {"npo": {"beta": 0.1}}, "retain": {"nll": {}}, "learning_rate": 1e-3},
    "grad_ascent": {"forget": {"grad_ascent": {"weight": 0.2}}, "retain": KL, "learning_rate": 5e-4},
    "grad_ascent, strong": {"forget": {"grad_ascent": {}}, "retain": {"nll": {}}, "learning_rate": 5e-4},
}
RIVALS = {"sum": {"conflict": "sum"}, "pcgrad_retain_first": {"conflict": "pcgrad_retain_first"}}


def settings(alphas: list[float], modes: list[str], epochs: float) -> dict[str, dict[str, Any]]:
    """{row: options}: the rivals with as many steps, and with as many passes; then LUR."""
    rows: dict[str, dict[str, Any]] = {}
    for name, options in RIVALS.items():
        rows[name] = {**options, "num_train_epochs": epochs}
        rows[f"{name}, equal compute"] = {**options, "num_train_epochs": epochs * 1.5}
    for mode in modes:
        for inner in ("retain", "forget"):
            for alpha in alphas:
                look = {"mode": mode, "inner": inner, "alpha": alpha}
                rows[f"{mode}, inner {inner}, alpha {alpha:g}"] = {
                    "conflict": "sum", "lookahead": look, "num_train_epochs": epochs,
                }  # fmt: skip
    return rows


def table(records: Records, methods: list[str], seeds: list[int]) -> list[str]:
    columns = (
        "gap",
        "forget_probability",
        "forget_truth_ratio",
        "forget_fluency",
        "retain_probability",
        "retain_rouge",
    )
    lines = ["| loss | update | " + " | ".join(columns) + " | cosine |", "|" + "---|" * (len(columns) + 3)]
    for method in methods:
        found: dict[str, list[dict[str, Any]]] = {}
        for record in records.all:
            if record["method"] == method and record["seed"] in seeds:
                found.setdefault(record["row"], []).append(record)
        for row, runs in found.items():
            alive = [run["figures"] for run in runs if run["figures"] is not None]
            if not alive:
                lines.append(f"| {method} | {row} | collapsed |" + " |" * len(columns))
                continue
            cells = []
            for column in columns:
                values = [figure[column] for figure in alive]
                cells.append(f"{mean(values):.3f} ± {stdev(values) if len(values) > 1 else 0.0:.3f}")
            cosine = mean(run["cosine"] for run in runs if run["figures"] is not None)
            lines.append(f"| {method} | {row} | " + " | ".join(cells) + f" | {cosine:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["npo", "grad_ascent, strong"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.01, 0.1, 0.5])
    parser.add_argument("--modes", nargs="+", default=["first_order", "cross", "exact"])
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/bench_lookahead.jsonl"))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    records = Records(wanted.output)
    for seed in wanted.seeds:
        bed, references = None, []
        for method in wanted.methods:
            for row, options in settings(wanted.alphas, wanted.modes, wanted.epochs).items():
                asked = {"seed": seed, "method": method, "row": row}
                if records.find(**asked) is not None:
                    continue
                if bed is None:
                    references = [Bed("mini/retrained", own).measured() for own in (seed + 1000, seed + 2000)]
                    bed = Bed("mini/npo", seed)
                try:
                    log, seconds = bed.unlearn(**{**METHODS[method], **options}, change_steps=5)
                except RuntimeError as error:  # a collapse is a result, too
                    records.add(**asked, figures=None, failure=str(error).splitlines()[0])
                    continue
                key = "plain_cosine/forget/retain"
                cosine = mean(line[key] for line in log if key in line)
                harm = mean(line["change/retain"] > 0 for line in log if "change/retain" in line)
                found = figures(bed.measured(), references)
                records.add(**asked, figures=found, cosine=cosine, harmful_steps=harm, seconds=seconds, steps=len(log))
                print(seed, method, row, round(found["gap"], 3), round(cosine, 2), flush=True)
    print("\n".join(table(records, wanted.methods, wanted.seeds)))


if __name__ == "__main__":
    main()
