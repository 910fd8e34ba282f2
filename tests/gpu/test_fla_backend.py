"""fla's chunk_gated_delta_rule through hybrid_kernels' backend, against fla's own naive recurrence, with fla's tolerances."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.skipif(not find_spec("fla"), reason="flash-linear-attention is not installed")


@pytest.mark.parametrize("length", [63, 1000, 2048])
def test_fla_runs_our_kernels(length, monkeypatch):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.utils import assert_close

    from hybrid_kernels import fla_backend

    calls, run = [], fla_backend.gated_delta_rule
    monkeypatch.setattr(fla_backend, "gated_delta_rule", lambda *a, **k: calls.append(1) or run(*a, **k))
    torch.manual_seed(0)
    shape = dict(device="cuda", dtype=torch.bfloat16)
    q, k = (torch.randn(2, length, 4, 96, **shape).requires_grad_() for _ in range(2))
    v = torch.randn(2, length, 4, 192, **shape).requires_grad_()
    g = F.logsigmoid(torch.randn(2, length, 4, device="cuda")).requires_grad_()
    beta = (2 * torch.rand(2, length, 4, device="cuda")).requires_grad_()
    start = torch.randn(2, 4, 96, 192, device="cuda").requires_grad_()
    inputs = dict(q=q, k=k, v=v, g=g, beta=beta, start=start)
    do, dstate = torch.randn_like(v), torch.randn_like(start)

    def gradients(o, state):
        found = torch.autograd.grad((o.float() * do.float()).sum() + (state * dstate).sum(), list(inputs.values()))
        return dict(zip(inputs, found)) | {"o": o, "state": state}

    expected = gradients(
        *naive_recurrent_gated_delta_rule(
            F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1), v.float(), beta.float(), g, initial_state=start,
            output_final_state=True,
        )
    )  # fmt: skip
    found = gradients(
        *chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=True
        )
    )
    assert calls, "fla did not dispatch to hybrid_kernels"
    tolerances = dict(o=0.005, state=0.005, q=0.008, k=0.008, v=0.008, g=0.02, beta=0.02, start=0.008)
    for name, tolerance in tolerances.items():
        assert_close(name, expected[name].float(), found[name].float(), tolerance)
