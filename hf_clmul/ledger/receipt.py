"""The record of one erasure that a person can hand over: a page of plain text, from the ledger and the run's results,
signed with the ledger's key. It claims what the ledger claims, and nothing more."""

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from hf_clmul.errors import RunError
from hf_clmul.ledger.files import key_of, read_records, read_results
from hf_clmul.ledger.key import KEY, keyed
from hf_clmul.recipe.problems import did_you_mean
from hf_clmul.report.claims import APPROXIMATE, FILTER, explained

SHOWN = (
    "answer_probability", "rouge_l_recall", "extraction_strength", "prompt_accuracy", "unlearning_accuracy",
    "near_retain_accuracy", "far_retain_accuracy", "cross_retain_accuracy",
)  # fmt: skip
SIGNATURE, MEASURED = "## Signature", "## Measured afterwards"
NO_KEY = "none: the ledger's key was destroyed before this receipt was written"
_SIGNED = re.compile(
    rf"(?P<content>.*){SIGNATURE}\n\nSHA-256 of all above: (?P<sha256>[0-9a-f]{{64}})\n"
    rf"HMAC-SHA256 of all above, with the ledger's key: (?P<hmac>[0-9a-f]{{64}}|{re.escape(NO_KEY)})\n",
    re.DOTALL,
)
LISTED = 40  # examples
_TITLES = {APPROXIMATE: "Record of an approximate erasure", FILTER: "Record of a filter: nothing was erased"}
_OTHER_TITLE = "Record of an erasure"

Record = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What was found of a receipt. `problems` is empty for a good one; `notes` say what could not be checked."""

    good: list[str]
    problems: list[str]
    notes: list[str]

    def lines(self, name: object) -> list[str]:
        """All of it, one line each, with a verdict first."""
        verdict = "not good" if self.problems else "good"
        return [f"{name}: {verdict}", *(f"  {line}" for line in [*self.good, *self.problems, *self.notes])]


def receipt(root: Path, request: str) -> str:
    """The receipt for unlearn request `request` (its name, or its folder) of the run folder `root`.

    Raises RunError for a folder that is no run, a broken ledger, and a request that has erased nothing.
    """
    records = read_records(root)
    erased = _find(root, records, request)
    text = "\n".join([_page(records, erased), *_measured(root, erased)]) + "\n"
    key = key_of(root, records)
    signed = keyed(key, text) if key is not None else NO_KEY
    return (
        f"{text}{SIGNATURE}\n\nSHA-256 of all above: {sha256(text.encode()).hexdigest()}\n"
        f"HMAC-SHA256 of all above, with the ledger's key: {signed}\n"
    )


def read(path: Path) -> str:
    """A receipt from a file. Raises RunError if there is none that can be read."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise RunError(f"{path} is no receipt: it is not text.") from None


def check(root: Path, text: str) -> Check:
    """Compares a receipt with itself, with the key, and with the ledger that it says it is from; a longer ledger will
    do.

    Raises RunError for a folder that is no run, and a broken ledger.
    """
    records = read_records(root)
    signed = _SIGNED.fullmatch(text)
    if signed is None:
        return Check([], ["it is no receipt: there is no signature at its end, or something stands behind it"], [])
    good, problems, notes = [], [], []
    content = signed["content"]
    if sha256(content.encode()).hexdigest() == signed["sha256"]:
        good.append("its content has the hash that it names")
    else:
        problems.append("it was changed: its content has another hash than it names")
    key = key_of(root, records)
    if key is None:
        notes.append(f"the signature was not checked: {KEY} is gone, or another one")
    elif signed["hmac"] == NO_KEY:
        problems.append("it is not signed, though the ledger has its key")
    elif hmac.compare_digest(keyed(key, content), signed["hmac"]):
        good.append("it is signed with the ledger's key")
    else:
        problems.append("its signature is not of the ledger's key")
    found = _as_written(records, content)
    if found is None:
        problems.append("the ledger does not say what it says: it is of another run, or one of the two was changed")
    else:
        good.append(f"the ledger says the same, in event {found['n']}")
    if key is None and MEASURED in content:
        notes.append("the measured values are not in the ledger, so that only the signature could vouch for them")
    return Check(good, problems, notes)


def _as_written(records: Sequence[Record], content: str) -> Record | None:
    """The erasure that a page is of, if the ledger, as long as it was when the page was written, still gives this
    page."""
    length = re.search(r"^- events then: (\d+)$", content, re.MULTILINE)
    place = re.search(r"^- event: (\d+)$", content, re.MULTILINE)
    if length is None or place is None:
        return None
    then = records[: int(length[1])]
    if int(place[1]) >= len(then) or then[int(place[1])]["event"] != "erased":
        return None
    erased = then[int(place[1])]
    page, _, _ = content.partition(f"\n{MEASURED}\n")
    return erased if page.rstrip("\n") == _page(then, erased).rstrip("\n") else None


def _find(root: Path, records: Sequence[Record], request: str) -> Record:
    erasures = [record for record in records if record["event"] == "erased"]
    found = [record for record in erasures if request in (record["request"], record["name"])]
    if found:
        return found[-1]
    names = list(dict.fromkeys(record["request"] for record in erasures))
    if not names:
        raise RunError(f"{root}: nothing was erased here so far, so there is no receipt to give.")
    raise RunError(
        f"{root}: no request {request!r} has erased anything here; these have: {', '.join(names)}."
        + did_you_mean(request, names)
    )


