"""Compares ways of unlearning on the coloured digits, each tried by attacks, beside the unmodified model and one that never saw
what is forgotten.

    python scripts/bench_digits.py                              forget "seven": all methods, seeds 0 1 2
    python scripts/bench_digits.py --methods relabel esd --seeds 0
    python scripts/bench_digits.py --costs                      seconds, peak memory and bytes of each method
    python scripts/bench_digits.py --sequences                  four forgets in a row: what is left after each, by recipe
    python scripts/bench_digits.py --report                     only the tables of what is there

A result is kept in OUTPUT/results.jsonl as soon as it is there, so that a stopped comparison goes on with the same command;
several processes may share the work. It holds no library logic: recipes in, run folders out, attacks on what they export.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file

from hf_clmul import load_recipe, run_recipe
from hf_clmul.data.images import pixels
from hf_clmul.digits import classifier, pipeline_folder, rows
from hf_clmul.evaluation.images.concepts import Sampling, picture_rows
from hf_clmul.evaluation.images.denoising import Descent
from hf_clmul.evaluation.images.distances import frechet_distance
from hf_clmul.evaluation.images.inversion import disguised, invert
from hf_clmul.evaluation.images.prompts import aggregate, prompts, unpacked
from hf_clmul.evaluation.images.relearning import relearn
from hf_clmul.evaluation.suites import fixed_sample
from hf_clmul.models.diffusion.architectures import architecture_of
from hf_clmul.models.diffusion.loading import load_pipeline
from hf_clmul.models.diffusion.noising import noising_of
from hf_clmul.recipe.sources import builtin_names

Record = dict[str, Any]
RETRAINED, UNMODIFIED = "retrained", "unmodified"
HOW = Sampling(tuple(range(8)), 25, 3.0, 160)
NEAR = ["one", "nine"]
ATTACK = {"inversion_steps": 100, "relearning_steps": 20, "pictures": 16}
SHOWN = {
    "unlearning_accuracy": "UA", "near_retain_accuracy": "IRA near", "far_retain_accuracy": "IRA far",
    "cross_retain_accuracy": "CRA", "frechet_distance": "FD", "after_inversion": "UA inverted",
    "after_relearning": "UA relearned",
}  # fmt: skip


class Bed:
    """What all models are measured with: prompts, the judge, real pictures."""

    def __init__(self) -> None:
        train = rows("train")
        self.forgotten = [row for row in train if row["digit"] == "seven"]
        self.prompts = prompts([*self.forgotten, *(row for row in train if row["digit"] != "seven")])
        self.judge = classifier()
        held_out = [row for row in rows("held_out") if row["digit"] != "seven"]
        with torch.no_grad():
            self.real = self.judge.features(torch.stack([(pixels(row, (8, 8), False, "") + 1) / 2 for row in held_out]))

    def measure(self, pipeline: Any, some: list[dict[str, Any]] | None = None) -> dict[str, float | None]:
        found = picture_rows(pipeline, some or self.prompts, self.judge, HOW, "sampling", 0)
        forgotten = [row for row in found if row["labels"]["digit"] == "seven"]
        kept = [row for row in found if row["labels"]["digit"] != "seven"]
        metrics = aggregate(forgotten, "forget", forgotten, "digit", NEAR, [])
        if kept:
            metrics |= aggregate(kept, "retain", forgotten, "digit", NEAR, [])
            metrics["frechet_distance"] = frechet_distance(features(kept), self.real)
        return metrics

    def attacked(self, pipeline: Any, seed: int) -> dict[str, float | None]:
        """UA after one token was inverted on real sevens, and after some steps of training on them."""
        architecture = architecture_of(pipeline)
        noising = noising_of(pipeline.scheduler, density=architecture.density)
        chosen = fixed_sample(self.forgotten, ATTACK["pictures"], seed)
        images = torch.stack([pixels(row, (8, 8), False, "") for row in chosen])
        asked = [row for row in self.prompts if row["digit"] == "seven"]
        hidden = disguised(asked, "seven")
        how = Descent(ATTACK["inversion_steps"], 1e-2, 16, seed)
        texts = [row["caption"] for row in disguised(chosen, "seven")]
        inverted = invert(pipeline, architecture, noising, images, texts, how, "nine")
        with inverted.applied(pipeline):
            after_inversion = self.measure(pipeline, hidden)["unlearning_accuracy"]
        how = Descent(ATTACK["relearning_steps"], 1e-4, 16, seed)
        again = relearn(pipeline, architecture, noising, images, [row["caption"] for row in chosen], how)
        with again.applied(pipeline):
            after_relearning = self.measure(pipeline, asked)["unlearning_accuracy"]
        return {"after_inversion": after_inversion, "after_relearning": after_relearning}


def features(found: list[dict[str, Any]]) -> np.ndarray:
    return np.concatenate([unpacked(row["features"], len(row["predicted"])) for row in found])


def result(bed: Bed, method: str, seed: int, folder: Path) -> Record:
    """One line of the table: the recipe carried out, what it exports measured and attacked."""
    began, place = time.process_time(), folder / f"{method}-{seed}"
    if method in (UNMODIFIED, RETRAINED):
        source = pipeline_folder(without={"digit": ["seven"]} if method == RETRAINED else None)
    else:
        run_recipe(load_recipe(f"digits/seven-{method}", [f"seed={seed}"]), place)
        source = place / "model"
    pipeline = load_pipeline(str(source))
    return {"method": method, "seed": seed, **bed.measure(pipeline), **bed.attacked(pipeline, seed),
            "cpu_seconds": time.process_time() - began}  # fmt: skip


COSTS = {"seconds": "s", "peak_memory_mib": "peak memory, MiB", "stored_mib": "stored, MiB"}


def costs(method: str, folder: Path) -> Record:
    """What a request costs, in a process of its own that measures next to nothing: seconds of the request, peak memory of the
    process, and the bytes that a request stores, an adapter or the tensors that it changed."""
    place = folder / f"costs-{method}"
    little = ["evaluation.max_examples=1", "evaluation.images.per_prompt=1", "evaluation.images.steps=2"]
    command = [sys.executable, "-m", "hf_clmul", "run", f"digits/seven-{method}", *little, "--output", str(place)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((place / "results.json").read_text("utf-8"))
    adapters = [file.stat().st_size for file in (place / "adapters").rglob("*.safetensors")]
    stored = sum(adapters) if adapters else changed(place / "model")
    return {"method": method, "seconds": found["stages"][-1]["seconds"],
            "peak_memory_mib": found["peak_memory_bytes"] / 2**20, "stored_mib": stored / 2**20}  # fmt: skip


def changed(folder: Path) -> int:
    """Bytes of the denoiser's tensors that are no longer those of the unmodified pipeline."""
    file = Path("unet") / "diffusion_pytorch_model.safetensors"
    before, after = load_file(pipeline_folder() / file), load_file(folder / file)
    return sum(t.numel() * t.element_size() for name, t in after.items() if not torch.equal(t, before[name]))


