"""Models and hyperparameters of the ladder: three architectures per size, with equal parameters and the paper's formulas.

The formulas are those of arXiv 2604.03444, section 4.1. Their N is the transformer's, so that all architectures of a size train on the
same batches with the same learning rates.
"""

from dataclasses import dataclass
from functools import cache
from math import isqrt

from law import CHINCHILLA

from megatron_hybrid.arch.flops import parameters_by_part, training_flops_per_token
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.base.errors import UserError

ARCHITECTURES = ("transformer", "hybrid", "gdn")
PATTERNS = {"transformer": "A", "hybrid": "GGGA", "gdn": "G"}
"""Groups of layers that are repeated. The hybrid's last layer is attention."""
KEY_HEAD_DIM = 128
"""Default width of the keys of Gated DeltaNet. The paper's formula gives it at all of the paper's sizes."""
FFN_UNIT = 16
"""The FFN's width is a multiple of this."""
TOLERANCE = 0.01
"""Largest difference between the parameters of a size's architectures, as a share, from a width of 256 on."""
REFERENCE = 108e6
"""Parameters to which the formulas of batch and learning rate refer."""
REFERENCE_BATCH, REFERENCE_RATE = 2048 * 160, 0.00235
DECAY = 0.05
"""Share of the steps up to an endpoint in which the learning rate falls to 0."""
BATCH_UNIT, MOST_MICRO_BATCH = 8, 64
"""The global batch is a multiple of BATCH_UNIT sequences, and the micro-batch at most MOST_MICRO_BATCH."""


@dataclass(frozen=True)
class Size:
    """Sizes that all architectures share, written `hidden/heads/layers`."""

    hidden: int
    heads: int
    layers: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Return the size of a text such as 384/6/8.

        Raises:
            UserError: three numbers of another form.
        """
        parts = text.split("/")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(f"--sizes: {text} is not hidden size, heads and layers; write 384/6/8, for example")
        size = cls(*map(int, parts))
        if size.layers % len(PATTERNS["hybrid"]):
            raise UserError(f"--sizes: {text}: the hybrid needs a multiple of 4 layers, not {size.layers}")
        if size.hidden % (2 * size.heads):
            raise UserError(f"--sizes: {text}: {size.hidden} does not divide into {size.heads} heads of even width")
        return size

    def __str__(self) -> str:
        return f"{self.hidden}/{self.heads}/{self.layers}"


SIZES = tuple(map(Size.parse, ("256/4/4", "320/5/4", "384/6/4", "384/6/8", "512/8/8", "640/10/8")))
"""4, 7, 9, 19, 34 and 52 million parameters without embeddings and output layer, with heads of 64 channels."""


@cache
def make_model(size: Size, architecture: str, vocab_size: int, key_head_dim: int = KEY_HEAD_DIM) -> ModelConfig:
    """Return a model.

    The transformer's FFN is four times as wide as the model. The FFN of the others is narrower, because their mixers are larger.
    Gated DeltaNet has three quarters as many heads as attention, and values twice as wide as keys.

    Args:
        key_head_dim: width of the keys of Gated DeltaNet.

    Raises:
        UserError: the mixers alone have more parameters than the transformer.
    """
    if architecture == "transformer":
        return _model(size, architecture, vocab_size, 4 * size.hidden, key_head_dim)
    goal = body_parameters(make_model(size, "transformer", vocab_size))
    low, high = (body_parameters(_model(size, architecture, vocab_size, FFN_UNIT * k, key_head_dim)) for k in (1, 2))
    units = 1 + round((goal - low) / (high - low))
    if units < 1:
        raise UserError(
            f"--key-head-dim: {key_head_dim}: the {architecture} of size {size} without FFN has more parameters than "
            f"the transformer's {goal:,}; give narrower keys or a larger size"
        )
    return _model(size, architecture, vocab_size, FFN_UNIT * units, key_head_dim)


def _model(size: Size, architecture: str, vocab_size: int, ffn: int, key_head_dim: int) -> ModelConfig:
    pattern = PATTERNS[architecture]
    heads = max(1, round(0.75 * size.heads))
    gdn = dict(num_key_heads=heads, num_value_heads=heads, key_head_dim=key_head_dim, value_head_dim=2 * key_head_dim)
    return ModelConfig(
        layer_pattern=pattern * (size.layers // len(pattern)),
        hidden_size=size.hidden,
        ffn_hidden_size=ffn,
        vocab_size=vocab_size,
        num_attention_heads=size.heads,
        gdn=None if architecture == "transformer" else gdn,
    )


def body_parameters(model: ModelConfig) -> int:
    """Return N, the parameters without embeddings and output layer."""
    parts = parameters_by_part(model)
    return sum(parts.values()) - parts["embedding"] - parts["output"]


@dataclass(frozen=True)
class Plan:
    """Hyperparameters of the runs of a size."""

    batch: int
    """Sequences per step."""
    micro_batch: int
    learning_rate: float
    warmup_steps: int
    endpoints: tuple[int, ...]
    """Steps at which the token budgets end, in ascending order."""
    sequence_length: int

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.sequence_length


def make_plan(parameters: int, budgets: tuple[float, ...], sequence_length: int) -> Plan:
    """Return the hyperparameters of a size.

    Args:
        parameters: N of the size's transformer.
        budgets: token budgets as multiples of 20 tokens per parameter.

    Raises:
        UserError: budgets that are not positive and distinct, or so small that they end in the warm-up.
    """
    if not budgets or min(budgets) <= 0 or len(set(budgets)) < len(budgets):
        raise UserError(f"--budgets: {' '.join(map(str, budgets))}: give distinct positive multiples, such as 0.5 1 2")
    share = parameters / REFERENCE
    sequences = REFERENCE_BATCH * share ** (2 / 3) / sequence_length
    batch = max(BATCH_UNIT, BATCH_UNIT * round(sequences / BATCH_UNIT))
    tokens = batch * sequence_length
    warmup = max(1, round(parameters / tokens))
    endpoints = tuple(max(1, round(budget * CHINCHILLA * parameters / tokens)) for budget in sorted(budgets))
    if endpoints[0] <= warmup / (1 - DECAY):
        raise UserError(
            f"--budgets: {min(budgets)} ends after {endpoints[0]} steps, in the warm-up of {warmup}; give at least 0.1"
        )
    return Plan(batch, _micro_batch(batch), REFERENCE_RATE * share ** (-1 / 3), warmup, endpoints, sequence_length)


def _micro_batch(batch: int) -> int:
    """Return the largest divisor of the batch up to MOST_MICRO_BATCH."""
    divisors = {d for low in range(1, isqrt(batch) + 1) if batch % low == 0 for d in (low, batch // low)}
    return max(d for d in divisors if d <= MOST_MICRO_BATCH)


def training_flops(model: ModelConfig, tokens: int, sequence_length: int) -> int:
    """Return the FLOPs of a training run: GEMMs, attention and recurrence, with the output layer (arch/flops.py)."""
    return tokens * training_flops_per_token(model, sequence_length)
