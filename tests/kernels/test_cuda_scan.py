"""The forward scan in CUDA C++: how it is built and found, what the compiler says of it, and the dispatch's reason without it."""

import subprocess
import types

import pytest
import torch

pytest.importorskip("triton")
from hybrid_kernels import gated_delta_rule  # noqa: E402
from hybrid_kernels.gated_delta_rule import cuda_op, gluon_op  # noqa: E402
from hybrid_kernels.testing import delta_rule_inputs  # noqa: E402

needs_nvcc = pytest.mark.skipif(cuda_op.nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and nothing built yet in this process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuda_op._built.cache_clear()
    yield tmp_path
    cuda_op._built.cache_clear()


@needs_nvcc
def test_its_products_overlap_and_nothing_spills(tmp_path):
    options = [x for x in cuda_op.OPTIONS if x not in ("-shared", "-Xcompiler", "-fPIC")]
    command = [
        cuda_op.nvcc(),
        *options,
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        str(tmp_path / "scan"),
        str(cuda_op.SOURCES[0]),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert " 0 bytes spill stores, 0 bytes spill loads" in ran.stderr
    assert "C75" not in ran.stderr, ran.stderr  # the assembler waits for every matrix product
    assert "warning" not in ran.stderr, ran.stderr


@needs_nvcc
def test_it_is_built_once(fresh, monkeypatch):
    library = cuda_op.build(cuda_op.nvcc())
    assert library.parent.parent == fresh and library.stat().st_size > 0
    built = library.stat().st_mtime_ns
    assert cuda_op.build(cuda_op.nvcc()) == library and library.stat().st_mtime_ns == built
    monkeypatch.setattr(cuda_op, "OPTIONS", [*cuda_op.OPTIONS, "-DOTHER"])
    assert cuda_op.build(cuda_op.nvcc()) != library, "other options are another library"


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
def test_without_a_gpu_cuda_s_error_is_raised(fresh, monkeypatch):
    """The library loads, takes its arguments and says what CUDA says."""
    from hybrid_kernels.gated_delta_rule.triton_op import Chunks, Scores

    q, k, v, _, _ = delta_rule_inputs(1, 100, 1, 2, 96, 192, dtype=torch.bfloat16)
    assert cuda_op.missing(q, v, None) is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    chunks = Chunks.of(v, 96, None)
    with pytest.raises(RuntimeError, match="CUDA driver|no CUDA-capable device"):
        cuda_op.forward_scan(q, k, v, Scores.empty(k, 2, chunks.count), None, None, 0.1, chunks, final=True)


def explained(monkeypatch, batch=1, heads=1, key_dim=96, processors=132, **options):
    """What the dispatch says where there is a Hopper GPU."""
    monkeypatch.setattr(gated_delta_rule, "_missing_for_hopper", lambda q, v: None)
    monkeypatch.setattr(cuda_op, "processors", lambda device: processors)
    inputs = delta_rule_inputs(batch, 64, heads, heads, key_dim, 192, dtype=torch.bfloat16)
    return str(gated_delta_rule.explain(*inputs, **options))


@needs_nvcc
@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 30), (1, 44), (4, 30)])
def test_the_dispatch_says_that_it_runs(fresh, monkeypatch, batch, heads):
    assert explained(monkeypatch, batch, heads).endswith("outputs by the scan in CUDA C++)")


def test_the_dispatch_says_why_it_does_not(fresh, monkeypatch):
    assert "not the scan in CUDA C++: it takes heads of 96 and 192, not 64 and 192" in explained(
        monkeypatch, key_dim=64
    )
    assert "not the scan in CUDA C++: documents are" in explained(monkeypatch, cu_seqlens=torch.tensor([0, 64]))
    assert "not the scan in CUDA C++: 180 blocks are one round" in explained(monkeypatch, 2, 30)
    with monkeypatch.context() as patch:
        patch.setattr(cuda_op, "segments_of", lambda *_: 3)
        assert "not the scan in CUDA C++: sequences in segments" in explained(patch)
    monkeypatch.setattr(cuda_op, "nvcc", lambda: None)
    assert "not the scan in CUDA C++: nvcc was not found" in explained(monkeypatch)


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr(cuda_op, "nvcc", lambda: str(compiler))
    said = explained(monkeypatch)
    assert "it could not be built" in said and said.rstrip(")").endswith("no such architecture")


@pytest.mark.parametrize(
    "hopper, states, module", [(True, False, cuda_op), (True, True, gluon_op), (False, False, None)]
)
def test_which_scan_writes_the_outputs(fresh, monkeypatch, hopper, states, module):
    from hybrid_kernels.gated_delta_rule import autograd, triton_op

    monkeypatch.setattr(cuda_op, "missing", lambda q, v, cu_seqlens: None)
    q, _, v, _, _ = delta_rule_inputs(1, 64, 1, 1, 96, 192)
    assert autograd._scan_of_outputs(q, v, None, hopper, states) is (module or triton_op).forward_scan
