"""Compares unlearning methods under several conflict rules against models retrained without the forget data.

    python scripts/bench_methods.py                          the mini bed, all methods, seeds 0 1 2 (half an hour)
    python scripts/bench_methods.py --methods npo --seeds 0  some
    python scripts/bench_methods.py --bed quickstart --methods npo undial --budget 1e-3

Every method and rule gets the same budget: the learning rates of --budget (for LUR the same number of trials, shared
between learning rates and alphas), tried on two seeds of their own and judged by `gap`, the mean distance to the retrained models
over the forget and retain groups. The best setting is then run on the seeds. Each result is kept in --output (jsonl), so that a
stopped comparison goes on; `--report` writes the table and the figure from there. It holds no library logic.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import transformers
from bed import Bed, Groups, figures

KL = {"kl": {"weight": 2.0}}
METHODS: dict[str, dict[str, Any]] = {
    "grad_ascent": {"forget": {"grad_ascent": {"weight": 0.2}}, "retain": KL},
    "wga": {"forget": {"wga": {}}, "retain": KL},
    "satimp": {"forget": {"satimp": {}}, "retain": KL},
    "npo": {"forget": {"npo": {"beta": 0.1}}, "retain": KL},
    "simnpo": {"forget": {"simnpo": {"beta": 2.5}}, "retain": KL},
    "idk": {"forget": {"idk": {"beta": 0.1}}, "retain": KL},
    "idk_nll": {"forget": {"idk_nll": {}}, "retain": KL},
    "undial": {"forget": {"undial": {"beta": 10.0}}, "retain": KL},
    "ce_u": {"forget": {"ce_u": {}}, "retain": KL},
    "max_entropy": {"forget": {"max_entropy": {"weight": 0.1}}, "retain": KL},
    "jensun": {"forget": {"jensun": {}}, "retain": {"js": {"weight": 2.0}}},
    "inverted_hinge": {"forget": {"inverted_hinge": {}}, "retain": KL},
    "logit_margin": {"forget": {"logit_margin": {"weight": 0.01}}, "retain": KL},
    "bad_teacher": {"forget": {"bad_teacher": {"weights": "uniform", "weight": 0.1}}, "retain": KL},
    "scrub": {"forget": {"scrub": {"weight": 0.2}}, "retain": KL},
    "rmu": {
        "forget": {"rmu": {"layer": 0.5, "steering_coefficient": 20.0}},
        "retain": {**KL, "hidden_mse": {"layer": 0.5}},
    },
}
"""One retain term for all but those that come with their own; weights bring unbounded or large losses into range."""
RULES = ("sum", "pcgrad_retain_first", "lur")
TUNING_SEEDS = (100, 101)
Budget = tuple[list[float], list[float]]
LEARNED = {"mini": "mini/npo", "quickstart": "quickstart"}


def trials(rule: str, rates: list[float], alphas: list[float]) -> list[dict[str, Any]]:
    """The settings that a method may try under a rule: as many for each rule."""
    if rule != "lur":
        return [{"conflict": rule, "learning_rate": rate} for rate in rates]
    kept = rates[1 :: len(alphas)] or rates
    tried = [
        {"conflict": "sum", "lookahead": {"alpha": alpha, "mode": "cross"}, "learning_rate": rate}
        for rate in kept
        for alpha in alphas
    ]
    return tried[-len(rates) :]


class Records:
    """Results, one a line, found again by what was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def find(self, **asked: Any) -> dict[str, Any] | None:
        return next((r for r in self.all if all(r[key] == value for key, value in asked.items())), None)

    def add(self, **record: Any) -> dict[str, Any]:
        self.all.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        return record


class Comparison:
    """Beds are made when first needed; a result that is there is not made again."""

    def __init__(self, bed: str, records: Records) -> None:
        self.bed, self.records = bed, records
        self._beds: dict[int, Bed] = {}
        self._references: dict[int, list[Groups]] = {}

    def result(self, seed: int, method: str, rule: str, setting: dict[str, Any]) -> dict[str, Any]:
        asked = {"bed": self.bed, "seed": seed, "method": method, "rule": rule, "setting": setting}
        found = self.records.find(**asked)
        if found is not None:
            return found
        bed, references = self._prepared(seed)
        try:
            log, seconds = bed.unlearn(**METHODS[method], **setting)
        except RuntimeError as error:  # a collapse is a result, too
            return self.records.add(**asked, figures=None, failure=str(error).splitlines()[0])
        cosines = [line["cosine/forget/retain"] for line in log if "cosine/forget/retain" in line]
        extra = {"seconds": seconds, "steps": len(log), "cosine": mean(cosines) if cosines else None}
        record = self.records.add(**asked, figures=figures(bed.measured(), references), **extra)
        shown = {name: round(value, 3) for name, value in record["figures"].items() if value is not None}
        print(seed, method, rule, setting, shown, flush=True)
        return record

    def baseline(self, seed: int) -> None:
        """The learned model before unlearning, and a retrained model of another seed."""
        for method in ("before", "retrained"):
            asked = {"bed": self.bed, "seed": seed, "method": method, "rule": "-", "setting": {}}
            if self.records.find(**asked) is not None:
                continue
            bed, references = self._prepared(seed)
            if method == "before":
                bed.restore()
                self.records.add(**asked, figures=figures(bed.measured(), references))
            elif len(references) > 1:
                self.records.add(**asked, figures=figures(references[1], references[:1]))

    def _prepared(self, seed: int) -> tuple[Bed, list[Groups]]:
        if seed not in self._beds:
            self._beds[seed] = Bed(LEARNED[self.bed], seed)
            if self.bed == "mini":
                references = [Bed("mini/retrained", own).measured() for own in (seed + 1000, seed + 2000)]
            else:
                references = [recorded(self._beds[seed])]
            self._references[seed] = references
        return self._beds[seed], self._references[seed]


