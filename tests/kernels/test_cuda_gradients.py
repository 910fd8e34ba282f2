"""hopper_gradients.cu on the CPU (cuda_on_cpu.h) against its formulas in fp64, and what the compiler says of it."""

import ctypes
import re

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from hybrid_kernels.gated_delta_rule import cuda_op  # noqa: E402
from hybrid_kernels.testing import relative_error  # noqa: E402
from tests.kernels.cuda_sources import assembler_says, compiled  # noqa: E402

SOURCE = cuda_op.COMPILED[3]
ENTRY = """
extern "C" void gradients_on_cpu(const GradientsArguments *args, int blocks, bool early) {
    cpu::early = early;
    gridDim = {blocks, 1};
    for (int block = 0; block < blocks; ++block)
        cpu::run_block(block, 0, THREADS, [&] { gradients_kernel(*args); });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("gradients"), SOURCE, ENTRY)


def given(batch, length, key_heads, heads, gate) -> dict[str, torch.Tensor]:
    """Its arguments: random, not those of one forward pass, for it does not mind. Past the end there are no new values."""
    generator = torch.Generator().manual_seed(1)
    chunks = -(-length // 64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    q, k = (F.normalize(normal(batch, length, key_heads, 96).float(), dim=-1).to(torch.bfloat16) for _ in range(2))
    g = -gate * torch.rand(batch, chunks * 64, heads, generator=generator)
    g[:, length:] = 0
    new_values = normal(batch, chunks, heads, 192, 64)
    new_values[:, -1, ..., length % 64 or 64 :] = 0
    return dict(
        q=q,
        k=k,
        do=normal(batch, length, heads, 192),
        dz=normal(batch, length, heads, 192),
        new_values=new_values.flatten(0, 1),
        states=normal(batch * chunks, heads, 192, 96),
        dstates=normal(batch * chunks, heads, 192, 96),
        beta=2 * torch.rand(batch, length, heads, generator=generator),
        G=g.view(batch * chunks, 64, heads).transpose(1, 2).cumsum(-1).contiguous(),
    )


def found(library, inputs, scale, blocks, early) -> dict[str, torch.Tensor]:
    batch, length, heads = inputs["beta"].shape
    chunks = -(-length // 64)
    out = {name: torch.full((batch, length, heads, 96), 7.0, dtype=torch.bfloat16) for name in ("dq", "dk")}
    out |= {name: torch.full((batch, length, heads), 7.0) for name in ("dg", "dbeta")}
    pointers = {name: x.data_ptr() for name, x in {**inputs, **out}.items()}
    sizes = dict(length=length, chunks=chunks, heads=heads, key_heads=inputs["q"].shape[2], work=batch * chunks * heads)
    arguments = cuda_op.GradientsArguments(**pointers, scale=scale, **sizes)
    library.gradients_on_cpu(ctypes.byref(arguments), blocks, early)
    return out


def exact(inputs, scale) -> dict[str, torch.Tensor]:
    """As triton_gradients.py has it, with whole matrices."""
    batch, length, heads = inputs["beta"].shape

    def chunked(x):
        x = x.double().repeat_interleave(heads // x.shape[2], 2)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % 64))
        return x.reshape(-1, 64, *x.shape[2:]).transpose(1, 2)

    def tokens(x):
        return x.transpose(1, 2).reshape(batch, -1, heads, *x.shape[3:])[:, :length]

    q, k, do, dz, beta = (chunked(inputs[name]) for name in ("q", "k", "do", "dz", "beta"))
    new, S, dS, G = (inputs[name].double() for name in ("new_values", "states", "dstates", "G"))
    later = torch.ones(64, 64, dtype=torch.bool).triu(1)
    decay = (G[..., :, None] - G[..., None, :]).masked_fill(later, float("-inf")).exp2()
    dP, R = do @ new, dz @ new
    dbeta = R.diagonal(dim1=-2, dim2=-1) / beta.half().double().square()
    dP, R = dP * decay * scale, -(R * decay).tril(-1)
    dq = dP @ k + do @ S * (G.exp2() * scale)[..., None]
    early = R @ k - dz @ S * G.exp2()[..., None]
    to_end = new.mT @ dS * (G[..., -1:] - G).exp2()[..., None]
    late = to_end + dP.mT @ q + R.mT @ k
    dG = (q * dq + k * (early - late)).sum(-1)
    last = (k * to_end).sum((-1, -2)) + (S * dS).sum((-1, -2)) * G[..., -1].exp2()
    dg = dG.flip(-1).cumsum(-1).flip(-1) + last[..., None]
    return {name: tokens(x) for name, x in dict(dq=dq, dk=early + late, dg=dg, dbeta=dbeta).items()}


@pytest.mark.parametrize("early", [False, True], ids=["copies land late", "copies land early"])
@pytest.mark.parametrize(
    "shape, blocks, gate",
    [((1, 64, 1, 1), 1, 0.05), ((2, 100, 1, 2), 3, 0.05), ((1, 1, 1, 1), 1, 0.0), ((1, 192, 1, 1), 1, 5.0)],
    ids=str,
)
def test_its_results(library, shape, blocks, gate, early):
    inputs = given(*shape, gate)
    ours, truth = found(library, inputs, 0.1, blocks, early), exact(inputs, 0.1)
    for name, tolerance in dict(dq=4e-3, dk=4e-3, dg=4e-3, dbeta=1e-6).items():
        assert relative_error(ours[name], truth[name]) < tolerance, name


@pytest.mark.skipif(cuda_op.nvcc() is None, reason="nvcc is not installed")
def test_registers_hold_its_sums(tmp_path):
    said = assembler_says(tmp_path, SOURCE)
    assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= 16
