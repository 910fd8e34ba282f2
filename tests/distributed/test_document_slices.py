"""Documents in slices on several ranks, against each document alone. benchmarks/documents_fuzz.py tests 10,000 patterns."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from hybrid_kernels.conv_gates import conv_gates
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.documents import positions, slice_starts
from megatron_hybrid.distributed.state_passing import gated_delta_rule_of_slices
from testing.document_slices import DIMS, REAL, SIZES, SMALL, alone, draw, errors, errors_of_weights, in_slices

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def case():
    return draw(300, seed=1)


@pytest.fixture(scope="module")
def exact(case):
    return alone(case)


@pytest.mark.parametrize("size", SIZES)
def test_300_patterns(size, case, exact):
    found = in_slices(case, size)
    assert errors(found, exact).max() < TOLERANCE
    assert max(errors_of_weights(found, exact).values()) < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_a_leak_of_a_thousandth_is_found(size, case, exact):
    """Add to the exact results a thousandth of what rows without boundaries give."""
    leaking = [x + 1e-3 * (y - x) for x, y in zip(exact, in_slices(case, size, documents=False), strict=True)]
    several = (case.starts > 0).any(1)
    assert several.any() and (errors(leaking, exact)[several] > 1e6 * TOLERANCE).all()
    assert min(errors_of_weights(leaking, exact).values()) > 1e6 * TOLERANCE


@pytest.mark.parametrize("sizes", [SMALL, REAL])
def test_one_document_in_all_slices_and_a_boundary_on_every_edge(sizes):
    """Chance must not decide whether these patterns occur."""
    length = sizes[0]
    starts = torch.stack([torch.arange(length) // n * n for n in (length, 1, length // 2, length // 4, 7)]).int()
    case = replace(draw(5, 2, sizes), starts=starts)
    for size in SIZES:
        assert errors(in_slices(case, size), alone(case)).max() < TOLERANCE


def of_rank(case):
    """Return o and the gradient of the projection on one of several gloo ranks."""
    size, rank = dist.get_world_size(), dist.get_rank()
    mine = slice(case.length // size * rank, case.length // size * (rank + 1))
    positions_bs = positions(*slice_starts(case.starts, rank, size))
    leaf = case.packed[mine].clone().requires_grad_()
    packed, halo = with_halo(leaf, 3, dist.group.WORLD)
    inputs = conv_gates(packed, *case.weights, halo_sbw=halo, positions_bs=positions_bs, **DIMS)
    o = gated_delta_rule_of_slices(*inputs, group=dist.group.WORLD, positions_bs=positions_bs)
    return o.detach(), *torch.autograd.grad(o, leaf, case.do[:, mine])


@pytest.mark.parametrize("size", [2, 4])
def test_over_gloo(size, ranks):
    case = draw(30, seed=3)
    o, dpacked = zip(*ranks.run(of_rank, size, case=case), strict=True)
    assert errors([torch.cat(o, 1), torch.cat(dpacked)], alone(case)).max() < TOLERANCE
