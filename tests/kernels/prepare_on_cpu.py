"""hopper_prepare.cu as a function of the CPU (cuda_on_cpu.h)."""

import ctypes
from pathlib import Path

import torch

from hybrid_kernels.gated_delta_rule import cuda_op
from hybrid_kernels.gated_delta_rule.triton_op import Chunks, Scores
from tests.kernels.cuda_sources import compiled

SOURCE = cuda_op.COMPILED[0]
ENTRY = """
extern "C" void prepare_on_cpu(const void *q, const void *k, const void *g, const void *beta, void *A, void *P, void *G,
                               const Sizes *sizes, int count) {
    for (int chunk = 0; chunk < count; ++chunk)
        for (int head = 0; head < sizes->heads; ++head)
            cpu::run_block(head, chunk, THREADS, [&] {
                prepare_kernel((const uint16_t *)q, (const uint16_t *)k, (const float *)g, (const float *)beta, (uint16_t *)A,
                               (uint16_t *)P, (float *)G, *sizes);
            });
}
"""


class PrepareOnCpu:
    """`prepare` of cuda_op, with the same arguments; skips where there is no g++."""

    def __init__(self, folder: Path):
        self._library = compiled(folder, SOURCE, ENTRY)

    def prepare(self, q, k, g, beta, scale: float, chunks: Chunks, varlen: bool = False) -> Scores:
        assert not varlen
        heads, key_heads = g.shape[2], k.shape[2]
        out = Scores.empty(k, heads, chunks.count)
        for x in (out.A, out.P, out.G):
            x.fill_(7)  # where nothing is written it shows
        tensors = (q, k, g.float(), beta.float(), out.A, out.P, out.G)
        sizes = cuda_op.Sizes(scale, chunks.length, chunks.per_row, heads, key_heads)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        self._library.prepare_on_cpu(*pointers, ctypes.byref(sizes), chunks.count)
        return out


def chunks_of(g: torch.Tensor) -> Chunks:
    """Of g [b, s, H], without documents."""
    return Chunks.of(torch.empty(*g.shape, 192), None)
