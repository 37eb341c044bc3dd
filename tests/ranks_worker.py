"""Trainings that are run by one process and by two gloo processes under DDP, for test_ranks.py to compare.

Run as a script it is one of two ranks: it meets the other through a file (no port to be taken), runs all cases and writes
what it found. A case's windows hold the same examples for any number of processes.
"""

import logging
import os
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from trainer_bed import (
    LORA,
    Gradients,
    Nudge,
    Poison,
    Stop,
    adapted,
    examples,
    importances,
    lines,
    llama,
    make,
    same,
    two_roles,
    weights,
)
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

from hf_clmul.errors import RunError
from hf_clmul.models import adapters
from hf_clmul.models.ema import EmaState
from hf_clmul.trainer import log as trainer_log

TIMEOUT = 600  # seconds, for all cases together; they take 20 on two free cores
SIZE, MICRO_BATCH, WINDOW = 16, 2, 8  # examples of each role: in an epoch, a micro-batch, a window over all ranks
MARK = 70  # a token that no example has by itself


def launch(folder: Path, script: str = __file__) -> list[dict[str, Any]]:
    """Runs all cases of a script on two processes; what each rank found. Raises RuntimeError with their output if one
    fails."""
    logs, ranks = [folder / f"rank{rank}.log" for rank in (0, 1)], []
    for rank, log in enumerate(logs):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "OMP_NUM_THREADS": 1,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with log.open("w") as out:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, script, str(folder)],
                    stdout=out,
                    stderr=out,
                    env={**os.environ, **{name: str(value) for name, value in own.items()}},
                )
            )
    until = time.monotonic() + TIMEOUT
    while (
        any(p.poll() is None for p in ranks) and all(p.poll() in (None, 0) for p in ranks) and time.monotonic() < until
    ):
        time.sleep(0.1)
    for process in ranks:
        process.kill()
        process.wait()
    if any(process.returncode for process in ranks):
        raise RuntimeError("\n".join(f"rank {i}: {log.read_text()[-3000:]}" for i, log in enumerate(logs)))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


# ---- the cases -----------------------------------------------------------------------------------------------------


