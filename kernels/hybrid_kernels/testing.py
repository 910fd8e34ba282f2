"""What kernel tests and benchmarks share: inputs, random and hard in known ways, and the error they are judged by."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


def relative_error(ours: torch.Tensor, exact: torch.Tensor, floor: float = 1e-30) -> float:
    """||ours - exact|| / ||exact||; NaN where either holds one.

    `floor`: the least root mean square of `exact` that counts. Under a decay of e^-50 dg is 1e-22 of what it is
    the difference of, and only its absolute size can be right.
    """
    ours, exact = ours.double(), exact.to(ours.device).double()
    least = floor * exact.numel() ** 0.5
    return ((ours - exact).norm() / exact.norm().clamp(min=least)).item()


def delta_rule_inputs(
    batch, length, key_heads, heads, key_dim, value_dim, *, dtype=torch.float32, device="cpu", gate=None,
    cosine=None, beta=None, seed=0,
):  # fmt: skip
    """q, k [b, s, Hk, dk] of unit norm, v [b, s, H, dv] in `dtype`; g, beta [b, s, H] in fp32 (fp64 for fp64).

    `cosine`: how alike two keys are; `gate`: a fixed log decay; `beta`: a fixed one. Otherwise drawn as training
    draws them: g from A in (0, 16) and dt in [1e-3, 0.1], beta uniform in (0, 2).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
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


HARD_CASES = {
    f"beta {'U(0,2)' if beta is None else beta}, cosine {cosine:g}, gate {gate:g}": dict(
        beta=beta, cosine=cosine, gate=gate
    )
    for beta in (None, 1.99)
    for cosine in (0.0, 0.5, 0.9, 1.0)
    for gate in (0.0, -1e-3, -50.0)
}
"""Options of `delta_rule_inputs` under which a delta rule's arithmetic is hard, by what a table calls them."""


def packed_inputs(
    length, batch, key_heads, heads, key_dim, value_dim, *, padding=3, dtype=torch.float32, device="cpu", seed=0
):
    """packed [s, b, W], conv_weight [C, 4], A_log, dt_bias [H] (fp32, or fp64 for fp64), as `conv_gates` takes them."""
    generator = torch.Generator().manual_seed(seed)
    channels = 2 * key_heads * key_dim + heads * value_dim
    width = channels + heads * value_dim + 2 * heads + padding
    packed = torch.randn(length, batch, width, generator=generator, dtype=torch.float64)
    weight = 0.5 * torch.randn(channels, 4, generator=generator, dtype=torch.float64)
    A_log = torch.log(16 * torch.rand(heads, generator=generator, dtype=torch.float64) + 1e-3)
    dt_bias = torch.randn(heads, generator=generator, dtype=torch.float64) - 3
    gates = torch.float64 if dtype == torch.float64 else torch.float32
    return [packed.to(device, dtype), weight.to(device, dtype), A_log.to(device, gates), dt_bias.to(device, gates)]


def loss_inputs(shape, hidden_size, rows, vocab_size, *, dtype=torch.float32, device="cpu", spread=1.0, seed=0):
    """hidden [*shape, h], weight [rows, h], labels and loss_mask [*shape], as `linear_cross_entropy` takes them.

    Labels are among the first `vocab_size` rows, the first token's the last of them; a few tokens are masked, one of
    them with the label -100. `spread`: the standard deviation of the logits.
    """
    drawn = dict(generator=torch.Generator(device).manual_seed(seed), device=device)  # there: weights may be large
    hidden = torch.randn(*shape, hidden_size, dtype=torch.float64, **drawn)
    weight = torch.randn(rows, hidden_size, dtype=torch.float64, **drawn) * spread / hidden_size**0.5
    labels = torch.randint(0, vocab_size, shape, **drawn)
    mask = (torch.rand(shape, **drawn) > 0.2).float()
    labels.view(-1)[0], labels.view(-1)[-1], mask.view(-1)[-1] = vocab_size - 1, -100, 0.0
    return hidden.to(dtype), weight.to(dtype), labels, mask


def qkv_inputs(length, batch, heads, groups, head_dim, *, dtype=torch.float32, device="cpu", seed=0):
    """qkv [s, b, (heads + 2 groups) d], q_weight, k_weight in `dtype` and angles [s, 1, 1, d], for `qk_norm_rope`."""
    drawn = dict(generator=torch.Generator(device).manual_seed(seed), device=device, dtype=torch.float64)
    widths = heads * head_dim, groups * head_dim
    qkv = 3 * torch.randn(length, batch, widths[0] + 2 * widths[1], **drawn)
    weights = [1 + 0.2 * torch.randn(width, **drawn) for width in widths]
    frequency = 500_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    angles = torch.outer(torch.arange(length).float(), frequency)
    angles = torch.cat((angles, angles), -1)[:, None, None].to(device)
    return qkv.to(dtype), *(weight.to(dtype) for weight in weights), angles


class MirrorGroup:
    """A process group of two of which this process is the first, and the second holds what this one holds."""

    def rank(self):
        return 0

    def size(self):
        return 2


@contextmanager
def mirrored(collectives):
    """Within it, `collectives` (torch.distributed) answers a MirrorGroup without a second process.

    all_reduce: both give the same. all_gather_into_tensor of `linear_cross_entropy`'s [3, n]: the second rank's logits
    are the same, and no label is among them.
    """

    def gather(out, mine, group):
        first, second = out.view(2, *mine.shape)
        first.copy_(mine), second.copy_(mine), second[2].zero_()

    real = collectives.all_reduce, collectives.all_gather_into_tensor
    collectives.all_reduce, collectives.all_gather_into_tensor = (lambda x, group: x.mul_(2)), gather
    try:
        yield MirrorGroup()
    finally:
        collectives.all_reduce, collectives.all_gather_into_tensor = real
