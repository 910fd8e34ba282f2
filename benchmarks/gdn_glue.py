"""conv_gates and gated_rmsnorm at OLMo Hybrid's sizes, against fla's modules and torch.compile of the references.

--only REGEX      the cases whose name it finds, as gated_rmsnorm
--before FOLDER   also time conv_gates of an earlier commit, of which FOLDER holds the `kernels` folder (`git archive COMMIT kernels`)
"""

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_timing import copy_tb_s, cpu_ms, gpu_ms, kernels, write_gpu
from report import row

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.conv_gates.reference import conv_gates_torch
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.gated_rmsnorm.reference import gated_rmsnorm_torch
from hybrid_kernels.testing import packed_inputs, relative_error

T, H, K, V = 8192, 30, 96, 192
DIMS = dict(num_key_heads=H, num_value_heads=H, key_head_dim=K, value_head_dim=V)
KEY, VALUE = H * K, H * V
PADDING = 4
WIDTH = 2 * KEY + 2 * VALUE + 2 * H + PADDING


def fla_conv_gates(packed, weight, A_log, dt_bias, cu_seqlens=None):
    """fla's layer between in_proj and the delta rule: its conv, its L2 norm, its gate."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.l2norm import l2norm
    from fla.ops.gated_delta_rule.gate import fused_gdn_gate

    x = packed.transpose(0, 1)
    mixed, gate, b, a, _ = x.split([2 * KEY + VALUE, VALUE, H, H, PADDING], dim=-1)
    mixed, _ = causal_conv1d(mixed, weight, activation="silu", cu_seqlens=cu_seqlens)
    q, k, v = mixed.split([KEY, KEY, VALUE], dim=-1)
    q, k = (l2norm(y.unflatten(-1, (H, K)).contiguous()) for y in (q, k))
    return q, k, v.unflatten(-1, (H, V)).contiguous(), fused_gdn_gate(a, A_log, dt_bias), 2 * b.float().sigmoid(), gate


def conv_gates_before(folder: Path) -> Callable:
    """Return the Triton backend of an earlier tree. Its modules leave `sys.modules` again, so that both trees run in this process."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "hybrid_kernels"}
    sys.path.insert(0, str(folder.resolve() / "kernels"))
    try:
        op = importlib.import_module("hybrid_kernels.conv_gates.backends.triton.op")
        if not Path(op.__file__).is_relative_to(folder.resolve()):
            raise ValueError(
                f"--before: {folder}/kernels has no hybrid_kernels/conv_gates; unpack `git archive COMMIT kernels`"
            )
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == "hybrid_kernels"]:
            del sys.modules[name]
        sys.modules.update(ours)
    dims = [*DIMS.values(), VALUE, 1]
    return lambda *x: op.conv_gates_triton(*x, None, None, dims, 2.0, True)


def torch_conv_gates(packed, weight, A_log, dt_bias):
    start = 2 * KEY + VALUE
    return *conv_gates_torch(packed, weight, A_log, dt_bias, None, None, list(DIMS.values()), 2.0), packed[
        ..., start : start + VALUE
    ]


def fla_gated_rmsnorm(o, gate, weight, eps):
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    y = rms_norm_gated(o, gate.transpose(0, 1).unflatten(-1, (H, V)).contiguous(), weight, None, eps=eps)
    return y.flatten(2).transpose(0, 1).contiguous()


