"""The trainer's own path on GPUs: one GPU against the CPU of the same machine, layouts and formats against one GPU."""

from importlib.util import find_spec

import pytest
import torch

from testing import gpu_jobs as jobs
from testing import two_launchers


@pytest.fixture(scope="session")
def on_cpu():
    return jobs.on_cpu()


@pytest.fixture(scope="session")
def on_one_gpu(tmp_path_factory):
    return jobs.on_one_gpu(tmp_path_factory.mktemp("resumed"))


@pytest.fixture(scope="session")
def on_several():
    """Results of layouts by the number of ranks, which share a GPU if there are too few."""
    return {count: jobs.on_several(count) for count in jobs.LAYOUTS}


def check(expected: dict, found: dict, tolerance: float, norms: float = 10) -> None:
    """Losses within the tolerance, gradient norms within some times it."""
    for what, allowed in (("losses", tolerance), ("norms", norms * tolerance)):
        worst = jobs.difference(expected, found, what)
        assert worst <= allowed, f"{what}: {worst:.2e} apart: {expected[what]} and {found[what]}"


def check_held(without: dict, found: dict) -> None:
    """The bytes are those that a forward pass would cast; a matrix product may take another kernel for where they lie."""
    check(without, found, 2e-3)
    assert found["losses"][0] == pytest.approx(without["losses"][0], rel=1e-4)
    if "otherwise" in found:  # its checkpoint, read by a run without
        assert found["same_casts"] is not False
        check(without, {"losses": found["otherwise"], "norms": found["norms"]}, 2e-3)


needs_te = pytest.mark.skipif(not find_spec("transformer_engine"), reason="Transformer Engine is not installed")


@pytest.mark.parametrize(("name", "tolerance"), [*((name, 1e-4) for name in jobs.IN_FP32), ("bf16, local", 1e-2)])
def test_same_curve_as_the_cpu(name, tolerance, on_cpu, on_one_gpu):
    check(on_cpu.get(name, on_cpu["fp32"]), on_one_gpu[name], tolerance)


@needs_te
@pytest.mark.parametrize("more", ["", ", YaRN", jobs.SUITE, jobs.DOCUMENTS])
def test_transformer_engine_parts_have_the_same_curve(more, on_cpu, on_one_gpu):
    check(on_cpu[f"fp32{more}"], on_one_gpu[f"bf16{more}"], 1e-2)


@needs_te
@pytest.mark.parametrize(
    "name", [*jobs.FORMATS, *(f"{name}, full recompute" for name in ("fp8 tensorwise", "fp8 tensorwise, attention"))]
)
def test_fp8_stays_near_bf16(name, on_one_gpu):
    check(on_one_gpu["bf16"], on_one_gpu[name], 2e-2)


@needs_te
@pytest.mark.parametrize("more", [jobs.DOCUMENTS, jobs.SUITE])
@pytest.mark.parametrize("name", jobs.DOCUMENT_FORMATS)
def test_fp8_stays_near_bf16_with_more(name, more, on_one_gpu):
    check(on_one_gpu[f"bf16{more}"], on_one_gpu[f"{name}{more}"], 2e-2)


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count, names in jobs.DOCUMENT_LAYOUTS.items() for name in names]
)
def test_documents_under_a_layout_have_one_gpus_curve(count, name, on_one_gpu, on_several):
    name = f"{name}{jobs.DOCUMENTS}"
    check(on_one_gpu[jobs.one_gpu_of(name)], on_several[count][name], 1e-4)


@needs_te
def test_selective_recompute_changes_nothing(on_one_gpu):
    assert on_one_gpu["bf16, selective recompute"]["losses"] == on_one_gpu["bf16"]["losses"]


@needs_te
@pytest.mark.parametrize(("name", "without"), [*jobs.HELD.items(), *jobs.SKIPPED.items()])
def test_weights_held_in_fp8_change_next_to_nothing(name, without, on_one_gpu):
    check_held(on_one_gpu[without], on_one_gpu[name])


@needs_te
@pytest.mark.parametrize("name", [*jobs.RESUMED, *jobs.SKIPPED])
def test_resuming_is_bit_identical(name, on_one_gpu):
    result = on_one_gpu[name]
    assert result["resumed"] == result["losses"]
    assert result["same_parameters"]


@pytest.mark.parametrize("name", jobs.OFFLOADED)
def test_state_in_host_memory_changes_next_to_nothing(name, on_one_gpu):
    without, _ = jobs.OFFLOADED[name]
    if name not in on_one_gpu:
        pytest.skip("Transformer Engine is not installed")
    found, tolerance = on_one_gpu[name], 1e-5 if without == "fp32" else 2e-3
    check(on_one_gpu[without], found, tolerance)
    check(on_one_gpu[without], {"losses": found["otherwise"], "norms": found["norms"]}, tolerance)
    if jobs.same_bits(name):
        assert found["resumed"] == found["losses"]
        assert found["same_parameters"]
    else:
        check(found, {"losses": found["resumed"], "norms": found["norms"]}, 1e-6)
    assert found["unchanged"]


@pytest.mark.parametrize(
    ("count", "name"), [(count, name) for count, names in jobs.OFFLOADED_LAYOUTS.items() for name in names]
)
def test_state_in_host_memory_under_a_layout_has_one_gpus_curve(count, name, on_one_gpu, on_several):
    check(on_one_gpu["fp32, wide"], on_several[count][f"{name}{jobs.HALF}"], 1e-4)


@pytest.mark.parametrize(("count", "name"), [(count, name) for count, names in jobs.LAYOUTS.items() for name in names])
def test_every_layout_has_one_gpus_curve(count, name, on_one_gpu, on_several):
    check(on_one_gpu[jobs.one_gpu_of(name)], on_several[count][name], 1e-4)


@needs_te
@pytest.mark.parametrize(
    ("count", "parallel", "name"),
    [
        (count, parallel, name)
        for count, layouts in jobs.FP8_LAYOUTS.items()
        for parallel in layouts
        for name in jobs.fp8_formats(count)
    ],
)
def test_fp8_under_a_layout_has_one_gpus_curve(count, parallel, name, on_one_gpu, on_several):
    check(on_one_gpu[name], on_several[count][f"{parallel}, {name}"], 1e-2)


@needs_te
@pytest.mark.parametrize("parallel", jobs.FP8_LAYOUTS[2])
@pytest.mark.parametrize("name", [name for name in jobs.FP8_FORMATS if name in jobs.HELD])
def test_weights_held_in_fp8_change_next_to_nothing_under_a_layout(parallel, name, on_several):
    found, without = (on_several[2][f"{parallel}, {fmt}"] for fmt in (name, jobs.HELD[name]))
    check_held(without, found)
    assert found["same_casts"]
    assert found["resumed"] == found["losses"]
    assert found["same_parameters"]


@pytest.fixture(scope="session")
def launchers(tmp_path_factory):
    return two_launchers.curves(tmp_path_factory.mktemp("launchers"), two_launchers.STEPS)


@pytest.mark.parametrize("layout", two_launchers.LAYOUTS)
def test_two_launchers_have_the_curve_of_one(layout, launchers):
    one, two = launchers
    check(one, two[layout], 1e-4)


@pytest.fixture(scope="session")
def overlapped():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    return jobs.overlapped()


@needs_te
@pytest.mark.parametrize("name", jobs.OVERLAPPED)
def test_overlapped_tensor_parallelism_has_the_same_curve(name, overlapped):
    check(*overlapped[name], 5e-3)  # other kernels multiply the pieces
