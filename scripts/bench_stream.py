"""Compares continual-learning methods on a stream of tasks, of which one is unlearned at the end, over seeds.

    python scripts/bench_stream.py                              recipes/stream on SmolLM2-135M, all methods, seeds 0 1 2
    python scripts/bench_stream.py --methods sequential er clmul
    python scripts/bench_stream.py --bed mini                   the same tasks on a small model made from scratch (a minute a run)
    python scripts/bench_stream.py --bed conflict               the conflict stream on another one (seconds a run)

A result is kept in OUTPUT/results.jsonl as soon as it is there, and a run folder that was begun goes on, so that a stopped
comparison goes on with the same command. Several processes may share the work: give each other methods or seeds and one
--output. `--report` prints the tables of what is there; `--figure` draws the matrices R. It holds no library logic: recipes
in, run folders out.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers

from hf_clmul import load_recipe, run_recipe
from hf_clmul.evaluation.stream import average_performance, stream_metrics
from hf_clmul.recipe.schema import Recipe

REFERENCE = "reference"
METHODS = (
    REFERENCE,
    "sequential",
    "er",
    "clmul",
    "derpp",
    "der",
    "lwf",
    "ewc",
    "agem",
    "incremental",
    "o_lora",
    "n_lora",
    "slao",
)
ADAPTERS = ("incremental", "o_lora", "n_lora", "slao")
"""Methods that speak of adapters; the other beds train all weights."""
MEMORY = {"conflict": 12, "mini": 16}
"""Examples kept in beds of their own model. Conflict: a quarter of what is to be kept when the third desk is learned; with half
of it (24) replay forgets next to nothing."""
Record = dict[str, Any]


def recipe_of(bed: str, method: str, seed: int, overrides: list[str]) -> Recipe:
    """The recipe of a method; in a bed of its own model, the method's way of learning with that model and its tasks."""
    own = load_recipe(f"stream/{method}", [f"seed={seed}", *(overrides if bed == "stream" else [])])
    if bed == "stream":
        return own
    learning = own.learning.model_dump(include={"learn", "memory", "penalties", "conflict"})
    memory = None if own.memory is None else {**own.memory.model_dump(), "size": MEMORY[bed]}
    sections = {
        **{f"learning.{key}": value for key, value in learning.items()},
        "memory": memory,
        "teacher": own.teacher,
    }
    taken = [f"{key}={json.dumps(value)}" for key, value in sections.items()]
    return load_recipe(f"stream/{bed}", [f"seed={seed}", f"name={bed}-{method}", *taken, *overrides])


def result(bed: str, method: str, seed: int, folder: Path, overrides: list[str]) -> Record:
    """Carries out one method on one seed and takes from its record what the tables show."""
    began = time.process_time()
    run_recipe(recipe_of(bed, method, seed, overrides), folder / f"{bed}-{method}-{seed}")
    found = json.loads((folder / f"{bed}-{method}-{seed}" / "results.json").read_text("utf-8"))
    last = found["stages"][-1]
    never = {} if method != REFERENCE else {"never": last["groups"]["forget"]["metrics"][found["stream"]["score"]]}
    return {
        "bed": bed, "method": method, "seed": seed, "overrides": overrides, "cpu_seconds": time.process_time() - began,
        "stream": found["stream"], "kinds": ["base", *(stage["title"].split()[1] for stage in found["stages"][1:])], **never,
    }  # fmt: skip


def figures(record: Record) -> dict[str, float | None]:
    """One line of the table. What comes after the last learn request is measured apart from what comes before."""
    stream, kinds = record["stream"], record["kinds"]
    learned = max(t for t, kind in enumerate(kinds) if kind == "learning")
    before = {**stream, "matrix": stream["matrix"][: learned + 1]}
    metrics = stream_metrics(before)
    found = {
        "average_performance": average_performance(before),
        "incremental_average": metrics["incremental_average"],
        "bwt": metrics["bwt_last_minus_learned"],
        "forgetting": metrics["forgetting_best_minus_last"],
        "cpu_seconds": record["cpu_seconds"],
    }
    if learned < len(kinds) - 1:
        rows = stream["matrix"]
        gone = [j for j, column in enumerate(stream["columns"]) if column["forgotten"]]
        kept = [j for j, column in enumerate(stream["columns"]) if not column["forgotten"]]
        found["forgotten_before"] = mean(rows[learned][j] for j in gone)
        found["forgotten_after"] = mean(rows[-1][j] for j in gone)
        found["kept_lost"] = mean(rows[learned][j] - rows[-1][j] for j in kept)
        found["worst_kept_lost"] = max(rows[learned][j] - rows[-1][j] for j in kept)
    return found


