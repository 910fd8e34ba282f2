"""prepare.cu on the CPU (cuda_on_cpu.h) against its formulas in fp64, and the compiler's report on it."""

import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks  # noqa: E402
from hybrid_kernels.nvcc import find_nvcc  # noqa: E402
from hybrid_kernels.testing import delta_rule_inputs, random_positions, relative_error  # noqa: E402
from tests.kernels.cuda_sources import assembler_says, shared_builds  # noqa: E402
from tests.kernels.kernels_on_cpu import PREPARE, calls_on_cpu  # noqa: E402


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return calls_on_cpu(shared_builds(tmp_path_factory))


def exact(q, k, g, beta, scale, positions=None) -> tuple[torch.Tensor, ...]:
    """Return A, P and G as backends/triton/prepare.py defines them."""
    length, heads = q.shape[1], g.shape[2]

    def chunked(x):
        x = x.double().repeat_interleave(heads // x.shape[2], 2)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % 64))
        return x.reshape(-1, 64, *x.shape[2:]).transpose(1, 2)

    q, k, g, beta = map(chunked, (q, k, g, beta.clamp(min=2**-20)))
    token, padding = torch.arange(64), -length % 64
    unseen = torch.ones(64, 64, dtype=torch.bool).triu(1)
    if positions is not None:
        positions = torch.cat((positions, positions[:, -1:] + torch.arange(1, padding + 1)), 1).reshape(-1, 1, 64)
        unseen = unseen | (token[:, None] - token > positions[..., None])
        g = g.masked_fill(positions == 0, 0)
    G = g[..., None, :].masked_fill(unseen, 0).sum(-1)
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(unseen, float("-inf")).exp()
    N = (beta[..., None] * (k @ k.mT) * decay).tril(-1)
    A = torch.linalg.solve_triangular(torch.eye(64).double() + N, torch.diag_embed(beta), upper=False)
    if positions is not None:
        from_start = G.masked_fill(positions <= token, float("-inf"))
        to_end = (G[..., -1:] - G).masked_fill(unseen[..., -1, :], float("-inf"))
        G = torch.stack((G, from_start, to_end), 2)
    return A, q @ k.mT * decay * scale, G / torch.log(torch.tensor(2.0).double())


@pytest.mark.parametrize(
    "shape, hard",
    [
        ((1, 1, 1, 1), {}),
        ((1, 64, 2, 2), {}),
        ((2, 100, 1, 2), {}),
        ((1, 130, 1, 1), dict(cosine=1.0, beta=1.99, gate=-1e-3)),
        ((1, 64, 1, 1), dict(cosine=0.9, beta=1.99)),
        ((1, 64, 1, 1), dict(gate=-50.0)),
        ((1, 64, 1, 1), dict(beta=0.0)),
    ],
    ids=str,
)
def test_its_results(on_cpu, shape, hard, monkeypatch):
    monkeypatch.setattr(cuda_op, "_call", on_cpu)
    q, k, v, g, beta = delta_rule_inputs(*shape, 96, 192, dtype=torch.bfloat16, **hard)
    found, truth = cuda_op.prepare(q, k, g, beta, 0.1, Chunks.of(v, None), False), exact(q, k, g, beta, 0.1)
    for name, tolerance, x in zip("APG", (4e-4, 3e-3, 1e-6), truth):
        assert relative_error(getattr(found, name), x) < tolerance, name
    assert (found.A.triu(1) == 0).all()
    assert (found.P.triu(1) == 0).all()
    check_diagonal(found, shape, beta)


@pytest.mark.parametrize("batch, length, seed", [(8, 64, 0), (4, 100, 1), (3, 65, 2)])
def test_its_results_with_documents(on_cpu, batch, length, seed, monkeypatch):
    monkeypatch.setattr(cuda_op, "_call", on_cpu)
    q, k, v, g, beta = delta_rule_inputs(batch, length, 1, 2, 96, 192, dtype=torch.bfloat16)
    positions = random_positions(batch, length, seed=seed)
    chunks = Chunks.of(v, None, positions=positions)
    found, truth = cuda_op.prepare(q, k, g, beta, 0.1, chunks, False), exact(q, k, g, beta, 0.1, positions)
    for name, tolerance, x in zip("APG", (4e-4, 3e-3, 1e-6), truth):
        mine, unseen = getattr(found, name).double(), (x == 0) if name != "G" else x.isinf()
        assert torch.equal(mine[unseen], x[unseen]), f"{name}: what is not seen is exactly zero"
        assert relative_error(mine[~unseen], x[~unseen]) < tolerance, name
    check_diagonal(found, (batch, length), beta)


def check_diagonal(found, shape, beta):
    diagonal = found.A.diagonal(dim1=-2, dim2=-1)[0, :, : shape[1]]
    assert torch.equal(diagonal, beta[0, :64].T.clamp(min=2**-20).half()), "the backward pass divides by its square"


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_many_blocks_fit_an_sm(tmp_path):
    said = assembler_says(tmp_path, PREPARE)
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= 72  # of 65,536
    assert int(re.search(r"(\d+) bytes smem", said)[1]) <= 32 * 1024  # of 227 KiB
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 64  # around the substitution's loops, not inside
