"""fla's own tests of the gated delta rule, with our kernels.

    python -m tests.gpu.run_fla_tests FILE [--bf16 | --registry] [--out RESULT.json] [further arguments of pytest, as -n 8]

FILE is tests/ops/test_gdn.py of a checkout of flash-linear-attention 0.6, whose sdist has no tests. The package must be installed as
well. The inputs, references and tolerances are fla's.

Tests that never call chunk_gated_delta_rule are left out.

Without --registry, our function takes its place. The tests are in fp16, which our Triton kernels take, and in fp32, which the plain
torch form takes. --bf16 hands the same data to the Hopper kernels. What fla fuses around the rule (L2 norm, sigmoid, gates) runs in
torch.

With --registry, the tests run through fla's public functions, with hybrid_kernels registered as a backend of fla.
FLA_HYBRID_KERNELS=0 then gives the outcomes of fla alone. Each outcome says whether a call of the test ran our kernels.

Under TRITON_INTERPRET=1 everything runs on a CPU, slowly.
"""

import argparse
import inspect
import json
import os
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from hybrid_kernels.dispatch import triton_interpreted
from hybrid_kernels.gated_delta_rule import gated_delta_rule

COUNTS = Counter()
OUTCOMES: dict[str, tuple[str, bool]] = {}
"""Outcome of each test by its name, and whether it ran our kernels through fla's registry."""
CALLS = Counter()
BF16, REGISTRY = "HYBRID_FLA_TESTS_BF16", "HYBRID_FLA_TESTS_REGISTRY"  # read by pytest-xdist's workers, too


def _padded(x: torch.Tensor, multiple: int, sizes=()) -> torch.Tensor:
    """The last dimension with zeros up to a multiple, or to the first of `sizes` that holds it."""
    width = x.shape[-1]
    to = next((s for s in sizes if s >= width), -(-width // multiple) * multiple)
    return F.pad(x, (0, to - width))


def ours(
    q, k, v, g=None, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, cu_seqlens_cpu=None,
    chunk_indices=None, use_gate_in_kernel=False, A_log=None, dt_bias=None, chunk_size=64,
):  # fmt: skip
    """fla 0.6's arguments and results."""
    dtype, dims, scale = v.dtype, (k.shape[-1], v.shape[-1]), k.shape[-1] ** -0.5 if scale is None else scale
    if use_gate_in_kernel:
        raw = g.float() if dt_bias is None else g.float() + dt_bias.float()
        g = -A_log.float().exp() * F.softplus(raw)
    if use_beta_sigmoid_in_kernel:
        beta = beta.float().sigmoid() * (2 if allow_neg_eigval else 1)
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    run = torch.bfloat16 if os.environ.get(BF16) and dtype == torch.float16 else dtype
    state = initial_state
    if state is not None:
        state = state.transpose(-1, -2) if state_v_first else state
        state = _padded(_padded(state, 64).transpose(-1, -2), 64, (16, 32, 64, 96, 128, 192, 256)).transpose(-1, -2)
    q, k = (_padded(x.to(run), 64, (16, 32, 64, 96, 128, 192, 256)) for x in (q, k))
    arguments = q, k, _padded(v.to(run), 64), g.float(), beta.float()
    backend = {torch.float32: "torch", torch.float16: "triton", torch.bfloat16: "cuda"}[run]
    o, final = gated_delta_rule(
        *arguments, scale=scale, initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        backend=backend,
    )  # fmt: skip
    if final is not None:
        final = final[..., : dims[0], : dims[1]]
        final = final.transpose(-1, -2) if state_v_first else final
    return o[..., : dims[1]].to(dtype), final


def pytest_configure(config):
    if os.environ.get(REGISTRY):
        _register()
    os.environ["FLA_DISABLE_BACKEND_DISPATCH"] = (
        "1"  # else tests skip what fla's TileLang kernels cannot do, and ours can
    )
    import fla.ops.gated_delta_rule
    import fla.utils

    if not os.environ.get(REGISTRY):
        fla.ops.gated_delta_rule.chunk_gated_delta_rule = ours
    if triton_interpreted():
        fla.utils.device = "cpu"


def _register():
    """Register our backend and count its calls. fla reads FLA_DISABLE_BACKEND_DISPATCH when fla.backends is imported: here."""
    os.environ.pop("FLA_DISABLE_BACKEND_DISPATCH", None)  # pytest-xdist's workers inherit what the first process set
    from hybrid_kernels.fla_backend import HybridKernelsBackend

    run = HybridKernelsBackend.chunk_gated_delta_rule

    def counted(self, *args, **options):
        CALLS["ours"] += 1
        return run(self, *args, **options)

    HybridKernelsBackend.chunk_gated_delta_rule = counted


def pytest_collection_modifyitems(items):
    """Leave out the tests that never call the function."""
    items[:] = [x for x in items if "chunk_gated_delta_rule" in inspect.unwrap(x.function).__code__.co_names]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = CALLS["ours"]
    try:
        return (yield)
    finally:
        item.user_properties.append(("ours", CALLS["ours"] > before))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        COUNTS[report.outcome] += 1
        OUTCOMES[report.nodeid.rpartition("::")[2]] = report.outcome, dict(report.user_properties).get("ours", False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--registry", action="store_true")
    parser.add_argument("--out")
    options, further = parser.parse_known_args()
    for name, chosen in ((BF16, options.bf16), (REGISTRY, options.registry)):
        if chosen:
            os.environ[name] = "1"
    sys.modules["tests.gpu.run_fla_tests"] = sys.modules["__main__"]  # one set of counts
    status = pytest.main(["-q", "-p", "tests.gpu.run_fla_tests", "-p", "no:cacheprovider", *further, options.file])
    print(dict(COUNTS))
    if options.out:
        with open(options.out, "w") as out:
            json.dump(dict(bf16=options.bf16, **COUNTS, tests=OUTCOMES), out)
    sys.exit(status)
