"""Sequences in slices on the fast backends, at the 7B's head sizes. The ranks are threads of this process and share its GPU.

They call the functions that autograd calls, because its engine runs one backward pass at a time on a device, and ranks wait for
each other.
"""

import pytest
import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule
from hybrid_kernels.testing import delta_rule_inputs, packed_inputs, random_positions, relative_error
from megatron_hybrid.distributed import context_parallel
from megatron_hybrid.distributed.state_passing import backward_of_slice, forward_of_slice
from testing.thread_ranks import ThreadRanks
from tests.distributed.slice_jobs import drawn, results

DEVICE = "cuda"
TOLERANCES = dict(o=6e-3, dq=8e-3, dk=8e-3, dv=8e-3, dg=2e-2, dbeta=2e-2)
"""Those of tests/gpu/test_kernels.py."""


NO_DOCUMENTS, DOCUMENTS = None, 8
"""Seeds of the documents."""


def drawn_positions(seed: int | None, batch: int, length: int) -> torch.Tensor | None:
    return None if seed is None else random_positions(batch, length, seed=seed, device=DEVICE)


def part_of(positions: torch.Tensor | None, mine: slice) -> torch.Tensor | None:
    return None if positions is None else positions[:, mine].contiguous()


def can_run(choice: Choice) -> None:
    if choice.backend == "torch":
        pytest.skip(str(choice))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("save", ["scores", "states", "inputs"])
@pytest.mark.parametrize(
    ("heads", "bounds"),
    [(30, [0, 1024, 2048]), (6, [0, 4096, 8192]), (6, [0, 512, 1000, 1536, 2048])],
    ids=["30 heads", "6 heads, in segments", "4 ranks, no multiple of a chunk"],
)
@pytest.mark.parametrize("seed", [NO_DOCUMENTS, DOCUMENTS, 3])
def test_gated_delta_rule(backend, save, heads, bounds, seed):
    positions = drawn_positions(seed, 1, bounds[-1])
    inputs = delta_rule_inputs(1, bounds[-1], heads, heads, 96, 192, dtype=torch.bfloat16, device=DEVICE, gate=-1e-3)
    try:
        can_run(explain(*inputs, backend=backend))
    except ValueError as error:
        pytest.skip(str(error))
    given = drawn([inputs[2]])[0].to(DEVICE)
    group = ThreadRanks(len(bounds) - 1)

    def rank(at: int) -> list[torch.Tensor]:
        mine = slice(bounds[at], bounds[at + 1])
        own = tuple(x[:, mine].contiguous() for x in inputs)
        documents = part_of(positions, mine)
        o, initial, kept = forward_of_slice(own, documents, 96**-0.5, save, backend, group)
        do = given[:, mine].contiguous()
        return [o, *backward_of_slice(own, documents, initial, kept, do, 96**-0.5, backend, group)]

    whole = lambda *x: gated_delta_rule(*x, positions_bs=positions, backend="torch")[:1]  # noqa: E731
    exact = results(whole, [x.double() for x in inputs], [given.double()])
    first, again = group.run(rank), group.run(rank)
    for name, parts, once_more, oracle in zip(TOLERANCES, zip(*first), zip(*again), exact):
        found = torch.cat(parts, 1)
        assert torch.equal(found, torch.cat(once_more, 1)), f"{name} differs from one run to the next"
        error = relative_error(found, oracle, floor=1e-2)
        assert error < TOLERANCES[name], (name, error)


@pytest.mark.parametrize("bounds", [[0, 1024, 2048], [0, 512, 1000, 1536, 2048]], ids=["2 ranks", "4 ranks"])
@pytest.mark.parametrize("seed", [NO_DOCUMENTS, DOCUMENTS])
def test_conv_gates_has_the_bits_of_whole_sequences(bounds, seed):
    """Compare bits of the forward pass. In the backward pass, sums over tokens are split differently."""
    from hybrid_kernels.conv_gates.backends.triton import op

    sizes = dict(num_key_heads=6, num_value_heads=6, key_head_dim=96, value_head_dim=192)
    dims, positions = [*sizes.values(), 6 * 192, 1], drawn_positions(seed, 2, bounds[-1])
    packed, *weights = packed_inputs(bounds[-1], 2, *sizes.values(), padding=4, dtype=torch.bfloat16, device=DEVICE)
    whole = lambda *x: conv_gates(*x, positions_bs=positions, backend="triton", **sizes)  # noqa: E731
    given = [x.to(DEVICE) for x in drawn(whole(packed, *weights))]
    exact = results(whole, [packed, *weights], given)
    group = ThreadRanks(len(bounds) - 1)

    def rank(at: int) -> list[torch.Tensor]:
        mine = slice(bounds[at], bounds[at + 1])
        own = packed[mine].contiguous()
        common = (own, *weights, part_of(positions, mine))
        out = op._forward(*common, dims, 2.0)
        halo = context_parallel.from_previous(own[-op.BACK :], group)
        start = op._correct_start(*common, halo, out, dims, 2.0)
        do = [x[:, mine].contiguous() for x in given]
        before = [x.clone() for x in do]
        dpacked, *others, dhalo = op._backward_with_halo(*common, start, do, None, dims, 2.0)
        dpacked[-op.BACK :] += context_parallel.from_next(dhalo, group)
        assert all(torch.equal(x, y) for x, y in zip(do, before)), "gradients that autograd may use again"
        return [*out, dpacked, *others]

    found = group.run(rank)
    for name, at in zip(("q", "k", "v", "g", "beta"), range(5)):
        assert torch.equal(torch.cat([x[at] for x in found], 1), exact[at]), name
    dpacked = torch.cat([x[5] for x in found])
    assert relative_error(dpacked, exact[5]) < 4e-3, "rounded twice at the borders of slices"
    assert relative_error(sum(x[6] for x in found), exact[6]) < 1e-2
    for at, oracle in enumerate(exact[7:]):
        assert relative_error(sum(x[7][at] for x in found), oracle) < 1e-4
