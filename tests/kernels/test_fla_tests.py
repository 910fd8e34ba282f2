"""The run of fla's own tests through fla's registry (tests/gpu/run_fla_tests.py)."""

import os
import sys
from types import ModuleType, SimpleNamespace

from tests.gpu import run_fla_tests


def test_workers_dispatch_although_the_first_process_switched_dispatch_off_for_what_follows(monkeypatch):
    """fla reads the variable when it is imported. pytest-xdist's workers inherit it, and ran 44 tests without our kernels."""
    seen, fake = [], ModuleType("hybrid_kernels.fla_backend")

    class Backend:
        def chunk_gated_delta_rule(self) -> str:
            return "ours"

    def attribute(name: str) -> type:
        seen.append(os.environ.get("FLA_DISABLE_BACKEND_DISPATCH"))
        return Backend

    fake.__getattr__ = attribute  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "hybrid_kernels.fla_backend", fake)
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule", "fla.utils"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(run_fla_tests, "triton_interpreted", lambda: False)
    monkeypatch.setenv(run_fla_tests.REGISTRY, "1")
    monkeypatch.setenv("FLA_DISABLE_BACKEND_DISPATCH", "1")
    run_fla_tests.pytest_configure(SimpleNamespace())
    assert set(seen) == {None}
    assert os.environ["FLA_DISABLE_BACKEND_DISPATCH"] == "1"
    assert Backend().chunk_gated_delta_rule() == "ours" and run_fla_tests.CALLS["ours"] == 1