def _page(records: Sequence[Record], erased: Record) -> str:
    """All that the ledger says of an erasure."""
    lifted = [
        record
        for record in records[erased["n"] + 1 :]
        if record["event"] == "lifted" and record["tombstone"] == erased["request"]
    ]
    lines = [
        f"# {_TITLES.get(erased['claim'], _OTHER_TITLE)}",
        "",
        f"- request: {erased['request']} ({erased['name']})",
        f"- finished: {erased['time']}",
        f"- carried out by: {erased['operator'] or 'not recorded'}",
        f"- task: {erased['task']}",
        f"- claim: {erased['claim']}",
        "",
        explained(erased["claim"], pictures="images" in erased),
        "",
        f"It took {erased['steps']} training steps and {erased['seconds']:g} seconds.",
        "",
    ]
    if lifted:
        lines += [
            f"LIFTED: on {lifted[0]['time']} the request {lifted[0]['by']} lifted this. From then on the examples "
            "may have been learned again.",
            "",
        ]
    lines += [
        f"## Examples: {erased['count']}",
        "",
        "Each is shown by a keyed hash, from which nobody can find the text without the key of this ledger.",
        "",
        *_examples(erased),
        "## What had been made from them",
        "",
        *_items(erased["closure"]),
        "## Files deleted, with SHA-256",
        "",
        *_files(erased["deleted"]),
        "## Files made again without them, with SHA-256",
        "",
        *_files(erased["rebuilt"]),
        "## Files that stayed, with SHA-256",
        "",
        *_files(erased["surviving"]),
        "## The base model",
        "",
        *_base(erased),
        *_audits(records, erased),
        "## Place in the ledger",
        "",
        f"- event: {erased['n']}",
        f"- hash of its line: {erased['hash']}",
        f"- events then: {len(records)}",
        f"- hash of the last line then: {records[-1]['hash']}",
        *_circumstances(records, erased),
    ]
    return "\n".join(lines)


def _examples(erased: Record) -> list[str]:
    """All hashes while they fit on a page; the Merkle root stands for any number."""
    root = f"- Merkle root of the sorted hashes: {erased['merkle_root']}"
    if erased["count"] > LISTED:
        return [root, f"- the hashes: in event {erased['n']} of the ledger", ""]
    return [root, *_items(erased["examples"])]


def _items(values: Sequence[str]) -> list[str]:
    return [*(f"- {value}" for value in values or ["none"]), ""]


def _files(hashes: Mapping[str, str]) -> list[str]:
    return _items([f"{name}: {digest}" for name, digest in sorted(hashes.items())])


def _base(erased: Record) -> list[str]:
    before, after = erased["base_before"], erased["base_after"]
    if before == after:
        return [f"Before and after the same weights, SHA-256 {before}.", ""]
    return [f"It was trained itself. SHA-256 before: {before}; after: {after}.", ""]


def _audits(records: Sequence[Record], erased: Record) -> list[str]:
    """Attacks on a model exported since. What they found is no part of the ledger, which has the hash of their record."""
    found = [record for record in records[erased["n"] + 1 :] if record["event"] == "audited"]
    lines = [
        f"event {record['n']}, {record['time']}: {', '.join(record['attacks']) or 'no attack'}, "
        + (f"beside the reference {record['reference']}" if record["reference"] else "without a reference")
        + f"; SHA-256 of the record: {record['record_sha256']}"
        for record in found
    ]
    return ["## Audits of the finished model", "", *_items(lines)] if lines else []


def _circumstances(records: Sequence[Record], erased: Record) -> list[str]:
    """Recipe and versions, of the process that carried the erasure out."""
    runs = [record for record in records[: erased["n"]] if record["event"] == "run"]
    if not runs:
        return [""]
    versions = ", ".join(f"{name} {version}" for name, version in sorted((runs[-1].get("versions") or {}).items()))
    return [f"- recipe SHA-256: {runs[-1]['recipe_sha256']}", f"- versions: {versions or 'not recorded'}", ""]


def _measured(root: Path, erased: Record) -> list[str]:
    """Of what was erased, and of what each task keeps: the base model's figure, those just before and after the request."""
    results = read_results(root) or {}
    stages = results.get("stages") or []
    at = next((i for i, stage in enumerate(stages) if stage["stage"] == erased["name"]), None)
    if not at:  # the first stage is the base model
        return [MEASURED, "", "Nothing: the run's results do not hold this request.", ""]
    lines = [MEASURED, "", "| examples | metric | base model | before | after |", "|---|---|---|---|---|"]
    columns = (results.get("stream") or {}).get("columns") or []
    mine = [column["name"] for column in columns if at in column["forgotten"]]
    kept = [
        column["name"]
        for column in columns
        if not any(t <= at for t in column["forgotten"]) and min(column["learned"]) <= at
    ]
    of_group = [("erased", "groups", "forget"), ("kept", "groups", "retain")] if not columns else []
    shown = [*of_group, *(("erased", "tasks", name) for name in mine), *(("kept", "tasks", name) for name in kept)]
    for what, part, name in shown:
        three = [((stages[i].get(part) or {}).get(name) or {}).get("metrics") or {} for i in (0, at - 1, at)]
        for metric in [metric for metric in SHOWN if metric in three[2]]:
            figures = " | ".join(_figure(found.get(metric)) for found in three)
            lines.append(f"| {what}: {name} | {metric} | {figures} |")
    return [*lines, ""]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
