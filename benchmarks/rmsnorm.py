"""rmsnorm at OLMo Hybrid 7B's width: time and share of a copy's bandwidth, next to Transformer Engine, cuDNN and torch.

    --sweep    also time other launch options of the kernels, to choose those of `backends/triton/op.py`

8,192 and 16,384 rows of 3,840 channels, bf16. Forward and backward passes are timed apart. "with the stream": the backward pass
also adds the gradient of the residual stream. "of a sum": the forward pass also adds the residual.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys

import torch
import torch._functorch.config
import torch.nn.functional as F
from kernel_timing import copy_tb_s, cpu_ms, gpu_ms, write_gpu
from report import row

from hybrid_kernels.dispatch import has_module
from hybrid_kernels.rmsnorm import residual_rmsnorm, rmsnorm
from hybrid_kernels.rmsnorm.backends.triton import op
from hybrid_kernels.rmsnorm.reference import rmsnorm_torch
from hybrid_kernels.testing import relative_error

N, ROWS, EPS = 3840, (8192, 16384), 1e-6
GOAL = 0.85
CUDNN = {"NVTE_NORM_FWD_USE_CUDNN": "1", "NVTE_NORM_BWD_USE_CUDNN": "1"}
PASSES = {  # tensors of the input's size that a pass reads and writes at least
    "forward": 2,
    "backward": 3,
    "backward, with the stream": 4,
    "forward, of a sum": 4,
}


def inputs_of(rows: int) -> list[torch.Tensor]:
    """Return x, dy, dstream [rows, N] and weight [N]."""
    return [torch.randn(*shape, N, device="cuda", dtype=torch.bfloat16) for shape in ((rows,), (rows,), (rows,), ())]


def ours(rows: int) -> dict[str, float]:
    x, dy, dstream, weight = inputs_of(rows)
    *_, rstd = op._forward(x, None, weight, EPS, False)
    return {
        "forward": gpu_ms(lambda: op._forward(x, None, weight, EPS, False)),
        "backward": gpu_ms(lambda: op._backward(x, weight, rstd, dy, None, False)),
        "backward, with the stream": gpu_ms(lambda: op._backward(x, weight, rstd, dy, dstream, False)),
        "forward, of a sum": gpu_ms(lambda: op._forward(x, dy, weight, EPS, False)),
    }


def transformer_engine(rows: int) -> dict[str, float]:
    """Time Transformer Engine's kernels. It reads the variables that choose cuDNN once per process."""
    import transformer_engine.pytorch  # noqa: F401 - loads transformer_engine_torch
    import transformer_engine_torch as tex
    from transformer_engine.pytorch.constants import TE_DType

    x, dy, dstream, weight = inputs_of(rows)
    dtype = TE_DType[torch.bfloat16]

    def forward():
        return tex.rmsnorm_fwd(x, weight, EPS, None, None, dtype, 0, False)

    def backward():
        return tex.rmsnorm_bwd(dy, x, rstd, weight, 0, False)

    rstd = forward()[2]
    return {
        "forward": gpu_ms(forward),
        "backward": gpu_ms(backward),
        "backward, with the stream": gpu_ms(lambda: backward()[0] + dstream),
        "forward, of a sum": gpu_ms(lambda: (x + dstream, forward())),
    }


def with_cudnn() -> dict[int, dict[str, float]]:
    """Time Transformer Engine with cuDNN's norms in a process of its own."""
    command = [sys.executable, __file__, "--only-transformer-engine"]
    done = subprocess.run(command, env=os.environ | CUDNN, stdout=subprocess.PIPE, text=True, check=True)
    return {int(rows): times for rows, times in json.loads(done.stdout.splitlines()[-1]).items()}


def of_torch(norm, rows: int) -> dict[str, float]:
    x, dy, dstream, weight = inputs_of(rows)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = norm(*leaves)

    def backward():
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    with torch.no_grad():
        times = {"forward": gpu_ms(lambda: norm(*leaves))}
        times["forward, of a sum"] = gpu_ms(lambda: norm(x + dstream, weight))
    return times | {
        "backward": gpu_ms(backward),
        "backward, with the stream": gpu_ms(lambda: backward()[0] + dstream),
    }