class Branched(LlamaForCausalLM):
    """Has a parameter that only batches with a marked example reach."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.extra = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        **kwargs: Any,
    ) -> Any:
        found = super().forward(input_ids, attention_mask, position_ids, labels=labels, **kwargs)
        if (input_ids == MARK).any():
            found.logits = found.logits + self.extra
        return found


def branched() -> Branched:
    plain = llama()
    model = Branched(plain.config)
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def frozen_a() -> nn.Module:
    model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


def sharded(folder: Path) -> LlamaForCausalLM:
    """On several ranks each holds a part of every parameter (FSDP2)."""
    if not torch.distributed.is_initialized():
        return llama()
    if torch.distributed.get_rank() == 0:
        llama().save_pretrained(folder)
    torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=2))


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


def of_this_rank(gram: list[list[float]]) -> list[float]:
    """A rule whose result differs between ranks, as rounding might make it."""
    return [1.0, 1.0 + int(os.environ.get("RANK", "0"))]


BOTH = {"forget": {"npo": {"beta": 0.2}}, "retain": {"kl": {}, "nll": {"weight": 0.5}}}
REINFORCED = {"epochs": 2, "learning_rate": 0.01}
DECAY = {"weight_decay": 0.5}
EMA = {"teacher": {"ema": {"probability": 0.7}}}
PENALISED = {"penalties": {"ewc": {"weight": 0.5}, "n_lora": {"weight": 20.0}}}
HIDDEN = {"forget": {"rmu": {"layer": 0}}, "retain": {"hidden_mse": {"layer": 0}}}
BRANCHED = {"build": branched, "retain": "nll"}
CASES: dict[str, dict[str, Any]] = {
    **{f"{rule}, views {'on' if views else 'off'}": {"build": llama, **BOTH, "conflict": rule, "views": views}
       for rule in ("sum", "pcgrad", "pcgrad_retain_first") for views in (False, True)},
    "nothing unused is looked for": {"build": llama, **BOTH, "views": True, "ddp_find_unused_parameters": False},
    "rule differs by rank": {"build": llama, **BOTH, "conflict_rule": of_this_rank},
    "idk": {"build": llama, "forget": "idk", "retain": "nll"},
    "altpo": {"build": llama, "forget": {"altpo": {"alternatives": 2}}, "retain": "nll"},
    "elm": {"build": llama, "forget": {"elm": {"eta": 2.0}}, "retain": "nll"},
    "whp": {"build": llama, "forget": {"whp": REINFORCED}, "retain": "nll"},
    "whp, adapter copy": {"build": adapted, "forget": {"whp": REINFORCED}, "retain": "nll"},
    "unused by one role": {**BRANCHED, "marked": SIZE},
    "unused by one role, views on": {**BRANCHED, "marked": SIZE, "views": True},
    "unused by one role, sum": {**BRANCHED, "marked": SIZE, "conflict": "sum"},
    "used by one micro-batch": {**BRANCHED, "marked": 1},
    "used by one micro-batch, views on": {**BRANCHED, "marked": 1, "views": True},
    "used by one micro-batch, sum": {**BRANCHED, "marked": 1, "conflict": "sum"},
    "adapter off": {"build": llama, "peft_config": LORA, **BOTH},
    "adapter copy": {"build": adapted, **BOTH, "views": True, "activation_checkpointing": True},
    # Were the frozen A matrices let go, their rank-local gradients would enter the norm that clips.
    "adapter copy, A frozen": {"build": frozen_a, **BOTH, "max_grad_norm": 0.1},
    "learn": {"build": llama, "role": "learn", "max_grad_norm": 1.0},
    "look ahead": {"build": llama, **BOTH, "lookahead": {"alpha": 0.05}, "views": True},
    "look ahead, first order": {"build": adapted, **BOTH, "lookahead": {"alpha": 0.05, "mode": "first_order", "inner": "forget"}},
    "sharpness": {"build": llama, **BOTH, "sharpness": {"rho": 0.05}, "views": True},
    "pdu": {"build": llama, **BOTH, "conflict": {"pdu": {"start": 1.0, "warmup": 0.5}}},
    "pdu from zero": {"build": llama, **BOTH, "conflict": {"pdu": {"start": 0.0, "warmup": 0.0}}, "views": True},
    "alternate": {"build": llama, **BOTH, "conflict": "alternate"},
    "saliency": {"build": llama, **BOTH, "saliency": {"train": 0.5, "trim": 0.05}, **DECAY},
    "trainable": {"build": llama, **BOTH, "trainable": ".*down_proj.*", "change_steps": 1},
    "penalties": {"build": adapted, **PENALISED, "retain": "nll", "forget": "npo", "conflict": "pcgrad"},
    "penalties, sum, views on": {"build": adapted, **PENALISED, "role": "learn", "views": True},
    "penalties, plain weights": {"build": llama, **BOTH, "penalties": {"ewc": {"weight": 0.5}}, "conflict": "sum"},
    "refusals": {"build": llama, "forget": "ce_u", "retain": {"answer_preservation": {}, "nll": {}}},
    "hidden": {"build": llama, **HIDDEN, **DECAY},
    "hidden, sum, views on": {"build": llama, **HIDDEN, **DECAY, "conflict": "sum", "views": True},
    "hidden, checkpointing": {"build": llama, **HIDDEN, "activation_checkpointing": True},
    "ema": {"build": llama, **BOTH, **EMA},
    "ema, adapter, views on": {"build": adapted, "forget": "npo", "retain": {"confident_mse": {}, "nll": {}}, **EMA, "views": True},
    "random bad teacher": {"build": llama, "forget": "bad_teacher", "retain": "kl"},
    "random bad teacher, adapter": {"build": llama, "peft_config": LORA, "forget": "bad_teacher", "retain": "nll", "gamma": 0.4},
    "sharded": {"build": sharded, **BOTH, "change_steps": 2},
    "sharded, look ahead": {"build": sharded, **BOTH, "lookahead": {"alpha": 0.05}},
    "sharded, sharpness": {"build": sharded, **BOTH, "sharpness": {"rho": 0.05}},
}  # fmt: skip


def run(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """Trains four windows, two epochs, and evaluates once."""
    options = dict(CASES[name])
    build, views, marked, role = (options.pop(key, None) for key in ("build", "views", "marked", "role"))
    data = {role: examples(SIZE, 1)} if role else two_roles(SIZE, SIZE)
    for row in data.get("forget", [])[: marked or 0]:
        row["input_ids"], row["labels"] = [MARK, *row["input_ids"]], [-100, *row["labels"]]
    saw, counts = Gradients(), []
    model = build(folder / "model") if build is sharded else build()
    if "penalties" in options:
        options["importance"] = {name: f.float() for name, f in importances(model).items()}
    trainer = make(
        model, data, folder / name.replace(" ", "_"), [Nudge(), saw], eval_dataset=examples(4, 4), max_steps=4, logging_steps=2,
        learning_rate=0.02, per_device_train_batch_size=MICRO_BATCH, per_device_eval_batch_size=4 // ranks,
        gradient_accumulation_steps=WINDOW // MICRO_BATCH // ranks, **options,
    )  # fmt: skip
    trainer.accelerator.ddp_handler.gradient_as_bucket_view = bool(views)
    of_window = trainer._get_num_items_in_batch
    trainer._get_num_items_in_batch = lambda *given: counts.append(of_window(*given)) or counts[-1]
    with patch.dict(os.environ, HF_CLMUL_CACHE=str(folder / "cache")):
        trainer.train()
    found = {
        "weights": whole(weights(trainer.model)),
        "steps": [whole(step) for step in saw.steps],
        "lines": lines(trainer),
        "counts": list(counts),
        "average": trainer.teacher_state,
        "alternatives": trainer.train_dataset.own_alternatives,
        "trainable": [key for key, p in trainer.model.named_parameters() if p.requires_grad],
    }
    return {**found, "eval_loss": trainer.evaluate()["eval_loss"]}


# ---- what only several ranks can show ------------------------------------------------------------------------------


class Told(logging.Handler):
    """Keeps what the trainer logs."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def resumed(folder: Path, **more: Any) -> dict[str, Any]:
    """Seven steps at once, and as six and one, from the middle of the second epoch; who wrote the checkpoints."""
    saved, save = [], adapters.save
    adapters.save = lambda *given: saved.append(Path(given[2]).name) or save(*given)
    options = {
        "max_steps": 7,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        **more,
    }
    build, data = partial(adapted, lora_dropout=0.2), two_roles(SIZE - 1, SIZE - 1)
    told = Told()
    trainer_log.addHandler(told)
    trainer_log.setLevel(logging.INFO)
    through = make(build(), data, folder / "through", **options)
    through.train()
    stopped = make(build(), data, folder / "stopped", [Stop(6)], **options)
    try:
        stopped.train()
    except KeyboardInterrupt:
        stopped.accelerator.wait_for_everyone()
    second = make(build(), data, folder / "stopped", **options)
    second.train(resume_from_checkpoint=True)
    adapters.save = save
    trainer_log.removeHandler(told)
    averages = [vars(t.teacher_state or EmaState()) for t in (second, through)]
    return {
        "average": same(*(state["values"] for state in averages)) and averages[0]["k"] == averages[1]["k"],
        "same": same(weights(second.model), weights(through.model)),
        "saved": saved,
        "told": told.messages,
        "lines": lines(second) == lines(through),
        "weights": weights(second.model),
    }


def collapsed(folder: Path, rank: int) -> dict[str, Any]:
    """One rank's weights break before the second step."""
    trainer = make(
        llama(),
        two_roles(SIZE, SIZE),
        folder / "collapsed",
        [Poison(float("nan"), step=1)] if rank else [],
        max_steps=3,
        per_device_train_batch_size=2,
    )
    try:
        trainer.train()
    except RunError as error:
        return {"message": str(error), "steps": trainer.state.global_step}
    return {}


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=300)
    )
    found = {name: run(name, folder, ranks=2) for name in CASES}
    found["resumed"] = resumed(folder)
    found["resumed ema"] = resumed(folder / "ema", **EMA)
    found["collapsed"] = collapsed(folder, rank)
    torch.save(found, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
