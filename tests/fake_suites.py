"""What later records have beside values: counts, intervals, absent metrics with their reason, and suites of no single group. Made of
invented numbers, added to a fake record. It knows no model."""

from typing import Any

from fake_results import fake_results

NO_PARAPHRASE = "no example has a paraphrased answer (column `paraphrased_answer`)"
NO_REFERENCE = "no reference: no model that was trained without the forgotten data was measured"
NO_NORMS = "gradient norms were not asked for"
AUCS = {"loss": 0.41, "zlib": 0.43, "min_k": 0.39, "min_k_plus_plus": 0.46}


def fake_suites(referenced: bool = True) -> dict[str, Any]:
    """The record of `fake_results` with all of it. The held-out group has no paraphrases, and one retained answer no words."""
    results = fake_results()
    if not referenced:
        results["reference"] = None
    for number, stage in enumerate(results["stages"]):
        for name, group in stage["groups"].items():
            found = group["metrics"]
            group["absent"] = {}
            if name == "held_out":
                found["paraphrase_probability"], group["absent"] = None, {"paraphrase_probability": NO_PARAPHRASE}
            known = {metric: value for metric, value in found.items() if value is not None}
            group["counts"] = dict.fromkeys(known, group["examples"])
            group["intervals"] = {
                metric: [round(value - 0.0412, 4), round(value + 0.0533, 4)] for metric, value in known.items()
            }
            if name == "retain":
                group["counts"]["rouge_l_recall"] = 15
        stage["suites"] = {"tofu": _tofu(number, referenced), "mia": _mia(number, referenced)}
    return results


def _tofu(number: int, referenced: bool) -> dict[str, Any]:
    entry = {
        "metrics": {"model_utility": 0.31 + 0.2 * number},
        "counts": {"model_utility": 48},
        "intervals": {},
        "absent": {},
    }
    return _with_or_absent(entry, "forget_quality", 0.0187 * number, referenced, interval=False)


def _mia(number: int, referenced: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"metrics": {}, "counts": {}, "intervals": {}, "absent": {}}
    for name, value in AUCS.items():
        _with_or_absent(entry, f"{name}_auc", value + 0.25 * (number == 1), True)
        _with_or_absent(entry, f"{name}_auc_gap", abs(value - 0.44), referenced)
    for name in ("grad_norm_auc", "grad_norm_auc_gap"):
        entry["metrics"][name], entry["absent"][name] = None, NO_NORMS
    return _with_or_absent(entry, "privleak", -12.5, referenced)


def _with_or_absent(
    entry: dict[str, Any], name: str, value: float, known: bool, interval: bool = True
) -> dict[str, Any]:
    if not known:
        entry["metrics"][name], entry["absent"][name] = None, NO_REFERENCE
        return entry
    entry["metrics"][name], entry["counts"][name] = round(value, 4), 32
    if interval:
        entry["intervals"][name] = [round(value - 0.11, 4), round(value + 0.12, 4)]
    return entry