def sequence(recipe: str, seed: int, folder: Path) -> Record:
    """What the model still draws right of what no request forgets, after each request, and what it no longer draws."""
    place = folder / f"{recipe}-{seed}"
    run_recipe(load_recipe(f"digits/{recipe}", [f"seed={seed}"]), place)
    found = json.loads((place / "results.json").read_text("utf-8"))
    columns, matrix = found["stream"]["columns"], found["stream"]["matrix"]
    gone = [
        mean(1 - row[j] for j, column in enumerate(columns) if column["forgotten"] and column["forgotten"][-1] <= t)
        for t, row in enumerate(matrix)
        if t
    ]
    group = "retain" if "retain" in found["stages"][0]["groups"] else "held_out"  # of a recipe that keeps nothing
    kept = [stage["groups"][group]["metrics"]["prompt_accuracy"] for stage in found["stages"]]
    return {"sequence": recipe, "seed": seed, "kept": kept, "gone": gone, "seconds": found["seconds"]}


def sequences(records: list[Record]) -> list[str]:
    """Rows of markdown: what is kept after each request, and what is gone after the last."""
    lines = []
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["sequence"], []).append(record)
    for name, some in found.items():
        if not lines:
            after = [f"kept after {t}" for t in range(len(some[0]["kept"]))]
            lines = [
                "| recipe | seeds | " + " | ".join([*after, "gone after the last"]) + " |",
                "|" + "---|" * (len(after) + 3),
            ]
        cells = [_spread([record["kept"][t] for record in some]) for t in range(len(some[0]["kept"]))]
        lines.append(f"| {name} | {len(some)} | " + " | ".join([*cells, _spread([r["gone"][-1] for r in some])]) + " |")
    return lines


