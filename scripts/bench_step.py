"""What one optimizer step costs under each conflict rule and with LUR, as ratios to a plain joint step, with peak memory.

    python scripts/bench_step.py                    a Llama of 100 M parameters, all weights trained (about 15 minutes)
    python scripts/bench_step.py --small            a few M parameters, to try the script

A plain joint step is one forward and backward over the 2 x BATCH sequences of both roles together, then AdamW. CPU time of the
process, one thread, median over steps; every variant runs in a process of its own, so that its peak memory is its own, and
the variants take turns over rounds. It holds no library logic.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median
from typing import Any

BATCH, LENGTH = 4, 256
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain joint step": None,
    "sum": {"conflict": "sum"},
    "pcgrad_retain_first": {"conflict": "pcgrad_retain_first"},
    "mgda": {"conflict": "mgda"},
    "upgrad": {"conflict": "upgrad"},
    "cagrad": {"conflict": "cagrad"},
    "aligned_mtl": {"conflict": "aligned_mtl"},
    "gru": {"conflict": "gru"},
    "sago": {"conflict": "sago"},
    "pdu": {"conflict": "pdu"},
    "lur first_order": {"conflict": "sum", "lookahead": {"mode": "first_order", "alpha": 1e-3}},
    "lur cross": {"conflict": "sum", "lookahead": {"mode": "cross", "alpha": 1e-3}},
    "lur cross, pcgrad_retain_first": {
        "conflict": "pcgrad_retain_first",
        "lookahead": {"mode": "cross", "alpha": 1e-3},
    },
}
SIZES = {"100M": {"hidden_size": 640, "layers": 12}, "small": {"hidden_size": 64, "layers": 2}}


def one(variant: str, size: str, steps: int) -> dict[str, float]:
    """{"seconds": median CPU time of a step, "gib": peak memory} of a variant, in this process."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    from hf_clmul.trainer import ClmulTrainer
    from hf_clmul.training_args import ClmulConfig

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds.append(time.process_time() - self.began)

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = SIZES[size]["hidden_size"]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=SIZES[size]["layers"],
        num_attention_heads=width // 64, max_position_embeddings=LENGTH, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def rows(count: int) -> list[dict[str, list[int]]]:
        tokens = torch.randint(4, 32000, (count, LENGTH)).tolist()
        return [{"input_ids": ids, "labels": ids} for ids in tokens]

    options, count = VARIANTS[variant], BATCH * (steps + 1)
    data = {"learn": rows(2 * count)} if options is None else {"forget": rows(count), "retain": rows(count)}
    terms = {} if options is None else {"forget": "grad_ascent", "retain": "nll"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<e>": 0}, "<e>")), eos_token="<e>")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = ClmulConfig(
            folder, per_device_train_batch_size=2 * BATCH if options is None else BATCH, num_train_epochs=1, use_cpu=True,
            report_to="none", disable_tqdm=True, save_strategy="no", learning_rate=1e-5, dataloader_pin_memory=False,
            **terms, **(options or {}),
        )  # fmt: skip
        ClmulTrainer(model, args, train_dataset=data, processing_class=tokenizer, callbacks=[clock]).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": median(clock.seconds[1:]), "gib": peak, "parameters": parameters}  # the first step allocates


def apart(variant: str, size: str, steps: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--one",
        variant,
        "--steps",
        str(steps),
        *(["--small"] if size == "small" else []),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each process")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    size = "small" if wanted.small else "100M"
    if wanted.one:
        print(json.dumps(one(wanted.one, size, wanted.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in ["plain joint step", *wanted.variants]}
    for _ in range(wanted.rounds):
        for variant, results in found.items():
            results.append(apart(variant, size, wanted.steps))
    base = found["plain joint step"]
    print(
        f"{base[0]['parameters'] / 1e6:.0f} M parameters, {BATCH} + {BATCH} sequences of {LENGTH} tokens, float32, AdamW\n"
    )
    print("| variant | CPU time / plain joint step | single rounds | peak memory, GiB |\n|---|---|---|---|")
    for variant, results in found.items():
        ratios = [r["seconds"] / b["seconds"] for r, b in zip(results, base, strict=True)]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"| {variant} | {median(ratios):.2f} | {each} | {max(r['gib'] for r in results):.2f} |")


if __name__ == "__main__":
    main()
