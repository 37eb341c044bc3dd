"""Plain fine-tuning of a language model, as an attacker does it: AdamW on the answers, every weight, no schedule, no tricks. It
knows models and examples; nothing of attacks or of what is measured."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from hf_clmul.data.collation import RoleCollator
from hf_clmul.data.encoding import encode
from hf_clmul.data.roles import permutation
from hf_clmul.evaluation.audit.protocol import Example, Stopped
from hf_clmul.models import causal_lm
from hf_clmul.training.role_data import pad_token_id


def fine_tuned(
    model: Any, tokenizer: Any, examples: Sequence[Example], seed: int, steps: int, learning_rate: float,
    batch_size: int, max_length: int | None = None,
) -> Iterator[int]:  # fmt: skip
    """Trains `model` in place and yields the number of steps after each, so that it can be measured on the way.

    Mean negative log-likelihood of the answers' tokens (nats), constant learning rate, no weight decay, no dropout: the same
    seed gives the same weights. Weights are trained in float32, whatever they were loaded in: bfloat16 rounds small steps
    away. An epoch is a permutation of the examples; its last batch may be smaller.

    Raises Stopped for a loss that is no number.
    """
    model.float().eval().requires_grad_(True)
    encoded = [encode(example, tokenizer, max_length) for example in examples]
    collator, accepted = RoleCollator(pad_token_id(tokenizer)), causal_lm.accepted_inputs(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    device = next(model.parameters()).device
    batches = _batches(len(encoded), batch_size, seed)
    for step in tqdm(range(1, steps + 1), desc="fine-tuning", leave=False):
        batch = send_to_device(collator([encoded[i] for i in next(batches)]), device)
        with torch.enable_grad():
            loss = -causal_lm.predict(model, batch, frozenset({"logps"}), accepted).logps.mean()
            if not bool(torch.isfinite(loss)):
                raise Stopped(
                    f"the fine-tuning diverged at step {step}, where its loss is {loss.item()}; take a smaller learning_rate"
                )
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield step


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of the examples, one epoch after the other, without end."""
    epoch = 0
    while True:
        order = permutation(count, seed, f"audit/{epoch}").tolist()
        yield from (order[start : start + size] for start in range(0, count, size))
        epoch += 1