def recorded(bed: Bed) -> Groups:
    """The figures of retrained models that the recipe names, means over their seeds; without rows."""
    groups = json.loads(Path(bed.recipe.evaluation.reference).read_text("utf-8"))["groups"]
    return {group: {name: value["mean"] for name, value in metrics.items()} for group, metrics in groups.items()}


def chosen(records: Records, bed: str, method: str, rule: str, budget: Budget) -> dict[str, Any] | None:
    """The setting with the smallest mean gap over the tuning seeds, of those that collapsed on none; the only one if there was
    no choice."""
    settings = trials(rule, *budget)
    if len(settings) == 1:
        return settings[0]
    gaps: list[tuple[float, dict[str, Any]]] = []
    for setting in settings:
        tried = [records.find(bed=bed, seed=seed, method=method, rule=rule, setting=setting) for seed in TUNING_SEEDS]
        if all(record is not None and record["figures"] is not None for record in tried):
            gaps.append((mean(record["figures"]["gap"] for record in tried), setting))
    return min(gaps, key=lambda pair: pair[0])[1] if gaps else None


def results(
    records: Records, bed: str, seeds: list[int], budget: Budget
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """{(method, rule): its records on the seeds, at the setting that was chosen}."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records.all:
        method, rule = record["method"], record["rule"]
        if record["bed"] != bed or record["seed"] not in seeds or record["figures"] is None:
            continue
        if rule == "-" or record["setting"] == chosen(records, bed, method, rule, budget):
            rows.setdefault((method, rule), []).append(record)
    return rows


def table(records: Records, bed: str, seeds: list[int], budget: Budget) -> list[str]:
    """Rows of markdown, the smallest gap first."""
    columns = ("gap", "forget_probability", "forget_rouge", "forget_truth_ratio", "forget_fluency", "retain_probability",
               "retain_rouge", "forget_quality")  # fmt: skip
    lines = ["| method | rule | setting | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 3)]
    ranked = sorted(
        results(records, bed, seeds, budget).items(), key=lambda item: mean(r["figures"]["gap"] for r in item[1])
    )
    for (method, rule), found in ranked:
        cells = []
        for column in columns:
            values = [record["figures"][column] for record in found]
            spread = stdev(values) if len(values) > 1 and None not in values else 0.0
            if column != "forget_quality":
                cells.append(f"{mean(values):.3f} ± {spread:.3f}")
            else:
                cells.append(", ".join("-" if value is None else f"{value:.0e}" for value in values))
        lines.append(f"| {method} | {rule} | {words(found[0]['setting'])} | " + " | ".join(cells) + " |")
    return lines


def figure(records: Records, bed: str, seeds: list[int], budget: Budget, path: Path) -> None:
    """Forgetting against retaining: means over seeds, a mark for each method, a colour for each rule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"sum": "tab:gray", "pcgrad_retain_first": "tab:blue", "lur": "tab:orange", "-": "black"}
    drawn, axes = pyplot.subplots(figsize=(9, 5.5))
    places: dict[str, list[tuple[float, float]]] = {}
    for (method, rule), found in results(records, bed, seeds, budget).items():
        x, y = (mean(r["figures"][name] for r in found) for name in ("forget_truth_ratio", "retain_probability"))
        mark = {"retrained": "*", "before": "s"}.get(method, "o")
        axes.scatter(x, y, c=colours[rule], marker=mark, s=160 if rule == "-" else 36, zorder=3)
        places.setdefault(method, []).append((x, y))
    for method, points in places.items():  # the rules of a method hang together
        axes.plot(*zip(*points, strict=True), c="lightgray", zorder=1)
        axes.annotate(method, max(points), xytext=(6, 4), textcoords="offset points", fontsize=8)
    for rule, colour in list(colours.items())[:-1]:
        axes.scatter([], [], c=colour, label=rule)
    axes.set_xlabel("forgetting: truth ratio on the forgotten persons (1: truth and lies look alike)")
    axes.set_ylabel("retaining: probability of the other persons' answers")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    drawn.tight_layout()
    drawn.savefig(path, dpi=110)


def words(setting: dict[str, Any]) -> str:
    alpha = f", alpha {setting['lookahead']['alpha']:g}" if "lookahead" in setting else ""
    return f"lr {setting['learning_rate']:g}{alpha}" if setting else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", choices=LEARNED, default="mini")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--budget", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3, 4e-3], help="learning rates to try"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench_methods.jsonl"))
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.03, 0.3], help="inner steps that LUR may try")
    parser.add_argument("--figure", type=Path, help="also draw forgetting against retaining")
    parser.add_argument("--report", action="store_true", help="only print the table of what is there")
    wanted = parser.parse_args()
    torch.set_num_threads(1)  # such small models are slower on two threads
    transformers.logging.set_verbosity_error()
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    budget = (wanted.budget, wanted.alphas)
    comparison = Comparison(wanted.bed, Records(wanted.output))
    if not wanted.report:
        for seed in wanted.seeds:
            comparison.baseline(seed)
        for method in wanted.methods:
            for rule in wanted.rules:
                settings = trials(rule, *budget)
                for seed in TUNING_SEEDS if len(settings) > 1 else ():
                    for setting in settings:
                        comparison.result(seed, method, rule, setting)
                setting = chosen(comparison.records, wanted.bed, method, rule, budget)
                for seed in wanted.seeds if setting is not None else ():
                    comparison.result(seed, method, rule, setting)
    if wanted.figure is not None:
        figure(comparison.records, wanted.bed, wanted.seeds, budget, wanted.figure)
    print("\n".join(table(comparison.records, wanted.bed, wanted.seeds, budget)))


if __name__ == "__main__":
    main()
