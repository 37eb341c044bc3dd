"""Attacks every forgotten row of the mini bed with shadow models: can it be told that a row was learned and unlearned?

    python scripts/bench_shadow.py                                nothing unlearned, and NPO: 2 x 16 models
    python scripts/bench_shadow.py --methods npo rmu --pairs 32   more certain; models that are there are kept

The candidates are the rows of the three persons that the mini bed forgets. Each shadow model learns the other nine
persons and a random half of the candidates, then unlearns that half with the method (`none`: it does not). 0.5 is what
guessing gives, and what retraining without the rows would. It holds no library logic.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from bed import Bed
from bench_methods import METHODS

from hf_clmul.evaluation.shadow import Train, attack, confidence, run_shadows
from hf_clmul.evaluation.suites import Measuring, measure
from hf_clmul.paths import builtin_data

PERSONS = ("P03", "P07", "P11")
PEOPLE = "path: builtin:invented_people"


def candidates() -> list[dict]:
    lines = Path(builtin_data("invented_people")).read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["person"] in PERSONS]


def training(method: str, rate: float, rows: Sequence[dict], quick: bool) -> Train:
    """A model that learned the chosen rows and unlearned them -> the confidence of each candidate."""

    def train(chosen: Sequence[int], seed: int) -> list[float]:
        learned = [rows[i]["id"] for i in chosen]
        others = [row["id"] for row in rows if row["id"] not in learned]
        bed = Bed(
            "mini/npo", seed,
            f"data.people={{{PEOPLE}, persons: 12, exclude: {{id: [{', '.join(others)}]}}}}",
            # As held-out rows they are in the tokenizer's vocabulary, which all shadow models must share.
            f"data.strangers={{{PEOPLE}, where: {{id: [{', '.join(others)}]}}}}",
            f"requests.1.unlearn.where={{id: [{', '.join(learned)}]}}",
            *(["learning.training.num_train_epochs=1", "unlearning.training.num_train_epochs=1"] if quick else []),
        )  # fmt: skip
        if method != "none":
            bed.unlearn(**METHODS[method], learning_rate=rate)
        found = measure(bed.model, bed.tokenizer, {"candidates": rows}, Measuring(32, 1, False))
        return [confidence(row) for row in found["candidates"]]

    return train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["none", "npo"], choices=["none", *METHODS])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate of unlearning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch: whether it works, not what it gives")
    parser.add_argument("--output", type=Path, default=Path("runs/shadow"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rows = candidates()
    print(f"{'method':>16} {'models':>6} {'AUC':>22} {'TPR at 1 % FPR':>22}")
    for method in given.methods:
        train = training(method, given.rate, rows, given.quick)
        settings = {"method": method, "rate": given.rate, "quick": given.quick}
        scores, learned = run_shadows(train, len(rows), given.pairs, given.seed, given.output / method, settings)
        found = attack(scores, learned, given.seed)
        (given.output / f"{method}.json").write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
        auc, tpr = (f"{e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for e in (found.auc, found.tpr))
        print(f"{method:>16} {found.models:>6} {auc:>22} {tpr:>22}", flush=True)


if __name__ == "__main__":
    main()