def errors(rows: int) -> float:
    """Return the largest relative error of results and gradients against fp64."""
    x, dy, dstream, weight = inputs_of(rows)

    def run(backend, x, weight, residual, given):
        leaves = [t.detach().requires_grad_() for t in (x, weight, residual)]
        results = [rmsnorm(leaves[0], leaves[1], EPS, backend=backend)]
        results += residual_rmsnorm(leaves[0], leaves[2], leaves[1], EPS, backend=backend)
        return [*results, *torch.autograd.grad(results, leaves, [given] * 3)]

    exact = run("torch", x.double(), weight.double(), dstream.double(), dy.double())
    return max(relative_error(a, b) for a, b in zip(run("triton", x, weight, dstream, dy), exact, strict=True))


def launch_ms(rows: int) -> float:
    x, dy, _, weight = inputs_of(rows)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    return cpu_ms(lambda: torch.autograd.grad(rmsnorm(*leaves, EPS, backend="triton"), leaves, dy))


def rows_of(rows: int, measured: dict[str, dict[str, float]]) -> list[dict]:
    case, mine = f"{rows:,} x {N:,}", measured["ours"]
    found = [row(case, "largest error, results and gradients", "relative RMS", errors(rows))]
    found.append(row(case, "launch time, forward + backward", "ms", launch_ms(rows)))
    for name, passes in PASSES.items():
        rate = passes * rows * N * 2 / mine[name] / 1e9
        metric = f"{name}: share of copy bandwidth"
        found.append(row(case, metric, "TB/s", rate, copy_tb_s(), "a copy", GOAL, higher_is_better=True))
        for peer, times in measured.items():
            if peer != "ours":
                found.append(row(case, name, "ms", mine[name], times[name], peer))
    return found


def sweep(rows: int) -> None:
    """Print the time of each launch option, fastest first. The best of them belong into op.py."""
    chosen = {
        name: getattr(op, name)
        for name in ("FORWARD_CHANNELS", "BACKWARD_CHANNELS", "BACKWARD_STAGES", "BACKWARD_PROGRAMS")
    }
    forward = [{"FORWARD_CHANNELS": channels} for channels in (512, 1024, 2048)]
    names = ("BACKWARD_CHANNELS", "BACKWARD_STAGES", "BACKWARD_PROGRAMS")
    backward = [dict(zip(names, v)) for v in itertools.product((256, 512), (1, 2, 3, 4), (256, 384, 512))]
    for direction, options in (("forward", forward), ("backward", backward)):
        timed = [(time_with(direction, rows, one), one) for one in options]
        for ms, one in sorted(timed, key=lambda pair: pair[0]):
            share = PASSES[direction] * rows * N * 2 / ms / 1e9 / copy_tb_s()
            print(f"{direction} {rows:,}: {1e3 * ms:6.1f} us, {share:.3f} of a copy, {one}", flush=True)
    for name, value in chosen.items():
        setattr(op, name, value)


def time_with(direction: str, rows: int, options: dict[str, int]) -> float:
    x, dy, _, weight = inputs_of(rows)
    for name, value in options.items():
        setattr(op, name, value)
    *_, rstd = op._forward(x, None, weight, EPS, False)
    if direction == "forward":
        return gpu_ms(lambda: op._forward(x, None, weight, EPS, False))
    return gpu_ms(lambda: op._backward(x, weight, rstd, dy, None, False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other launch options too")
    parser.add_argument("--only-transformer-engine", action="store_true", help="print its times as JSON")
    args, _ = parser.parse_known_args()
    if args.only_transformer_engine:
        print(json.dumps({rows: transformer_engine(rows) for rows in ROWS}))
        return
    torch._functorch.config.donated_buffer = False  # the backward pass of a graph is timed many times
    peers = {
        "torch": lambda x, w: F.rms_norm(x, (N,), w, EPS),
        "torch.compile of the reference": torch.compile(lambda x, w: rmsnorm_torch(x, w, EPS)),
    }
    cudnn, installed = {}, has_module("transformer_engine")
    if installed:
        os.environ |= dict.fromkeys(CUDNN, "0")
        cudnn = with_cudnn()
    found: list[dict] = []
    for rows in ROWS:
        measured = {"ours": ours(rows)}
        if installed:
            measured |= {"Transformer Engine": transformer_engine(rows), "Transformer Engine, cuDNN": cudnn[rows]}
        measured |= {name: of_torch(norm, rows) for name, norm in peers.items()}
        found += rows_of(rows, measured)
        write_gpu("rmsnorm", found)
    if args.sweep:
        for rows in ROWS:
            sweep(rows)


if __name__ == "__main__":
    main()
