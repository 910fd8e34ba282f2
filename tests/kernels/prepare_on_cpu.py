"""CUDA's `prepare` on the CPU: prepare.cu compiled for the CPU (cuda_on_cpu.h), called in place of the GPU's library."""

import ctypes
from collections.abc import Callable
from pathlib import Path

from hybrid_kernels.gated_delta_rule.backends.cuda import op
from tests.kernels.cuda_sources import compiled

SOURCE = op.SOURCES[0]
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


def calls_on_cpu(folder: Path) -> Callable:
    """Return a replacement of the CUDA backend's `_call` for `prepare`. Skips without g++."""
    library = compiled(folder, SOURCE, ENTRY)

    def call(name, like, tensors, sizes, count) -> None:
        assert name == "prepare"
        for written in tensors[4:]:
            written.fill_(7)  # to show what is not written
        library.prepare_on_cpu(*[ctypes.c_void_p(x.data_ptr()) for x in tensors], ctypes.byref(sizes), count)

    return call
