"""SLAO: one adapter for a whole stream, each task learned from an orthonormal start and merged into what came before. It knows
the factors of an adapter; nothing of tasks' names, requests or trainers.

Qiao and Mahdavi (arXiv 2512.23017): for task i > 1, A begins as Q^T of the QR decomposition of the last fine-tuned A^T and B as
the last fine-tuned B; afterwards B_merged <- B_merged + (B - B_merged) / sqrt(i) and A_merged <- A. Known from the abstract, a
review with the formulas and reproductions from the paper's Algorithm 1, which agree; code of the authors was not found. QR leaves
signs open: as in a reproduction, the diagonal of R is not negative, so that an A that is orthonormal already stays as it is.
"""

from collections.abc import Mapping
from math import sqrt
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor, nn

from hf_clmul.errors import RunError
from hf_clmul.paths import atomic_write

Factors = dict[str, Tensor]
"""Copies of an adapter's factors, by the names that they are saved under; A factors have `lora_A` in them."""


def orthonormal(a: Tensor) -> Tensor:
    """Orthonormal rows [r, in] that span those of `a` [r, in], r <= in: Q^T of a^T = Q R, the diagonal of R not negative.
    Worked out in float64."""
    q, r = torch.linalg.qr(a.T.double())
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    return (q * signs).T.to(a.dtype)


def merged(before: Tensor, b: Tensor, i: int) -> Tensor:
    """before + (b - before) / sqrt(i): the i-th task's B, counted from 1, in what the tasks before have made."""
    return before + (b - before) / sqrt(i)


def factors(model: PeftModel, name: str) -> Factors:
    """What adapter `name` is made of at the moment."""
    return {key: p.detach().clone() for key, p in _parameters(model, name).items()}


def begin(model: PeftModel, name: str, tuned: Mapping[str, Tensor], i: int) -> None:
    """Makes the adapter ready for task i, counted from 1, from the factors that the last task's training left (`tuned`, as
    `merge` returned them, not the merged ones). A first task begins as any adapter does. What the adapter computes
    changes by that: take a teacher before.

    Raises RunError for factors of another adapter, ValueError for an adapter whose rank is above its inputs.
    """
    if i == 1:
        return
    mine = _fitting(model, name, tuned)
    narrow = [key for key, p in mine.items() if _is_a(key) and p.shape[0] > p.shape[1]]
    if narrow:
        r, inputs = mine[narrow[0]].shape
        raise ValueError(
            f"{narrow[0]} has {inputs} inputs, too few for {r} orthonormal rows: give a rank of at most {inputs}."
        )
    with torch.no_grad():
        for key, p in mine.items():
            value = tuned[key].to(p.device)
            p.copy_(orthonormal(value) if _is_a(key) else value)


def merge(model: PeftModel, name: str, previous: Mapping[str, Tensor] | None, i: int) -> Factors:
    """Merges what task i, counted from 1, has left in the adapter into the `previous` merged factors, in place: from now on
    the adapter is that of all i tasks. Returns the factors that the training left, from which the next task begins.

    Raises RunError for factors of another adapter.
    """
    tuned = factors(model, name)
    if i > 1:
        mine = _fitting(model, name, previous or {})
        with torch.no_grad():
            for key, p in mine.items():
                if not _is_a(key):
                    p.copy_(merged(previous[key].to(p.device), p, i))
    return tuned


def save(kept: Mapping[str, Tensor], file: Path) -> None:
    """Writes factors as safetensors, whole or not at all."""
    atomic_write(file, as_bytes({key: value.to("cpu").contiguous() for key, value in kept.items()}))


def load(file: Path) -> Factors:
    return load_file(file)


def _is_a(key: str) -> bool:
    return "lora_A" in key


def _parameters(model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    marks = {f"lora_A.{name}.": "lora_A.", f"lora_B.{name}.": "lora_B."}
    found = {}
    for key, p in model.named_parameters():
        for mark, plain in marks.items():
            if mark in key:
                found[key.replace(mark, plain)] = p
    return found


def _fitting(model: PeftModel, name: str, given: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    mine = _parameters(model, name)
    odd = sorted({(k, tuple(p.shape)) for k, p in mine.items()} ^ {(k, tuple(t.shape)) for k, t in given.items()})
    if odd:
        raise RunError(
            f"the factors given are not those of adapter {name!r}: {len({key for key, _ in odd})} differ, such as {odd[0][0]}. "
            "They were made with another adapter configuration."
        )
    return mine
