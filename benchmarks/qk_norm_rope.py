"""qk_norm_rope at OLMo Hybrid 7B's attention: errors against fp64, time, launches and bytes, next to torch.

8192 tokens, 30 heads of 128, bf16; and the 15 heads of one of two tensor parallel ranks. A mirror stands for the other rank: its
collectives are local kernels, for the baselines as well. Baselines: the reference, eager and compiled.
"""

import gc

import torch
from kernel_timing import copy_tb_s, cpu_ms, gpu_ms, kernels, write_gpu
from report import row

from hybrid_kernels.qk_norm_rope import qk_norm_rope
from hybrid_kernels.testing import mirror_all_reduce, qkv_inputs, relative_error

T, HEADS, D = 8192, 30, 128


def peak_gib(fn) -> float:
    gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def compare(case: str, heads: int, rotary: bool, ranks: int = 1) -> list[dict]:
    qkv, *weights, angles = qkv_inputs(T, 1, heads, heads, D, dtype=torch.bfloat16, device="cuda")
    inputs, width = [x.requires_grad_() for x in (qkv, *weights)], heads * D
    options = dict(head_dim=D, true_widths=(width * ranks,) * 2, eps=1e-6)
    if ranks > 1:
        options["all_reduce"] = mirror_all_reduce
    angles = angles if rotary else None
    given = [torch.randn(T, 1, heads, D, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    versions = {
        "ours": lambda *x: qk_norm_rope(*x, angles, **options, backend="triton"),
        "torch": lambda *x: qk_norm_rope(*x, angles, **options, backend="torch"),
    }
    if ranks == 1:
        versions["torch.compile"] = torch.compile(versions["torch"])
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    results = versions["torch"](*doubles)
    exact = [*results, *torch.autograd.grad(results, doubles, [g.double() for g in given])]
    rows, measured = [], {}
    for name, fn in versions.items():

        def both(fn=fn):
            results = fn(*inputs)
            return *results, *torch.autograd.grad(results, inputs, given)

        def forward(fn=fn):
            with torch.no_grad():
                fn(*inputs)

        worst = max(relative_error(x, y) for x, y in zip(both(), exact))
        launched = kernels(both)
        print(case, name, {k: round(us) for k, (_, us) in launched.items() if us > 3}, flush=True)
        measured[name] = {
            ("largest error, results and gradients", "relative RMS"): worst,
            ("forward", "ms"): gpu_ms(forward),
            ("forward + backward", "ms"): gpu_ms(both),
            ("launch time, forward + backward", "ms"): cpu_ms(both),
            ("kernels, forward + backward", "launches"): sum(n for n, _ in launched.values()),
            ("peak memory, results included", "GiB"): peak_gib(both),
        }
    for name in list(measured)[1:]:
        for (metric, unit), mine in measured["ours"].items():
            rows.append(row(case, metric, unit, mine, measured[name][metric, unit], name))
    forward_bytes = T * 2 * 6 * width
    for metric, nbytes in (("forward", forward_bytes), ("forward + backward", forward_bytes + T * 2 * 8 * width)):
        rate = nbytes / measured["ours"][metric, "ms"] / 1e9
        rows.append(row(case, f"{metric}: bytes at least moved, a second", "TB/s", rate, copy_tb_s(), "a copy", None, True))
    return rows


if __name__ == "__main__":
    rows = compare("30 heads, RoPE", HEADS, True)
    rows += compare("15 of 30 heads, RoPE, one rank of two", HEADS // 2, True, ranks=2)
    write_gpu("qk_norm_rope", rows)
    rows += compare("30 heads, NoPE", HEADS, False)
    write_gpu("qk_norm_rope", rows)
