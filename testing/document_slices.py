"""Rows of documents in slices on several ranks, against each document alone: convolution with halo and delta rule, in fp64.

Rows are independent, so that one call tests as many boundary patterns as it has rows. The oracle never sees a boundary: it runs
every document in a row of its own, padded at the end, and the delta rule as a recurrence.
"""

from dataclasses import dataclass
from unittest.mock import patch

import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import reference
from hybrid_kernels.testing import packed_inputs
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.documents import positions, slice_starts
from megatron_hybrid.distributed.state_passing import gated_delta_rule_of_slices
from testing.thread_ranks import ThreadRanks

SMALL, REAL = (48, 8), (320, 64)
"""Tokens per row and per chunk of the delta rule. Slices for one, two and four ranks hold whole and partial chunks."""
SIZES = (1, 2, 4)
DIMS = dict(num_key_heads=1, num_value_heads=2, key_head_dim=3, value_head_dim=4)
NAMES = ("o", "gradient of the projection", "gradient of the taps", "gradient of A_log", "gradient of dt_bias")


@dataclass(frozen=True)
class Case:
    """Rows of documents, the mixer's inputs, the gradient of its results, and the tokens per chunk."""

    starts: torch.Tensor
    packed: torch.Tensor
    weights: list[torch.Tensor]
    do: torch.Tensor
    chunk: int

    @property
    def length(self) -> int:
        return self.starts.shape[1]


def draw(rows: int, seed: int, sizes: tuple[int, int] = SMALL) -> Case:
    """Draw a case: documents of all lengths, many of which begin next to an edge of a slice or a chunk."""
    length, chunk = sizes
    generator = torch.Generator().manual_seed(seed)
    packed, *weights = packed_inputs(length, rows, 1, 2, 3, 4, dtype=torch.float64, seed=seed)
    do = torch.randn(rows, length, 2, 4, dtype=torch.float64, generator=generator)
    return Case(draw_starts(rows, length, generator), packed, weights, do, chunk)


def draw_starts(rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw starts [rows, length] by one of five densities per row and, in half of the rows, four edges give or take 3 tokens."""
    density = torch.tensor([0.0, 2.5, 10, 30, length])[torch.randint(5, (rows, 1), generator=generator)] / length
    first = torch.rand(rows, length, generator=generator) < density
    edges = torch.randint(1, 12, (rows, 4), generator=generator) * (length // 12)
    edges = edges + torch.randint(-3, 4, (rows, 4), generator=generator)
    near = torch.zeros_like(first).scatter_(1, edges, True)
    first |= near & (torch.rand(rows, 1, generator=generator) < 0.5)
    return torch.where(first, torch.arange(length), 0).cummax(1).values.int()


def in_slices(case: Case, size: int, documents: bool = True) -> list[torch.Tensor]:
    """Return o [rows, length, ...] and the gradients of all inputs, from `size` ranks. Without `documents`, rows are one each."""
    group, length = ThreadRanks(size), case.length // size

    def rank(at: int) -> list[torch.Tensor]:
        mine = slice(at * length, (at + 1) * length)
        positions_bs = positions(*slice_starts(case.starts, at, size)) if documents else None
        leaves = [x.clone().requires_grad_() for x in (case.packed[mine], *case.weights)]
        packed, halo = with_halo(leaves[0], 3, group)
        inputs = conv_gates(packed, *leaves[1:], halo_sbw=halo, positions_bs=positions_bs, **DIMS)
        o = gated_delta_rule_of_slices(*inputs, group=group, positions_bs=positions_bs)
        return [o.detach(), *torch.autograd.grad(o, leaves, case.do[:, mine])]

    with patch.object(reference, "CHUNK", case.chunk):
        o, dpacked, *of_weights = zip(*group.run(rank), strict=True)
    return [torch.cat(o, 1), torch.cat(dpacked), *map(sum, of_weights)]


def alone(case: Case) -> list[torch.Tensor]:
    """Return the same from each document alone."""
    leaves = [x.clone().requires_grad_() for x in (case.packed, *case.weights)]
    row, begin = (case.starts == torch.arange(case.length)).nonzero(as_tuple=True)
    bounds = torch.cat((row * case.length + begin, torch.tensor([case.starts.numel()])))
    length, outs, given, o = bounds.diff(), [], [], torch.zeros_like(case.do)
    for longest in (
        2**i for i in range(case.length.bit_length() + 1)
    ):  # documents of more than half of `longest` tokens
        of_size = (length <= longest) & (length > longest // 2)
        if not of_size.any():
            continue
        token = torch.arange(longest)
        real = token < length[of_size, None]
        at = (row[of_size, None].expand_as(real), torch.where(real, begin[of_size, None] + token, 0))
        packed = leaves[0][at[1].T, at[0].T]
        out, _ = reference.gated_delta_rule_recurrent(*conv_gates(packed, *leaves[1:], **DIMS))
        outs.append(out[real]), given.append(case.do[at][real])
        o[at[0][real], at[1][real]] = out.detach()[real]
    return [o, *torch.autograd.grad(outs, leaves, given)]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> torch.Tensor:
    """Return the largest difference in each row [rows], of o and the projection's gradient, relative to the largest value."""
    of_o = (found[0] - exact[0]).abs().flatten(1).amax(1) / exact[0].abs().max()
    of_gradient = (found[1] - exact[1]).abs().amax((0, 2)) / exact[1].abs().max()
    return torch.maximum(of_o, of_gradient)


def errors_of_weights(found: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of each weight's gradient, relative to the largest value."""
    return {
        name: float((x - y).abs().max() / y.abs().max())
        for name, x, y in zip(NAMES[2:], found[2:], exact[2:], strict=True)
    }
