"""What a reader of a report needs to do the same again, as labels and values, from the record, the recipe and the ledger of a run. It
knows files, and nothing of pages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_clmul.report.tables import DASH
from hf_clmul.report.words import NEAR_FROM, format_bytes, format_seconds

Record = Mapping[str, Any]
Facts = list[tuple[str, str]]


def facts(run: Path, results: Record) -> dict[str, Facts]:
    """What a reader needs to do it again, {heading: [(label, value)]}; a dash for what was not recorded."""
    model, hardware = results["model"], results["hardware"]
    head, events = _ledger_head(run / "ledger.jsonl")
    judged = results.get("judged")
    return {
        "Run": _shown(
            {"recipe": results.get("source"), "revision of the recipe": results.get("source_revision")}
            | {"seed": results["seed"], "created": results["created"], "finished": results["finished"]}
            | {"time of all processes": format_seconds(results["seconds"])}
            | {"recipe SHA-256": results["recipe_sha256"], "ledger head": head, "ledger events": events}
        ),
        "Model": _shown(
            {"path": model["path"], "SHA-256": model["sha256"], "dtype": model["dtype"]}
            | ({"pipeline": model["pipeline"], "what trains": model["component"]} if "pipeline" in model else {})
            | {"parameters": f"{model['parameters']:,}", "trained": f"{model['trainable_parameters']:,}"}
            | {"exported as": _export(results.get("export"))}
        ),
        **({} if judged is None else {"How pictures are judged": _judged(judged)}),
        "Hardware": _shown(
            {name: value for name, value in hardware.items() if name != "memory_bytes"}
            | {"memory": format_bytes(hardware["memory_bytes"])}
            | {"peak memory of the run": format_bytes(results["peak_memory_bytes"])}
        ),
        "Versions": _shown(results["versions"]),
    }


def _judged(judged: Mapping[str, Any]) -> Facts:
    """Who judges, and how near each candidate is to what is forgotten, where neighbours were chosen by that."""
    similar = judged.get("similarity") or {}
    near, source = judged.get("near") or [], judged.get("near_from")
    return _shown(
        {"classifier": judged.get("classifier"), "CLIP": judged.get("clip"), "axis": judged.get("axis")}
        | {"near neighbours": ", ".join(near) or None, "chosen by": NEAR_FROM.get(source, source)}
        | ({"similarity": ", ".join(f"{name} {value:.3f}" for name, value in similar.items())} if similar else {})
    )


def _export(export: Mapping[str, Any] | None) -> str | None:
    if export is None:
        return None
    found = f"largest difference of outputs {export['max_difference']:.2g}, allowed {export['tolerance']:.2g}"
    return f"{export['kind']}, loaded back and compared: {found}"


def _shown(values: Mapping[str, Any]) -> Facts:
    return [(label, DASH if value is None else str(value)) for label, value in values.items()]


def _ledger_head(path: Path) -> tuple[str | None, int | None]:
    """Hash of the last whole event, and the number of events; of a damaged ledger, which `hf-clmul ledger verify` tells of, none."""
    lines = [line for line in (text_of(path) or "").split("\n")[:-1] if line]
    try:
        return (json.loads(lines[-1])["hash"], len(lines)) if lines else (None, None)
    except (ValueError, KeyError, TypeError):
        return None, None


def text_of(path: Path) -> str | None:
    """None where there is no such file. It is shown, not read: what is no text in it is replaced."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
