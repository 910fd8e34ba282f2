"""Inputs and error measure that kernel tests and benchmarks share, and collectives of ranks that exist only in a test."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from hybrid_kernels.collectives import VocabParallel


def relative_error(ours: torch.Tensor, exact: torch.Tensor, floor: float = 1e-30) -> float:
    """Return ||ours - exact|| / ||exact||; NaN if either holds one.

    `floor` is the least root mean square of `exact` to divide by. Under a decay of e^-50, dg is a difference of terms 1e22 times
    its size, so only its absolute error is meaningful.
    """
    ours, exact = ours.double(), exact.to(ours.device).double()
    least = floor * exact.numel() ** 0.5
    error: float = ((ours - exact).norm() / exact.norm().clamp(min=least)).item()
    return error


def delta_rule_inputs(
    batch: int,
    length: int,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gate: float | None = None,
    cosine: float | None = None,
    beta: float | None = None,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Draw q, k [b, s, Hk, K] of unit norm and v [b, s, H, V] in `dtype`; g, beta [b, s, H] in fp32 (fp64 for fp64).

    Args:
        gate: fixed log decay. None: as in training, from A in (0, 16) and dt in [1e-3, 0.1].
        cosine: cosine between any two keys. None: random keys.
        beta: fixed beta. None: uniform in (0, 2).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(normal(batch, length, key_heads, key_dim), dim=-1) for _ in range(2))
    if cosine is not None:
        shared = F.normalize(normal(1, 1, key_heads, key_dim), dim=-1)
        k = F.normalize(cosine**0.5 * shared + (1 - cosine) ** 0.5 * k, dim=-1)
    v = normal(batch, length, heads, value_dim)
    shape = (batch, length, heads)
    A, dt = 16 * uniform(heads), 1e-3 * 100 ** uniform(heads)
    g = -A * F.softplus(normal(*shape) + torch.log(torch.expm1(dt))) if gate is None else torch.full(shape, gate)
    b = 2 * uniform(*shape) if beta is None else torch.full(shape, beta)
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return [x.to(device, dtype) for x in (q, k, v)] + [x.to(device, gates) for x in (g, b)]


def kda_inputs(
    batch: int, length: int, key_heads: int, heads: int, key_dim: int, value_dim: int, *, gate: float | None = None,
    seed: int = 0, **options: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Draw q, k, v, g and beta as `delta_rule_inputs` does, with a decay per channel: g is [b, s, H, K].

    Args:
        gate: fixed log decay. None: as in training, from A in (1, 16) and dt in [1e-3, 0.1].
        options: others of `delta_rule_inputs`.
    """
    q, k, v, g, beta = delta_rule_inputs(
        batch, length, key_heads, heads, key_dim, value_dim, gate=gate, seed=seed, **options
    )
    generator = torch.Generator().manual_seed(seed + 1000)
    shape = (batch, length, heads, key_dim)
    dt = 1e-3 * 100 ** torch.rand(heads, key_dim, generator=generator, dtype=torch.float64)
    A = 1 + 15 * torch.rand(heads, 1, generator=generator, dtype=torch.float64)
    drawn = -A * F.softplus(torch.randn(shape, generator=generator, dtype=torch.float64) + torch.log(torch.expm1(dt)))
    per_channel = drawn if gate is None else torch.full(shape, gate)
    return [q, k, v, per_channel.to(g), beta]


HARD_CASES = {
    f"beta {'U(0,2)' if beta is None else beta}, cosine {cosine:g}, gate {gate:g}": dict(
        beta=beta, cosine=cosine, gate=gate
    )
    for beta in (None, 1.99)
    for cosine in (0.0, 0.5, 0.9, 1.0)
    for gate in (0.0, -1e-3, -50.0)
}
"""Options of `delta_rule_inputs` that are hard for a delta rule's arithmetic, by their names in tables."""


