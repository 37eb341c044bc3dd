"""A teacher's targets kept with examples: at every supervised position its k most likely tokens and the mass of all others. It
knows models, encoded examples and files; no term, no memory, no trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import IGNORED, Encoded
from hf_clmul.models import adapters, causal_lm
from hf_clmul.objectives.prediction import Prediction, Top
from hf_clmul.paths import atomic_write


@dataclass(frozen=True)
class Targets:
    """Of one example with n supervised positions: `ids` [n, k] int32, the most likely first; their log-probabilities
    `logps` [n, k] and that of all other tokens together, `tail` [n], in nats and float16 (three digits; -inf: none).

    They are rounded when they are made, so that a run has the same before and after it was killed. A position takes
    6 k + 2 bytes: 200 tokens at k = 64 take 77 kB.
    """

    ids: Tensor
    logps: Tensor
    tail: Tensor


def stored_targets(model: nn.Module, rows: Sequence[Encoded], k: int) -> list[Targets]:
    """What the model, as it is, says to each encoded example; in eval mode, and the model stays as it is.

    One example at a time: what is stored with one must not depend, in its last digit, on which others are in the memory. A
    k above the vocabulary's size is taken for it.
    """
    accepted, collate = causal_lm.accepted_inputs(model), RoleCollator(0).collate  # alone, an example is not padded
    device, found = next(model.parameters()).device, []
    with adapters.untouched(model), torch.no_grad():
        model.eval()
        for row in rows:
            batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in collate([row]).items()}
            logps = causal_lm.predict(model, batch, frozenset({"logits"}), accepted).logits.log_softmax(-1)
            best = logps.topk(min(k, logps.shape[-1]), -1)
            tail = logps.scatter(1, best.indices, float("-inf")).logsumexp(-1)
            found.append(Targets(best.indices.int().cpu(), best.values.half().cpu(), tail.half().cpu()))
    return found


def blank(row: Encoded) -> Targets:
    """Targets of the right shape that say nothing, for checks before there are any."""
    n = sum(label != IGNORED for label in row["labels"][1:])
    return Targets(torch.zeros(n, 1, dtype=torch.int32), torch.zeros(n, 1, dtype=torch.float16), torch.zeros(n).half())


def attached(row: Encoded, targets: Targets) -> dict[str, Any]:
    """The encoded example with its targets, as the collator takes it."""
    return {**row, "stored_ids": targets.ids, "stored_logps": targets.logps, "stored_tail": targets.tail}


def said(batch: Mapping[str, Any]) -> Prediction:
    """The targets stored with a batch, as a teacher's prediction. Rounding has left sums of a little more or less than 1,
    which is taken out."""
    own = batch["rows"] < len(batch["labels"]) - batch["alternatives"]
    logps, tail = batch["stored"]["logps"], batch["stored"]["tail"]
    total = logps.logsumexp(-1).logaddexp(tail)
    top = Top(batch["stored"]["ids"], logps - total[:, None], tail - total)
    return Prediction(batch["rows"][own], len(batch["labels"]) - batch["alternatives"], top=top)


def save(targets: Mapping[str, Targets], file: Path) -> None:
    """Writes targets by the ids of their examples as one safetensors file, whole or not at all."""
    named = {}
    for row, t in targets.items():
        named |= {f"ids/{row}": t.ids, f"logps/{row}": t.logps, f"tail/{row}": t.tail}
    atomic_write(file, as_bytes({name: tensor.contiguous() for name, tensor in named.items()}))


def load(file: Path) -> dict[str, Targets]:
    found = load_file(file)
    rows = [name.removeprefix("ids/") for name in found if name.startswith("ids/")]
    return {row: Targets(found[f"ids/{row}"], found[f"logps/{row}"], found[f"tail/{row}"]) for row in rows}
