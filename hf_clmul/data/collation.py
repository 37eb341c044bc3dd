"""From encoded examples to one micro-batch, {role: model inputs}. Knows padding and supervision; no model, no term."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_clmul.data.encoding import CLASS_ID, IGNORED, NO_CLASS, Encoded


@dataclass
class RoleCollator:
    """Collates [{role: encoded example}] into {role: batch}; a plain list of encoded examples into one batch.

    Sequences are padded on the left, so that answers end in the same column and logits are needed only from the first
    supervised column on. The mask says what is real: the pad token may be the end-of-turn token. Where examples carry an
    `alternative` (a second answer), its B sequences follow the first B and `alternatives` holds B. Where they carry
    `contexts`, {name: the example in it}, the batch has a batch of each under the same key. Where some have a class, it has
    `classes` [B]. Where they carry stored targets, it has them as `stored`, in the order of `rows`.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if "input_ids" in examples[0]:
            return self.collate(examples)
        return {role: self.collate([example[role] for example in examples]) for role in examples[0]}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One role's batch: tensors [B, T] and what `supervision` adds; `lengths`: the supervised tokens of each sequence."""
        alternatives = [example["alternative"] for example in examples if "alternative" in example]
        batch = pad_left([*examples, *alternatives], self.pad_token_id)
        supervised = supervision(batch["labels"])
        lengths = supervised["rows"].bincount(minlength=len(batch["labels"])).tolist()
        whole = {**batch, **supervised, "alternatives": len(alternatives), "lengths": lengths}
        if any(CLASS_ID in example for example in examples):
            whole["classes"] = torch.tensor([example.get(CLASS_ID, NO_CLASS) for example in examples])
        if all("stored_ids" in example for example in examples):
            whole["stored"] = stored(examples)
        if "contexts" in examples[0]:
            names = examples[0]["contexts"]
            whole["contexts"] = {name: self.collate([e["contexts"][name] for e in examples]) for name in names}
        return whole


def pad_left(examples: Sequence[Encoded], pad_token_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask, position_ids and labels, each [B, T] int64, padded on the left."""
    width = max(len(example["input_ids"]) for example in examples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
    for example in examples:
        length = len(example["input_ids"])
        pad = width - length
        rows["input_ids"].append([pad_token_id] * pad + list(example["input_ids"]))
        rows["attention_mask"].append([0] * pad + [1] * length)
        rows["position_ids"].append([0] * pad + list(range(length)))
        rows["labels"].append([IGNORED] * pad + list(example["labels"]))
    return {name: torch.tensor(values) for name, values in rows.items()}


def stored(examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The examples' stored targets, one below the other: `ids` [N, k] int64, `logps` [N, k] and `tail` [N] in float32."""
    kinds = {"ids": torch.int64, "logps": torch.float32, "tail": torch.float32}
    return {
        name: torch.cat([torch.as_tensor(example[f"stored_{name}"]).to(dtype) for example in examples])
        for name, dtype in kinds.items()
    }


def supervision(labels: torch.Tensor) -> dict[str, Any]:
    """Where the loss looks, from labels [B, T]: worked out once, on the CPU.

    `keep`: logits are needed for the last `keep` columns; `positions` [N]: the supervised ones among those B * keep,
    in row order; `targets` [N]: their tokens; `rows` [N]: their sequences.
    """
    targets = labels[:, 1:]  # column t predicts token t + 1
    mask = targets != IGNORED
    first = int(mask.any(0).nonzero()[0])
    keep = labels.shape[1] - first
    padded = torch.nn.functional.pad(targets[:, first:], (0, 1), value=IGNORED).reshape(-1)
    positions = (padded != IGNORED).nonzero().squeeze(-1)
    return {"keep": keep, "positions": positions, "targets": padded[positions], "rows": positions // keep}