def packed_inputs(
    length: int,
    batch: int,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    padding: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[torch.Tensor]:
    """Draw packed_sbw, weight_ct with 4 taps, A_log and dt_bias [H] (fp32, or fp64 for fp64), as `conv_gates` takes them."""
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * key_heads * key_dim + heads * value_dim
    width = channels + heads * value_dim + 2 * heads + padding
    packed = torch.randn(length, batch, width, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(channels, 4, generator=generator, dtype=torch.float64)
    A_log = torch.log(16 * torch.rand(heads, generator=generator, dtype=torch.float64) + 1e-3)
    dt_bias = torch.randn(heads, generator=generator, dtype=torch.float64) - 3
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return [packed.to(device, dtype), weight.to(device, dtype), A_log.to(device, gates), dt_bias.to(device, gates)]


def random_positions(batch: int, length: int, *, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Draw positions_bs: rows of documents of all lengths, from one token to the whole row, some of which began before the row."""
    generator = torch.Generator().manual_seed(seed)
    density = torch.tensor([0.0, 0.02, 0.1, 0.5, 1.0])[torch.randint(5, (batch, 1), generator=generator)]
    first = torch.rand(batch, length, generator=generator) < density
    token = torch.arange(length)
    before = torch.randint(3, (batch, 1), generator=generator) * torch.randint(100, (batch, 1), generator=generator)
    begin = torch.where(first, token, -before).cummax(1).values
    return (token - begin).to(device, torch.int32)


def loss_inputs(
    shape: Sequence[int],
    hidden_size: int,
    rows: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    spread: float = 1.0,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw hidden [*shape, h], weight [rows, h], labels and loss_mask [*shape], as `linear_cross_entropy` takes them.

    Labels are among the first `vocab_size` rows; the first token's label is the last of them. A few tokens are masked, one of
    them with the label -100. `spread` is the standard deviation of the logits.
    """
    # on the device, because weights may be large
    drawn: dict[str, Any] = dict(generator=torch.Generator(device).manual_seed(seed), device=device)
    hidden = torch.randn(*shape, hidden_size, dtype=torch.float64, **drawn)
    weight = torch.randn(rows, hidden_size, dtype=torch.float64, **drawn) * spread / hidden_size**0.5
    labels = torch.randint(0, vocab_size, shape, **drawn)
    mask = (torch.rand(shape, **drawn) > 0.2).float()
    labels.view(-1)[0], labels.view(-1)[-1], mask.view(-1)[-1] = vocab_size - 1, -100, 0.0
    return hidden.to(dtype), weight.to(dtype), labels, mask


def qkv_inputs(
    length: int,
    batch: int,
    heads: int,
    groups: int,
    head_dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw qkv_sbw, q_weight and k_weight in `dtype`, and angles_sb1d [s, 1, 1, d], as `qk_norm_rope` takes them."""
    drawn: dict[str, Any] = dict(
        generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float64
    )
    widths = heads * head_dim, groups * head_dim
    qkv = 3 * torch.randn(length, batch, widths[0] + 2 * widths[1], **drawn)
    weights = [1 + 0.2 * torch.randn(width, **drawn) for width in widths]
    frequency = 500_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.outer(torch.arange(length).float(), frequency)
    angles = torch.cat((angles, angles), -1)[:, None, None].to(device)
    return qkv.to(dtype), weights[0].to(dtype), weights[1].to(dtype), angles


def angles_of_sequences(angles_s11d: torch.Tensor, positions_bs: torch.Tensor) -> torch.Tensor:
    """Return angles [s, b, 1, d] at positions that restart per document, from those of positions 0 to s."""
    return angles_s11d[:, 0, 0][positions_bs.T.long()].unsqueeze(2)


def mirror_all_reduce(x: torch.Tensor) -> None:
    """Sum over two ranks, of which the second holds what this one holds."""
    x.mul_(2)


def mirror_vocab_parallel() -> VocabParallel:
    """First of two ranks that share a vocabulary. The second has the same logits, and none of the labels.

    Only `all_gather` works, and only on what Triton's `linear_cross_entropy` gathers: [3, n], with the label's logit last.
    """

    def refuse(x: torch.Tensor) -> None:
        raise NotImplementedError("a mirror gathers; it does not reduce")

    def all_gather(out: torch.Tensor, x: torch.Tensor) -> None:
        first, second = out.view(2, *x.shape)
        first.copy_(x), second.copy_(x), second[2].zero_()

    return VocabParallel(0, 2, refuse, refuse, all_gather)
