"""hybrid_kernels in fla's registry: registration, refusals with a reason, and the adapter's arguments.

`fla.backends` is part of flash-linear-attention, which needs Triton on a GPU. Where it is not installed, a stand-in with its
`BaseBackend` and `register` takes its place, so that the logic is tested everywhere.
"""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.gated_delta_rule.reference import gated_delta_rule_recurrent
from hybrid_kernels.testing import delta_rule_inputs, relative_error

REGISTERED = {}


def stand_in() -> dict[str, types.ModuleType]:
    package, backends = types.ModuleType("fla"), types.ModuleType("fla.backends")

    def register(entry_point: str):
        return lambda backend: REGISTERED.setdefault(entry_point, backend())

    backends.BaseBackend, backends.register, package.backends = type("BaseBackend", (), {}), register, backends
    return {"fla": package, "fla.backends": backends}


@pytest.fixture(scope="module")
def backend():
    installed = importlib.util.find_spec("fla") is not None and torch.cuda.is_available()
    with pytest.MonkeyPatch.context() as patch:
        if not installed:
            for name, module in stand_in().items():
                patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "hybrid_kernels.fla_backend", raising=False)
        module = importlib.import_module("hybrid_kernels.fla_backend")
        if installed:
            from fla.backends import _get_operation_registry

            assert "hybrid_kernels" in _get_operation_registry("gated_delta_rule")._backends
        else:
            assert isinstance(REGISTERED["gated_delta_rule"], module.HybridKernelsBackend)
        yield module
        sys.modules.pop("hybrid_kernels.fla_backend", None)


def test_refusals_have_a_reason(backend, monkeypatch):
    verify = backend.HybridKernelsBackend().chunk_gated_delta_rule_verifier
    inputs = delta_rule_inputs(1, 4, 2, 2, 96, 192, dtype=torch.bfloat16)
    accepted, reason = verify(*inputs)
    assert not accepted and "not on a CUDA device" in reason
    monkeypatch.setattr(backend, "explain", lambda *a, **k: Choice("gated_delta_rule", "cuda", "it can"))
    assert verify(*inputs, allow_neg_eigval=True, use_beta_sigmoid_in_kernel=True) == (True, None)
    q, k, v, g, beta = inputs
    for arguments, options, part in (
        ([x[..., :1].expand(*x.shape[:-1], 257) for x in inputs[:2]] + list(inputs[2:]), {}, "up to 256, not 257"),
        (inputs, dict(cp_context=object()), "context parallelism"),
        (inputs, dict(chunk_size=32), "chunks of 64"),
        ((q, k, v, None, beta), {}, "needs g"),
        ((q, k, v.float(), g, beta), {}, "one dtype"),
    ):
        accepted, reason = verify(*arguments, **options)
        assert not accepted and part in reason


def test_calls_of_flas_own_layer_are_accepted(backend, monkeypatch):
    """GatedDeltaNet of fla 0.6 computes its gates in the kernel, and its head dims may be any."""
    seen = []

    def explain(q, k, v, *others, **options):
        seen.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return Choice("gated_delta_rule", "cuda", "it can")

    monkeypatch.setattr(backend, "explain", explain)
    options = dict(
        use_gate_in_kernel=True, use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, state_v_first=True
    )
    inputs = delta_rule_inputs(1, 4, 2, 2, 100, 200, dtype=torch.bfloat16)
    verify = backend.HybridKernelsBackend().chunk_gated_delta_rule_verifier
    assert verify(*inputs, **options, A_log=torch.zeros(2), dt_bias=torch.zeros(2)) == (True, None)
    assert seen == [(128, 128, 256)]


@pytest.mark.parametrize("gate", ["given", "in the kernel", "in the kernel, without bias"])
@pytest.mark.parametrize("v_first", [False, True])
def test_the_adapter_computes_what_fla_does(backend, v_first, gate):
    """The head dims are none of the kernels', so this pads."""
    _, _, v, g, _ = delta_rule_inputs(2, 70, 2, 4, 6, 10)
    q, k, logits = torch.randn(2, 70, 2, 6), torch.randn(2, 70, 2, 6), torch.randn(2, 70, 4)
    start, given, options = torch.randn(2, 4, 6, 10), g, {}
    if gate != "given":
        raw, A_log, bias = torch.randn(2, 70, 4), torch.randn(4), torch.randn(4) if gate == "in the kernel" else None
        given, options = raw, dict(use_gate_in_kernel=True, A_log=A_log, dt_bias=bias)
        g = -A_log.exp() * (1 + (raw + (0 if bias is None else bias)).exp()).log()
    expected, final = gated_delta_rule_recurrent(
        F.normalize(q, dim=-1),
        F.normalize(k, dim=-1),
        v,
        g,
        2 * logits.sigmoid(),
        initial_state=start,
        output_final_state=True,
    )
    o, state = backend.HybridKernelsBackend().chunk_gated_delta_rule(
        q, k, v, given, logits, initial_state=start.mT if v_first else start, output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True, state_v_first=v_first,
        **options,
    )  # fmt: skip
    assert relative_error(o, expected) < 1e-5
    assert relative_error(state.mT if v_first else state, final) < 1e-5
