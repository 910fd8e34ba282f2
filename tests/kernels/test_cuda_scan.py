"""The kernels in CUDA C++: their build, the compiler's report on them, and the dispatch's reason without them."""

import types

import pytest
import torch

pytest.importorskip("triton")
from hybrid_kernels import gated_delta_rule, nvcc  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.gluon import op as gluon_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores  # noqa: E402
from hybrid_kernels.gated_delta_rule.kernels import Kernels, choose_kernels  # noqa: E402
from hybrid_kernels.testing import delta_rule_inputs  # noqa: E402
from tests.kernels.cuda_sources import assembler_says  # noqa: E402

needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


def build():
    """Build the library in the cache folder, or find it there."""
    return nvcc.build(nvcc.find_nvcc(), "gated_delta_rule", cuda_op.SOURCES, cuda_op.HEADERS)


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    """Cache folder with the library in it, because nvcc takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return build().parent.parent


@pytest.fixture
def built(fresh, cache_folder, monkeypatch):
    """Load nothing yet in this process; the library is in the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache_folder))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Empty cache folder, with nothing built yet in this process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuda_op._library.cache_clear()
    yield tmp_path
    cuda_op._library.cache_clear()


@needs_nvcc
@pytest.mark.parametrize(
    "source, kernels", list(zip(cuda_op.SOURCES[1:], (3, 1), strict=True)), ids=lambda x: getattr(x, "stem", x)
)
def test_products_overlap_and_nothing_spills(source, kernels, tmp_path):
    said = assembler_says(tmp_path, source)
    assert said.count(" 0 bytes spill stores, 0 bytes spill loads") == kernels
    assert "C75" not in said, said  # the assembler waits for every GEMM


@needs_nvcc
def test_it_is_built_once(fresh, monkeypatch):
    library = build()
    assert library.parent.parent == fresh and library.stat().st_size > 0
    built = library.stat().st_mtime_ns
    assert build() == library and library.stat().st_mtime_ns == built
    monkeypatch.setattr(nvcc, "OPTIONS", [*nvcc.OPTIONS, "-DOTHER"])
    assert build() != library, "other options are another library"


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
@pytest.mark.parametrize(
    "options", [dict(output=True, final=True), dict(states=True), dict(output=True, states=True)], ids=", ".join
)
def test_without_a_gpu_cuda_s_error_is_raised(options, built, monkeypatch):
    """The library loads, accepts its arguments and reports CUDA's error."""
    q, k, v, _, _ = delta_rule_inputs(1, 100, 1, 2, 96, 192, dtype=torch.bfloat16)
    assert cuda_op.unsupported_reason(q, v, None) is None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    chunks = Chunks.of(v, None)
    with pytest.raises(RuntimeError, match="CUDA driver|no CUDA-capable device"):
        cuda_op.forward_scan(q, k, v, Scores.empty(k, 2, chunks.count), None, None, 0.1, chunks, **options)


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
def test_the_reverse_scan_raises_it_too(built, monkeypatch):
    q, k, v, _, _ = delta_rule_inputs(1, 100, 1, 2, 96, 192, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    chunks = Chunks.of(v, None)
    with pytest.raises(RuntimeError, match="the reverse scan of .*(CUDA driver|no CUDA-capable device)"):
        cuda_op.reverse_scan(q, k, v, Scores.empty(k, 2, chunks.count), None, None, 0.1, chunks, initial=True)


def explained(monkeypatch, batch=1, heads=1, key_dim=96, processors=132, **options):
    """Return the dispatch's explanation on a Hopper GPU."""
    monkeypatch.setattr(gated_delta_rule, "_hopper_unsupported_reason", lambda q, v: None)
    monkeypatch.setattr(cuda_op, "processors", lambda device: processors)
    inputs = delta_rule_inputs(batch, 64, heads, heads, key_dim, 192, dtype=torch.bfloat16)
    return str(gated_delta_rule.explain(*inputs, **options))


@needs_nvcc
@pytest.mark.parametrize("batch, heads", [(1, 1), (1, 30), (1, 44), (4, 30)])
def test_the_dispatch_says_that_it_runs(built, monkeypatch, batch, heads):
    assert explained(monkeypatch, batch, heads).endswith("by kernels in CUDA C++)")


def test_the_dispatch_says_why_it_does_not(fresh, monkeypatch):
    assert "not its kernels in CUDA C++: they take heads of 96 and 192, not 64 and 192" in explained(
        monkeypatch, key_dim=64
    )
    assert "not its kernels in CUDA C++: they do not take documents" in explained(
        monkeypatch, cu_seqlens=torch.tensor([0, 64])
    )
    with monkeypatch.context() as patch:
        patch.setattr(cuda_op, "_library", lambda: (None, None))
        assert "by kernels in CUDA C++ and Gluon's scans: 180 blocks are one round" in explained(patch, 2, 30)
        patch.setattr(cuda_op, "segments_of", lambda *_: 4)
        assert "by kernels in CUDA C++ and Gluon's scans: two passes over 4 segments" in explained(patch)
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    assert "not its kernels in CUDA C++: nvcc was not found" in explained(monkeypatch)


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: str(compiler))
    said = explained(monkeypatch)
    assert "they could not be built" in said and said.rstrip(")").endswith("no such architecture")


@pytest.mark.parametrize(
    "hopper, unsupported, slower, kernels",
    [
        (True, None, None, Kernels(cuda_op, gluon_op, cuda_op, 1)),
        (True, None, "why", Kernels(cuda_op, gluon_op, gluon_op, 3)),
        (True, "why", None, Kernels(triton_op, gluon_op, gluon_op, 3)),
        (False, None, None, Kernels(triton_op, triton_op, triton_op, 3)),
    ],
)
def test_which_kernels_run(monkeypatch, hopper, unsupported, slower, kernels):
    monkeypatch.setattr(cuda_op, "unsupported_reason", lambda q, v, cu_seqlens: unsupported)
    monkeypatch.setattr(cuda_op, "slower_scans_reason", lambda q, v: slower)
    monkeypatch.setattr(triton_op, "segments_of", lambda *_: 3)
    q, _, v, _, _ = delta_rule_inputs(1, 64, 1, 1, 96, 192)
    assert choose_kernels(q, v, None, hopper) == kernels
