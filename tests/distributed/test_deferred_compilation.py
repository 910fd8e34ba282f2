"""torch.compile at the first call: what is compiled, when, and that a rank starts without TorchInductor."""

import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_hybrid.distributed import deferred_compilation
from megatron_hybrid.distributed.deferred_compilation import _deferred


@pytest.fixture
def compiled(monkeypatch):
    """Functions and options that reach the real torch.compile, in order."""
    seen, real = [], deferred_compilation._compile

    def compile_(model, **options):
        seen.append((model, options))
        return real(model, backend="eager") if isinstance(model, torch.nn.Module) else lambda x: -model(x)

    monkeypatch.setattr(deferred_compilation, "_compile", compile_)
    monkeypatch.setattr(deferred_compilation, "_never", False)
    return seen


def double(x):
    """Twice x."""
    return 2 * x


def test_a_function_is_compiled_once_at_its_first_call(compiled):
    function = _deferred(double)
    assert not compiled and (function.__name__, function.__doc__) == ("double", "Twice x.")
    assert function(3) == function(3) == -6
    assert compiled == [(double, {})]


def test_options_of_a_decorator_are_kept(compiled):
    assert _deferred(fullgraph=True, mode="max-autotune")(double)(1) == -2
    assert compiled == [(double, {"fullgraph": True, "mode": "max-autotune"})]


def test_a_module_is_compiled_at_once(compiled):
    module = torch.nn.Linear(2, 2)
    assert isinstance(_deferred(module), torch.nn.Module) and compiled == [(module, {})]


def test_nothing_is_compiled_on_a_cpu_backend(compiled, monkeypatch):
    before = _deferred(double)
    monkeypatch.setattr(deferred_compilation, "_never", True)
    module = torch.nn.Linear(2, 2)
    assert before(3) == _deferred(double)(3) == 6 and _deferred(module) is module and not compiled


def test_an_outer_function_that_is_compiled_traces_the_inner_one():
    inner = _deferred(double)
    outer = deferred_compilation._compile(lambda x: inner(x) + 1, backend="eager", fullgraph=True)
    assert outer(torch.tensor(3.0)) == 7


def test_a_rank_starts_without_a_compiler():
    code = """
        import sys
        from megatron_hybrid.distributed.deferred_compilation import defer_compilation
        defer_compilation()
        import megatron_hybrid.train.trainer
        print([name for name in ("torch._dynamo", "torch._inductor.compile_fx") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
