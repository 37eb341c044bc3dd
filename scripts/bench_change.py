"""Does the optimizer undo what a conflict rule promises? Counts the steps that raise the retain loss to first order.

    python scripts/bench_change.py                                   the mini bed, seeds 0 1 2
    python scripts/bench_change.py --bed quickstart --steps 20       SmolLM2-135M with LoRA

For every step: <retain gradient, change of the weights> > 0, the change being the optimizer's (AdamW), not the update that the
rule made. SGD is shown beside it on the mini bed. It holds no library logic.
"""

import argparse
from statistics import mean
from typing import Any

import torch
import transformers
from bed import Bed

RULES: dict[str, Any] = {
    "sum": "sum",
    "pcgrad": "pcgrad",
    "pcgrad_retain_first": "pcgrad_retain_first",
    "agem": "agem",
    "agem, margin 0.5": {"agem": {"margin": 0.5}},
    "gru": "gru",
    "sago": "sago",
    "bisector": "bisector",
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, beta1 0": {"adam_beta1": 0.0},
    "SGD": {"optim": "sgd", "learning_rate": 0.02},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=("mini", "quickstart"), default="mini")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    shown: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in wanted.seeds:
        bed = Bed("mini/npo" if wanted.bed == "mini" else "quickstart", seed)
        for optimizer in wanted.optimizers:
            for rule in wanted.rules:
                log, _ = bed.unlearn(
                    forget="npo", retain="nll", conflict=RULES[rule], max_steps=wanted.steps, change_steps=1,
                    **OPTIMIZERS[optimizer],
                )  # fmt: skip
                conflicts = [line["plain_cosine/forget/retain"] < 0 for line in log]
                harmful = [line["change/retain"] > 0 for line in log]
                found = {
                    "conflict": sum(conflicts), "harmful": sum(harmful), "steps": len(log),
                    "retain": mean(line["loss/retain/nll"] for line in log[-5:]),
                    "forget": mean(line["loss/forget/npo"] for line in log[-5:]),
                }  # fmt: skip
                shown.setdefault((optimizer, rule), []).append(found)
                print(seed, optimizer, rule, {k: round(v, 3) for k, v in found.items()}, flush=True)
    print(
        f"\n| optimizer | rule | steps that raise the retain loss, of {wanted.steps} | with conflict | retain nll | npo |"
    )
    print("|---|---|---|---|---|---|")
    for (optimizer, rule), runs in shown.items():
        counts, conflicts = (", ".join(str(int(run[key])) for run in runs) for key in ("harmful", "conflict"))
        ends = " | ".join(f"{mean(run[key] for run in runs):.3f}" for key in ("retain", "forget"))
        print(f"| {optimizer} | {rule} | {counts} | {conflicts} | {ends} |")


if __name__ == "__main__":
    main()
