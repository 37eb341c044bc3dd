"""A stream of 100 small requests: what each costs in time and memory, from first to last.

    python scripts/bench_stream_length.py                      100 requests, about five minutes on a core
    python scripts/bench_stream_length.py --requests 20        a shorter one
    python scripts/bench_stream_length.py --figure docs/stream-length.png

A tiny Llama is made and saved; every third request learns a task into the shared adapter (with a memory of 32 examples), every
third an isolated task, and every third deletes an isolated task or unlearns two rows of a shared one. The times are read from
the ledger and the records of the run; memory is that of the process, looked at after each request.
"""

import argparse
import json
import resource
import tempfile
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from hf_clmul.ledger import chain as ledger
from hf_clmul.models.loading import make
from hf_clmul.paths import builtin_data
from hf_clmul.recipe.load import load_recipe
from hf_clmul.recipe.schema import Scratch

SETS = ("invented_people", "support_intents", "table_bookings", "word_problems")
ROWS = 6  # of each task
RECIPE = """\
recipe_version: 1
name: stream-length
model: {path: base}
adapter: {r: 4, alpha: 8, strategy: single}
memory: {size: 32}
data: {rows: {path: rows.jsonl}}
requests:
"""
SETTINGS = """\
learning: {memory: {nll: {}}, training: {learning_rate: 2.0e-3, max_steps: 6, per_device_train_batch_size: 6}}
unlearning: {training: {learning_rate: 5.0e-4, max_steps: 4, per_device_train_batch_size: 4}}
training: {logging_steps: 2, save_strategy: "no"}
evaluation: {max_examples: 1, max_forgotten: 40, max_new_tokens: 4, samples: 0}
"""


def rows() -> list[dict[str, str]]:
    found = [json.loads(line) for name in SETS for line in builtin_data(name).read_text("utf-8").splitlines()]
    return [{"id": f"r{i}", "task": f"t{i // ROWS}", "question": row["question"], "answer": row["answer"]}
            for i, row in enumerate(found)]  # fmt: skip


def requests(count: int) -> str:
    """Shared, isolated, and a request to unlearn, in turn; what is unlearned was learned three requests before."""
    lines = []
    for i in range(count):
        turn, third = i // 3, i % 3
        task = f"t{2 * turn + third}"
        if third == 0:
            lines.append(f"- learn: {{task: {task}, data: rows, where: {{task: {task}}}}}")
        elif third == 1:
            lines.append(f"- learn: {{task: {task}, data: rows, where: {{task: {task}}}, isolated: true}}")
        elif turn % 2:
            lines.append(f"- unlearn: {{name: u{i}, from: t{2 * turn - 1}}}")
        else:
            first = ROWS * 2 * turn
            lines.append(f"- unlearn: {{name: u{i}, from: t{2 * turn}, ids: [r{first}, r{first + 1}]}}")
    return "".join(f"  {line}\n" for line in lines)


def run(folder: Path, count: int) -> list[dict[str, Any]]:
    """Carries the stream out; one entry a request: kind, seconds of training, of all the rest, and MiB held after it."""
    from hf_clmul.run import runner as running

    data = rows()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    model, tokenizer = make(Scratch(vocab_size=600, layers=2, hidden=64, heads=4), [r["question"] for r in data], 0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "recipe.yaml").write_text(RECIPE + requests(count) + SETTINGS)
    held, settle = [], running._settle

    def settled(run: Any, step: Any, base: str) -> None:
        settle(run, step, base)
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)

    with (
        patch.object(running, "_settle", settled),
        patch("hf_clmul.run.runner.write_report", lambda root: root / "none"),
    ):
        running.run_recipe(load_recipe(str(folder / "recipe.yaml")), folder / "out")
    results = json.loads((folder / "out/results.json").read_text())
    times = {e["name"]: datetime.fromisoformat(e["time"]) for e in ledger.verify(folder / "out/ledger.jsonl")
             if e["event"] == "request"}  # fmt: skip
    begun = [times[stage["stage"]] for stage in results["stages"][1:]]
    ends = [*begun[1:], datetime.fromisoformat(results["finished"])]
    found = []
    for stage, start, end, mib in zip(results["stages"][1:], begun, ends, held, strict=True):
        rest = (end - start).total_seconds() - stage["seconds"]
        found.append(
            {"kind": f"{stage['kind']} ({stage['how']})", "training": stage["seconds"], "rest": rest, "mib": mib}
        )
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for kind in dict.fromkeys(entry["kind"] for entry in found):
        at = [i for i, entry in enumerate(found) if entry["kind"] == kind]
        time.plot([i + 1 for i in at], [found[i]["training"] + found[i]["rest"] for i in at], ".", label=kind)
    time.set(xlabel="request", ylabel="seconds, evaluation included", ylim=(0, None))
    time.legend(fontsize="small")
    memory.plot(range(1, len(found) + 1), [entry["mib"] for entry in found], ".")
    memory.set(xlabel="request", ylabel="memory of the process, MiB", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--figure", type=Path)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), wanted.requests)
    fifth = max(1, len(found) // 5)
    print("| requests | training, s | the rest (evaluation, records), s | memory, MiB |")
    print("|---|---|---|---|")
    for start in range(0, len(found), fifth):
        some = found[start : start + fifth]
        trains = [entry["training"] for entry in some if entry["training"]]
        line = f"{median(trains):.2f} | {median(e['rest'] for e in some):.2f} | {some[-1]['mib']:.0f}"
        print(f"| {start + 1} to {start + len(some)} | {line} |")
    if wanted.figure:
        draw(found, wanted.figure)


if __name__ == "__main__":
    main()
