"""Blanks the texts of erased examples where evaluation quotes them. Every figure stays; the report is deleted, to be
written anew without them."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from hf_clmul.errors import RunError
from hf_clmul.evaluation.tables import table_of, write_table
from hf_clmul.ledger import chain as ledger
from hf_clmul.ledger.files import LEDGER, read_events
from hf_clmul.ledger.scan import REPORT, is_evaluation, plain_texts, text_files, without_key
from hf_clmul.ledger.scan_cache import cached, named
from hf_clmul.ledger.scan_quotes import Needles, quoted
from hf_clmul.ledger.scan_text import ERASED, TABLE, Erased, json_values, plain_text, readable
from hf_clmul.paths import atomic_write, explained_writes

_SHOWN = ("question", "answer", "generated", "reference", "caption", "pictures", "features", "predicted")


def redact(root: Path, data: Path | None = None) -> list[str]:
    """Blanks erased texts in `examples.jsonl`, `result.json`, `results.json`, the audit and what `evaluate` wrote, and deletes
    its report if it shows some; the ledger notes it. Erased pictures in the cache are deleted. Returns the files that changed.
    `data` as for `scan`.

    Raises RunError for a folder that is no run or is in use, a broken ledger, and without the key.
    """
    from hf_clmul.run.folder import RunFolder

    read_events(root)  # before the lock, which would make a folder
    with RunFolder(root).locked():
        erased = plain_texts(root, read_events(root), data)
        if erased is None:
            raise RunError(without_key(root).what)
        texts, changed = erased.needles(), {}
        needles = texts | erased.caption_needles()
        for path in text_files(root):
            name = path.relative_to(root).as_posix()
            if not is_evaluation(name):
                continue
            before, suffix = plain_text(path)
            after = _report(path, erased, texts) if name == REPORT else _blanked(path, before, suffix, erased, needles)
            if after != before:
                changed[name] = {"before": _sha256(before), "after": after and _sha256(after)}
                _replace(path, after)
        pictures = cached(erased, needles)
        for file in pictures:
            _replace(file, None)
        if changed or pictures:
            # The name of a picture's file is its plain hash, which the ledger may not hold.
            more = {"cache": len(pictures)} if pictures else {}
            ledger.append(root / LEDGER, "redacted", files=changed, **more)
    return [*changed, *(f"cache: {named(file)}" for file in pictures)]


def _report(path: Path, erased: Erased, needles: Needles) -> str | None:
    page = readable(path)
    return None if quoted(needles, page) or erased.captioned(page) else path.read_text("utf-8")


def _blanked(path: Path, content: str, suffix: str, erased: Erased, needles: Needles) -> str:
    values = json_values(content, suffix)
    if values is None:
        raise RunError(
            f"{path} is not valid JSON, so that erased texts in it cannot be blanked. Delete it and give the command that wrote it "
            "again: what is measured is written anew."
        )
    blank = [_blank(value, erased, needles) for value in values]
    if blank == values:
        return content
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(value)}\n" for value in blank)
    return json.dumps(blank[0], indent=1) + "\n"


def _blank(value: Any, erased: Erased, needles: Needles) -> Any:
    """The value without the texts of erased rows; what quotes one elsewhere, such as an answer to another question,
    goes too."""
    if isinstance(value, Mapping):
        asked = [value[key] for key in ("question", "answer") if isinstance(value.get(key), str)]
        matches = erased.match(value) is not None or any(quoted(needles, text) for text in asked)
        gone = _SHOWN if matches else ()
        if gone and value.get("id") is not None and value["id"] == value.get("caption"):
            gone = (*gone, "id")  # rows of pictures are known by their captions
        return {key: ERASED if key in gone else _blank(inner, erased, needles) for key, inner in value.items()}
    if isinstance(value, list):
        return [_blank(inner, erased, needles) for inner in value]
    return ERASED if isinstance(value, str) and quoted(needles, value) else value


def _replace(path: Path, content: str | None) -> None:
    if content is not None and path.suffix == TABLE:
        write_table([json.loads(line) for line in content.splitlines()], path, table_of(path))
    elif content is not None:
        atomic_write(path, content)
    else:
        with explained_writes(path):
            path.unlink()


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()
