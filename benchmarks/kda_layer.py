"""The Kimi Delta Attention mixer at the sizes of Kimi Linear 48B against fla's own layer, forward and backward.

Both hold the same weights, and the mixer is built without a norm in front, as fla's layer is. Both run fla's chunk_kda; what differs
is everything around it. Run on a Hopper GPU with megatron-core 0.19.2, Transformer Engine and flash-linear-attention 0.6.0.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from kernel_timing import cpu_ms, gpu_ms, kernels, write_gpu  # noqa: E402
from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear  # noqa: E402
from report import row  # noqa: E402

from hybrid_kernels.testing import relative_error  # noqa: E402
from testing.kda_layer import KIMI_LINEAR, build  # noqa: E402

SHAPES = ((1, 8192), (4, 4096))
"""Sequences and tokens."""
PEER = "fla 0.6.0 KimiDeltaAttention"


def measure(layer, parameters, x, dy) -> dict:
    """Return times, launches, kept memory, output and input gradient of one layer, a function of x."""
    inputs = [x, *parameters]

    def forward():
        with torch.no_grad():
            layer(x)

    def both():
        return torch.autograd.grad(layer(x), inputs, dy, allow_unused=True)

    out = dict(dx=both()[0])
    out["forward"], out["forward + backward"] = gpu_ms(forward), gpu_ms(both)
    out["launch time, forward + backward"] = cpu_ms(both)
    launched = kernels(both)
    out["kernels, forward + backward"] = sum(count for count, _ in launched.values())
    start = torch.cuda.memory_allocated()
    y = layer(x)
    out["kept for the backward pass"] = (torch.cuda.memory_allocated() - start - y.nbytes) / x[..., 0].numel()
    return out | dict(y=y.detach())


UNITS = {
    "forward": "ms",
    "forward + backward": "ms",
    "launch time, forward + backward": "ms",
    "kernels, forward + backward": "launches",
    "kept for the backward pass": "bytes per token",
}


def main() -> None:
    ours, theirs = build(KIMI_LINEAR, dict(in_proj=TEColumnParallelLinear, out_proj=TERowParallelLinear))
    hidden, rows = KIMI_LINEAR["hidden_size"], []
    for batch, length in SHAPES:
        print(*ours.backends(length, batch), sep="\n", flush=True)
        x = torch.randn(length, batch, hidden, device="cuda", dtype=torch.bfloat16)
        dy = torch.randn_like(x)
        mine = measure(lambda x: ours(x, None)[0], ours.parameters(), x.requires_grad_(), dy)
        transposed = x.detach().transpose(0, 1).contiguous().requires_grad_()
        their = measure(lambda x: theirs(x)[0], theirs.parameters(), transposed, dy.transpose(0, 1).contiguous())
        case = f"B {batch}, T {length}, 32 heads of 128, bf16"
        rows += [row(case, metric, unit, mine[metric], their[metric], PEER) for metric, unit in UNITS.items()]
        for what in ("y", "dx"):
            error = relative_error(mine[what], their[what].transpose(0, 1))
            rows.append(row(case, f"difference of {what} from {PEER}", "relative RMS", error))
        write_gpu("kda_layer", rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
