"""The kernels in CUDA C++: their build, the compiler's report on them, and the dispatch's reason without them."""

import re
import types

import pytest
import torch

pytest.importorskip("triton")
from hybrid_kernels import gated_delta_rule, nvcc  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.cuda import op as cuda_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton import op as triton_op  # noqa: E402
from hybrid_kernels.gated_delta_rule.backends.triton.chunks import Chunks, Scores  # noqa: E402
from hybrid_kernels.gated_delta_rule.kernels import Kernels, choose_kernels  # noqa: E402
from hybrid_kernels.testing import delta_rule_inputs  # noqa: E402
from tests.kernels.cuda_sources import assembler_says  # noqa: E402

needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="nvcc is not installed")


WRAPPER = """#!/bin/sh
exec "{nvcc}" -Xptxas -v "$@" 2>>"{report}"
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Build the library for key dimension 96 once, because nvcc takes seconds.

    Returns: its cache folder, and the assembler's report on each source.
    """
    folder = tmp_path_factory.mktemp("library")
    compiler, report = folder / "nvcc", folder / "report.txt"
    compiler.write_text(WRAPPER.format(nvcc=nvcc.find_nvcc(), report=report))
    compiler.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        nvcc.build(str(compiler), "gated_delta_rule_96", cuda_op.SOURCES, cuda_op.HEADERS, ["KEY_DIM=96"])
    said = report.read_text()
    assert "warning" not in said, said
    reports = re.split(r"^ptxas info +: \d+ bytes gmem", said, flags=re.MULTILINE)[1:]
    return folder, dict(zip(cuda_op.SOURCES, reports, strict=True))


@pytest.fixture
def built(fresh, library, monkeypatch):
    """Load nothing yet in this process; the library is in the cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(library[0]))
    monkeypatch.setattr(nvcc, "_compile", None)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Empty cache folder, with nothing built yet in this process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    cuda_op._library.cache_clear()
    yield tmp_path
    cuda_op._library.cache_clear()


@needs_nvcc
@pytest.mark.parametrize("key_dim", cuda_op.KEY_DIMS)
@pytest.mark.parametrize(
    "source, kernels, threads",
    list(zip(cuda_op.SOURCES[1:], (4, 2, 1), (192, 192, 384), strict=True)),
    ids=lambda x: getattr(x, "stem", x),
)
def test_gemms_overlap_and_nothing_spills(source, kernels, threads, key_dim, library, tmp_path):
    """Registers: of `gradients`, those that a block is launched with. Its warpgroups share them out (gradients.cuh)."""
    said = library[1][source] if key_dim == 96 else assembler_says(tmp_path, source, key_dim)
    assert said.count("Compiling entry function") == said.count(f"{source.stem}_kernel") // 2 == kernels
    assert said.count(" 0 bytes spill stores, 0 bytes spill loads") == kernels
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", said)]
    assert len(registers) == kernels and max(registers) <= min(255, 65536 // threads // 8 * 8), registers
    assert "C75" not in said, said  # the assembler waits for every GEMM


@needs_nvcc
def test_it_is_built_once(fresh, monkeypatch, tmp_path):
    source = tmp_path / "one.cu"
    source.write_text('extern "C" int one() { return 1; }\n')

    def build():
        return nvcc.build(nvcc.find_nvcc(), "one", [source])

    library = build()
    assert library.parent.parent == fresh and library.stat().st_size > 0
    built = library.stat().st_mtime_ns
    assert build() == library and library.stat().st_mtime_ns == built
    monkeypatch.setattr(nvcc, "OPTIONS", [*nvcc.OPTIONS, "-DOTHER"])
    assert build() != library, "other options are another library"


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
@pytest.mark.parametrize(
    "options",
    [
        dict(output=True, final=True),
        dict(states=True),
        dict(output=True, states=True),
        dict(final=True, transition=True),
    ],
    ids=", ".join,
)
def test_without_a_gpu_cuda_s_error_is_raised(options, built, monkeypatch):
    """The library loads, accepts its arguments and reports CUDA's error."""
    q, k, v, _, _ = delta_rule_inputs(1, 100, 1, 2, 96, 192, dtype=torch.bfloat16)
    assert cuda_op._library(96)[1] is None
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


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tests/gpu runs it")
def test_gradients_raise_it_too(built, monkeypatch):
    q, k, v, g, beta = delta_rule_inputs(1, 100, 1, 2, 96, 192, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=0))
    chunks = Chunks.of(v, None)
    (states, new_values), G = chunks.states_like(v, 96), Scores.empty(k, 2, chunks.count).G
    with pytest.raises(RuntimeError, match="the gradients of .*(CUDA driver|no CUDA-capable device)"):
        cuda_op.gradients(q, k, g, beta, v, v, G, states, new_values, states, 0.1, chunks, False)


def test_a_missing_compiler_is_named(fresh, monkeypatch):
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    assert "nvcc was not found" in cuda_op._library(96)[1]


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "nvcc"
    compiler.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: str(compiler))
    reason = cuda_op._library(96)[1]
    assert "could not be built" in reason and reason.endswith("no such architecture")


def test_the_dispatch_explains_its_choice(monkeypatch):
    inputs = delta_rule_inputs(1, 4096, 8, 8, 96, 192, dtype=torch.bfloat16)
    assert "not cuda: tensors are not on a CUDA device" in str(gated_delta_rule.explain(*inputs))
    monkeypatch.setattr(gated_delta_rule, "_cuda_unsupported_reason", lambda q, v: None)
    monkeypatch.setattr(cuda_op, "processors", lambda device: 132)
    choice = str(gated_delta_rule.explain(*inputs))
    assert choice.startswith("gated_delta_rule: cuda (") and "segments for its few heads" in choice


@pytest.mark.parametrize(
    "batch, heads, length, documents, segments",
    [(1, 30, 8192, False, 1), (1, 15, 8192, False, 1), (1, 8, 8192, False, 5), (1, 8, 8192, True, 1)],
)
def test_few_heads_are_cut_in_segments(batch, heads, length, documents, segments, monkeypatch):
    monkeypatch.setattr(cuda_op, "processors", lambda device: 132)
    v = torch.empty(1, 1, 1, 192).expand(batch, length, heads, -1)
    assert cuda_op.segments_of(v, 96, torch.tensor([0, length]) if documents else None) == segments


def test_each_backend_runs_its_own_scans():
    q, _, v, _, _ = delta_rule_inputs(1, 64, 1, 1, 96, 192)
    assert choose_kernels("cuda", q, v, None) == Kernels(cuda_op, 1)
    assert choose_kernels("triton", q, v, None) == Kernels(triton_op, 1)