def by_method(records: list[Record], bed: str) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["bed"] == bed:
            found.setdefault(record["method"], []).append(record)
    return found


def table(records: list[Record], bed: str) -> list[str]:
    """Rows of markdown, the best average performance first; mean and standard deviation over seeds."""
    methods = by_method(records, bed)
    never = [record["never"] for record in methods.pop(REFERENCE, [])]
    lines: list[str] = []
    shown = {name: [figures(record) for record in of_method] for name, of_method in methods.items()}
    for name, found in sorted(shown.items(), key=lambda item: -mean(f["average_performance"] for f in item[1])):
        if not lines:
            lines = ["| method | seeds | " + " | ".join(found[0]) + " |", "|" + "---|" * (len(found[0]) + 2)]
        cells = [_spread([f[column] for f in found]) for column in found[0]]
        lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    if never:
        lines.append(f"\nThe forgotten task in a model that never learned it: {_spread(never)}.")
    return lines


def matrices(records: list[Record], bed: str) -> list[str]:
    """The matrix R of each method, mean over seeds."""
    lines = []
    for name, found in by_method(records, bed).items():
        columns = [column["name"] for column in found[0]["stream"]["columns"]]
        lines += [f"\n{name}:\n", "| after | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for t, kind in enumerate(found[0]["kinds"]):
            row = (f"{mean(record['stream']['matrix'][t][j] for record in found):.2f}" for j in range(len(columns)))
            lines.append(f"| {t} {kind} | " + " | ".join(row) + " |")
    return lines


def figure(records: list[Record], bed: str, path: Path) -> None:
    """The matrices R side by side, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = {name: found for name, found in by_method(records, bed).items() if name != REFERENCE}
    across = min(4, len(methods))
    drawn, axes = pyplot.subplots(
        -(-len(methods) // across), across, figsize=(3.1 * across, 3.2 * -(-len(methods) // across)), squeeze=False
    )
    for place in axes.flat[len(methods) :]:
        place.axis("off")
    for place, (name, found) in zip(axes.flat, methods.items(), strict=False):
        rows = torch.tensor([record["stream"]["matrix"] for record in found]).mean(0)
        place.imshow(rows, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for t, row in enumerate(rows.tolist()):
            for j, value in enumerate(row):
                place.text(
                    j,
                    t,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 0.6 else "black",
                )
        columns = [column["name"] for column in found[0]["stream"]["columns"]]
        place.set_xticks(range(len(columns)), columns, rotation=30, fontsize=7)
        place.set_yticks(range(len(rows)), [f"{t} {kind}" for t, kind in enumerate(found[0]["kinds"])], fontsize=7)
        place.set_title(name, fontsize=9)
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []


def _spread(values: list[float | None]) -> str:
    if None in values:
        return "-"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=("stream", "mini", "conflict"), default="stream")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/bench_stream"))
    parser.add_argument("--report", action="store_true", help="only print the tables of what is there")
    parser.add_argument("--figure", type=Path, help="also draw the matrices R")
    parser.add_argument("--set", nargs="*", default=[], help="key.path=value for every recipe", dest="overrides")
    wanted = parser.parse_args()
    transformers.logging.set_verbosity_error()
    path = wanted.output / "results.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    usual = [m for m in METHODS if wanted.bed == "stream" or m not in (REFERENCE, *ADAPTERS)]
    for seed in wanted.seeds if not wanted.report else ():
        for method in wanted.methods or usual:
            asked = {"bed": wanted.bed, "method": method, "seed": seed, "overrides": wanted.overrides}
            if any(all(record[key] == value for key, value in asked.items()) for record in read(path)):
                continue
            record = result(wanted.bed, method, seed, wanted.output, wanted.overrides)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(seed, method, {k: round(v, 3) for k, v in figures(record).items() if v is not None}, flush=True)
    records = [record for record in read(path) if record["overrides"] == wanted.overrides]
    print("\n".join([*table(records, wanted.bed), *matrices(records, wanted.bed)]))
    if wanted.figure is not None:
        figure(records, wanted.bed, wanted.figure)


if __name__ == "__main__":
    main()
