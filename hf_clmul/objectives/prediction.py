"""What a family predicts on one role's batch and every term consumes: `Prediction` of language, `Denoised` of images. It knows
no model class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Top:
    """Distributions at N positions by their k most likely tokens: `ids` [N, k], log-probabilities `logps` [N, k] and that of
    all other tokens together, `tail` [N], in nats (-inf: none)."""

    ids: "Tensor"
    logps: "Tensor"
    tail: "Tensor"


@dataclass(frozen=True)
class Prediction:
    """Outputs at the N supervised positions of a batch of B sequences. Nothing of prompts or padding is in
    it.

    `rows` [N], ascending, gives the sequence of each position; `logps` [N] are log-probabilities of the right
    tokens in nats; `logits` [N, V] in float32; `targets` [N] the right tokens; `hidden` {layer: [N, H]} in
    float32, what the layer puts out where the token is predicted, keyed as terms name the layer. Each is None
    unless a term asked for it. `alternative` holds the same, less hidden states, for a second answer to the
    same prompts (a refusal), where a term asked for one. `variants` are of a teacher only: what it says at the same
    N positions in another context, or after other training, by name; so is `top`, what one once said and was stored. `classes`
    [B], numbers of the sequences' classes, -1 for one that has none, is None where no sequence of the batch has one.
    """

    rows: "Tensor"
    batch_size: int
    logps: Optional["Tensor"] = None
    logits: Optional["Tensor"] = None
    alternative: Optional["Prediction"] = None
    targets: Optional["Tensor"] = None
    hidden: Mapping[float, "Tensor"] | None = None
    variants: Mapping[str, "Prediction"] | None = None
    classes: Optional["Tensor"] = None
    top: Top | None = None

    @property
    def tokens(self) -> int:
        """Number of supervised positions N."""
        return self.rows.numel()

    def sequence_logps(self) -> "Tensor":
        """Log-probability of each sequence's supervised tokens, summed: [B], nats."""
        return self.logps.new_zeros(self.batch_size).index_add(0, self.rows, self.logps)

    def sequence_lengths(self) -> "Tensor":
        """Number of supervised tokens of each sequence: [B], int64."""
        return self.rows.new_zeros(self.batch_size).index_add(0, self.rows, self.rows.new_ones(self.tokens))

    def places(self) -> "Tensor":
        """Place of each supervised token among those of its sequence, from 0: [N], int64."""
        lengths = self.sequence_lengths()
        starts = lengths.cumsum(0) - lengths
        return self.rows.new_ones(self.tokens).cumsum(0) - 1 - starts[self.rows]


@dataclass(frozen=True)
class Denoised:
    """Raw outputs of a denoiser for a batch of B noisy samples, each at its own time: noise, v, sample or velocity, whatever
    the network predicts, in float32.

    `output` [B, ...] is under each sample's own prompt; `target` [B, ...] what the data say it should be, in the same
    parameterisation; `weights` [B] the weight of the denoising loss at these times, without a unit. `variants` {name:
    [B, ...]} are outputs at the same noisy samples and times under other prompts: "empty", the unconditional one, and
    "anchor", what takes the concept's place. `attention` [B], in [0, 1], is the part of the cross-attention that goes to the
    concept's tokens, its mean over layers, heads and positions. `partner` is the same for a second image of each pair, under
    the same prompt; `apartness` [B], without a unit, how much each sample counts by how far its prompt is from the
    concept's. Each of the last four is None unless a term asked for it.
    """

    output: "Tensor"
    target: "Tensor"
    weights: "Tensor"
    variants: Mapping[str, "Tensor"] | None = None
    attention: Optional["Tensor"] = None
    partner: Optional["Denoised"] = None
    apartness: Optional["Tensor"] = None

    @property
    def batch_size(self) -> int:
        """Number of samples B."""
        return len(self.output)
