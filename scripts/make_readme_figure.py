"""Draws docs/quickstart.png from a finished run of the quickstart and its recorded reference.

python scripts/make_readme_figure.py runs/quickstart
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hf_clmul.paths import builtin_recipes

METRICS = {"answer_probability": "Answer probability", "rouge_l_recall": "ROUGE-L recall of the answer"}
COLUMNS = {"people": "ten people,\nkept", "two-persons": "two people,\nunlearned", "intents": "messages,\nkept",
           "bookings": "a restaurant,\ndeleted exactly"}  # fmt: skip
COLOURS = {"people": "#0072b2", "two-persons": "#d55e00", "intents": "#009e73", "bookings": "#8a5fa8"}
STAGES = (
    "base",
    "learn people",
    "learn messages",
    "learn the restaurant",
    "unlearn two people",
    "delete the restaurant",
)
WIDTH = 0.14


def main() -> None:
    results = json.loads((Path(sys.argv[1]) / "results.json").read_text("utf-8"))
    reference = json.loads((builtin_recipes() / "quickstart.reference.json").read_text("utf-8"))["groups"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.1), sharey=True, facecolor="white")
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for place, column in enumerate(COLUMNS):
            for i, stage in enumerate(results["stages"]):
                x = place + (i - (len(STAGES) - 1) / 2) * WIDTH
                value = stage["tasks"][column]["metrics"][metric]
                axis.bar(x, value, 0.9 * WIDTH, color=COLOURS[column], alpha=0.25 + 0.15 * i, zorder=2)
        mean = reference["forget"][metric]["mean"]
        axis.hlines(mean, 0.55, 1.45, color="#444", linestyle=(0, (3, 2)), linewidth=1.4, zorder=3)
        axis.set(title=title, xticks=range(len(COLUMNS)), ylim=(0, 1.08))
        axis.set_xticklabels(COLUMNS.values())
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#eee", zorder=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color="#444", alpha=0.25 + 0.15 * i) for i in range(len(STAGES))]
    handles.append(plt.Line2D([0], [0], color="#444", linestyle=(0, (3, 2))))
    names = [*STAGES, "a model that never met the two (mean of 3 seeds)"]
    figure.legend(handles, names, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(Path(__file__).resolve().parent.parent / "docs" / "quickstart.png", dpi=130)


if __name__ == "__main__":
    main()