def compare(op, inputs, exact, versions, floors, goal) -> list[dict]:
    """Errors of ours against fp64, then times of all versions, with their gradients."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    reference = exact(*doubles)
    reference = reference if isinstance(reference, tuple) else (reference,)
    grads = [torch.randn_like(x, dtype=torch.float32).to(torch.bfloat16) for x in reference]
    exact_grads = torch.autograd.grad(reference, doubles, [g.double() for g in grads])
    rows, measured = [], {}
    for name, fn in versions.items():

        def out(fn=fn):
            results = fn(*inputs)
            return results if isinstance(results, tuple) else (results,)

        def both(out=out):
            results = out()
            given = [g.to(r.dtype).reshape(r.shape) for g, r in zip(grads, results)]
            return results, torch.autograd.grad(results, inputs, given)

        try:
            results, got = both()
        except Exception as error:  # a peer that cannot run is reported, not hidden
            print(op, name, "cannot run:", repr(error)[:300], flush=True)
            continue
        worst = max(relative_error(x.reshape(y.shape), y) for x, y in zip((*results, *got), (*reference, *exact_grads)))
        rows.append(row(name, f"{op}: largest error, results and gradients", "relative RMS", worst))
        cast = [g.to(r.dtype).reshape(r.shape) for g, r in zip(grads, results)]

        def forward(out=out):
            with torch.no_grad():
                out()

        def timed_both(out=out, cast=cast):
            torch.autograd.grad(out(), inputs, cast)

        launched = kernels(timed_both)
        print(op, name, {k: round(us) for k, (_, us) in launched.items() if us > 3}, flush=True)
        measured[name] = gpu_ms(forward), gpu_ms(timed_both), cpu_ms(timed_both), sum(n for n, _ in launched.values())
    mine = measured["ours"]
    for name in list(measured)[1:]:
        peer = measured[name]
        wanted = None if name == "before" else goal
        rows.append(row(op, "forward", "ms", mine[0], peer[0], name, wanted))
        rows.append(row(op, "forward + backward", "ms", mine[1], peer[1], name, wanted))
        rows.append(row(op, "launch time, forward + backward", "ms", mine[2], peer[2], name))
        rows.append(row(op, "kernels, forward + backward", "launches", mine[3], peer[3], name))
    for metric, time, nbytes in zip(("forward", "forward + backward"), mine, floors):
        rows.append(
            row(op, f"{metric}: bytes at least moved, a second", "TB/s", nbytes / time / 1e9, copy_tb_s(), "a copy", None, True)
        )
    return rows


def conv_gates_rows(name: str, before: Path | None) -> list[dict]:
    packed = packed_inputs(T, 1, H, H, K, V, padding=PADDING, dtype=torch.bfloat16, device="cuda")
    packed = [x.requires_grad_() for x in packed]
    channels = 2 * KEY + VALUE
    forward = T * 4 * channels
    return compare(
        name, packed, torch_conv_gates,
        {
            "ours": lambda *x: conv_gates(*x, **DIMS, return_gate=True, backend="triton"),
            **({} if before is None else {"before": conv_gates_before(before)}),
            "fla 0.6 modules": fla_conv_gates,
            "torch.compile of the reference": torch.compile(torch_conv_gates),
        },
        (forward, forward + T * (4 * channels + 2 * VALUE + 2 * WIDTH)), 2.0,
    )  # fmt: skip


def gated_rmsnorm_rows(name: str, batch: int, whole: bool) -> list[dict]:
    """With a batch, [b, s, H, d] and [s, b, H*d] differ in memory too; in the model the gate is a slice of in_proj's output."""
    norms = {
        "ours": lambda *x: gated_rmsnorm(*x, 1e-5, backend="triton"),
        "fla 0.6 rms_norm_gated": lambda *x: fla_gated_rmsnorm(*x, 1e-5),
        "torch.compile of the reference": torch.compile(lambda *x: gated_rmsnorm_torch(*x, 1e-5)),
    }
    exact = lambda *x: gated_rmsnorm_torch(*x, 1e-5)  # noqa: E731
    o = torch.randn(batch, T // batch, H, V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    gate = torch.randn(T // batch, batch, VALUE if whole else WIDTH, device="cuda", dtype=torch.bfloat16)
    gate = gate[..., -VALUE - 64 : -64].detach() if not whole else gate
    weight = torch.randn(V, device="cuda", dtype=torch.bfloat16).requires_grad_()
    return compare(name, [o, gate.requires_grad_(), weight], exact, norms, (T * 6 * VALUE, T * 16 * VALUE), 1.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--before", type=Path)
    options, _ = parser.parse_known_args()
    cases = {
        "conv_gates": (conv_gates_rows, options.before),
        "gated_rmsnorm, batch 1": (gated_rmsnorm_rows, 1, True),
        "gated_rmsnorm, batch 1, gate as a slice of the projection": (gated_rmsnorm_rows, 1, False),
        "gated_rmsnorm, batch 4": (gated_rmsnorm_rows, 4, True),
    }
    rows: list[dict] = []
    for name, (rows_of, *sizes) in cases.items():
        if re.search(options.only, name):
            rows += rows_of(name, *sizes)
            write_gpu("gdn_glue", rows)