def table(records: list[Record]) -> list[str]:
    """Rows of markdown; mean and standard deviation over seeds."""
    lines = ["| method | seeds | " + " | ".join(SHOWN.values()) + " |", "|" + "---|" * (len(SHOWN) + 2)]
    methods: dict[str, list[Record]] = {}
    for record in records:
        methods.setdefault(record["method"], []).append(record)
    for name, found in methods.items():
        cells = [_spread([record.get(column) for record in found]) for column in SHOWN]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    return lines


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    digits = 3 if mean(known) < 10 else 0
    return f"{mean(known):.{digits}f}" + (f" ± {stdev(known):.{digits}f}" if len(known) > 1 and stdev(known) else "")


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def main() -> None:
    methods = [name.removeprefix("digits/seven-") for name in builtin_names() if name.startswith("digits/seven-")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[UNMODIFIED, RETRAINED, *methods])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench_digits"))
    parser.add_argument("--costs", action="store_true", help="what each method costs instead, one process each")
    parser.add_argument("--sequences", action="store_true", help="the recipes of four forgets instead")
    parser.add_argument("--recipes", nargs="+", help="which of these")
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    wanted = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if wanted.sequences:
        return run_sequences(wanted)
    if wanted.costs:
        return run_costs(wanted.methods or methods, wanted.output / "costs.jsonl")
    path = wanted.output / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    bed = None if wanted.report else Bed()
    for seed in wanted.seeds if bed is not None else ():
        for method in wanted.methods or [UNMODIFIED, RETRAINED, *methods]:
            if any((record["method"], record["seed"]) == (method, seed) for record in read(path)):
                continue
            record = result(bed, method, seed, wanted.output)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print({key: round(v, 3) if isinstance(v, float) else v for key, v in record.items()}, flush=True)
    print("\n".join(table(read(path))))


def run_costs(methods: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for method in methods:
        if not any(record["method"] == method for record in read(path)):
            with path.open("a") as file:
                file.write(json.dumps(costs(method, path.parent)) + "\n")
    print("| method | " + " | ".join(COSTS.values()) + " |\n" + "|" + "---|" * (len(COSTS) + 1))
    for record in read(path):
        print(f"| {record['method']} | " + " | ".join(_spread([record[column]]) for column in COSTS) + " |")


def run_sequences(wanted: argparse.Namespace) -> None:
    path = wanted.output / "sequences.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = wanted.recipes or [
        name.removeprefix("digits/") for name in builtin_names() if name.startswith("digits/sequence")
    ]
    for seed in wanted.seeds if not wanted.report else ():
        for name in names:
            if not any((record["sequence"], record["seed"]) == (name, seed) for record in read(path)):
                record = sequence(name, seed, wanted.output)
                with path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(record, flush=True)
    print("\n".join(sequences(read(path))))


if __name__ == "__main__":
    main()
