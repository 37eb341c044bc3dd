"""How many optimizer steps a training makes, and how many examples it sees. The trainer itself is the judge; these are
worked out before it exists, from numbers alone."""

from math import ceil, floor
from typing import Any

from hf_clmul.plan.steps import Job


def optimizer_steps(job: Job, training: dict[str, Any]) -> int:
    """Optimizer steps of a job on one process. Several repeat examples at the end of an epoch that they cannot share
    evenly (see ClmulTrainer)."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    return ceil(_epoch(job, training)[0] * training.get("num_train_epochs", 3))


def draws(job: Job, training: dict[str, Any]) -> int:
    """How many examples of each role a job sees on one process, repetitions counted."""
    per_epoch, micro_batches, anchors = _epoch(job, training)
    epochs, rest = divmod(optimizer_steps(job, training), per_epoch)
    batch = training.get("per_device_train_batch_size", 8)
    whole = micro_batches * batch if training.get("dataloader_drop_last", False) else anchors
    return epochs * whole + min(rest * training.get("gradient_accumulation_steps", 1) * batch, whole)


def _epoch(job: Job, training: dict[str, Any]) -> tuple[int, int, int]:
    """Optimizer steps, micro-batches and anchor examples (of `forget` or `learn`) of one pass."""
    anchors = len(job.roles["learn" if "learn" in job.roles else "forget"])
    exact = anchors / training.get("per_device_train_batch_size", 8)
    micro_batches = floor(exact) if training.get("dataloader_drop_last", False) else ceil(exact)
    return max(1, ceil(micro_batches / training.get("gradient_accumulation_steps", 1))), micro_batches, anchors
