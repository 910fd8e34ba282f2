"""The kernels in CUDA C++ on the CPU: their sources compiled by g++ (cuda_on_cpu.h), called in place of the GPU's library."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hybrid_kernels.gated_delta_rule.backends.cuda import op
from tests.kernels.cuda_sources import compiled

PREPARE, FORWARD, REVERSE, GRADIENTS = op.SOURCES
PREPARE_ENTRY = """
extern "C" void prepare_on_cpu(const void *q, const void *k, const void *g, const void *beta, void *A, void *P, void *G,
                               const Sizes *sizes, int count) {
    for (int chunk = 0; chunk < count; ++chunk)
        for (int head = 0; head < sizes->heads; ++head)
            cpu::run_block(head, chunk, THREADS, [&] {
                auto kernel = sizes->positions ? prepare_kernel<true> : prepare_kernel<false>;
                kernel((const uint16_t *)q, (const uint16_t *)k, (const float *)g, (const float *)beta, (uint16_t *)A,
                       (uint16_t *)P, (float *)G, *sizes);
            });
}
"""
MAPS = """
static Maps maps_of(const void *q, const void *k, const void *v, const void *A, const void *P, const void *states,
                    const void *changes, const Arguments &args, long rows, long tiles) {
    auto map = [](const void *x, long rows, long cols, bool blocked) { return CUtensorMap{(char *)x, rows, cols, blocked}; };
    const long keys = args.key_heads * K, values = args.heads * args.values;
    return {map(q, rows, keys, true), map(k, rows, keys, true), map(v, rows, values, false), map(A, tiles * 64, 64, false),
            map(P, tiles * 64, 64, false), map(args.out, rows, values, false), map(states, tiles * args.values, K, true),
            map(changes, tiles * args.values, 64, false)};
}
template <class Kernel>
static void run(Kernel kernel, const Maps &maps, const Arguments &args, int sequences) {
    for (int y = 0; y < sequences * args.heads; ++y)
        for (int x = 0; x < args.width / 64; ++x) {
            cpu::restart();
            cpu::run_block(x, y, THREADS, [&] { kernel(maps, args); });
        }
}
"""
FORWARD_ENTRY = (
    MAPS
    + """
extern "C" void forward_scan_on_cpu(const void *q, const void *k, const void *v, const void *A, const void *P, void *states,
                                    void *new_values, const Arguments *args, long rows, long tiles, int sequences) {
    const Maps maps = maps_of(q, k, v, A, P, states, new_values, *args, rows, tiles);
    auto kernel = args->out ? (states ? forward_scan_kernel<true, true> : forward_scan_kernel<true, false>)
                            : (states ? forward_scan_kernel<false, true> : forward_scan_kernel<false, false>);
    run(kernel, maps, *args, sequences);
}
"""
)
REVERSE_ENTRY = (
    MAPS
    + """
extern "C" void reverse_scan_on_cpu(const void *q, const void *k, const void *d_o, const void *A, const void *P, void *dstates,
                                    const Arguments *args, long rows, long tiles, int sequences) {
    const Maps maps = maps_of(q, k, d_o, A, P, dstates, nullptr, *args, rows, tiles);
    run(dstates ? reverse_scan_kernel<true> : reverse_scan_kernel<false>, maps, *args, sequences);
}
"""
)
GRADIENTS_ENTRY = """
extern "C" void gradients_on_cpu(const void *q, const void *k, const void *d_o, const void *dv, const void *states,
                                 const void *new_values, const void *dstates, void *dq, void *dk, void *dg, void *dbeta,
                                 const Given *given, int rows) {
    auto map = [](const void *x, long rows, long cols, bool blocked) { return CUtensorMap{(char *)x, rows, cols, blocked}; };
    const long heads = given->sizes.heads, keys = given->sizes.key_heads * K, values = heads * given->values;
    const long units = given->count * heads, states_rows = units * given->values;
    const Maps maps{map(q, rows, keys, true), map(k, rows, keys, true), map(d_o, rows, values, false), map(dv, rows, values, false),
                    map(new_values, states_rows, 64, false), map(states, states_rows, K, true), map(dstates, states_rows, K, true),
                    map(dq, rows, heads * K, true), map(dk, rows, heads * K, true)};
    const Results results{(__nv_bfloat16 *)dq, (__nv_bfloat16 *)dk, (float *)dg, (float *)dbeta};
    gridDim = {(int)min(units, 2L), 1};
    for (int block = 0; block < gridDim.x; ++block) {
        cpu::restart();
        cpu::run_block(block, 0, THREADS, [&] { gradients_kernel(maps, *given, results); });
    }
}
"""
KERNELS = {
    "prepare": (PREPARE, PREPARE_ENTRY),
    "forward_scan": (FORWARD, FORWARD_ENTRY),
    "reverse_scan": (REVERSE, REVERSE_ENTRY),
    "gradients": (GRADIENTS, GRADIENTS_ENTRY),
}
WRITTEN = {"prepare": slice(4, 7), "forward_scan": slice(5, 7), "reverse_scan": slice(5, 6), "gradients": slice(7, 11)}


def calls_on_cpu(folder: Path) -> Callable:
    """Return a replacement of the CUDA backend's `_call`. Each kernel is compiled at its first call; skips without g++.

    Args:
        folder: of `cuda_sources.shared_builds`.
    """

    @cache
    def library(name: str, key_dim: int) -> ctypes.CDLL:
        return compiled(folder, *KERNELS[name], key_dim)

    def call(name, k, tensors, args, *counts) -> None:
        for x in tensors[WRITTEN[name]]:
            if x is not None:
                x.fill_(7)  # to show what is not written
        pointers = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in tensors]
        sizes = map(ctypes.c_long, counts[:-1]), ctypes.c_int(counts[-1])
        getattr(library(name, k.shape[3]), f"{name}_on_cpu")(*pointers, ctypes.byref(args), *sizes[0], sizes[1])

    return call
