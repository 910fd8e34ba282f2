"""Rates by hand, the clock without its pauses, and device names."""

import pytest

from megatron_hybrid.arch.fp8_recipes import FP8_SPEEDUP
from megatron_hybrid.observe.throughput import StepClock, memory_gb, peak_tflops, rates


def test_rates_of_olmo_hybrid_7b():
    # 44.1 GFLOP a token; 7,000 tokens/s a GPU is 31% of an H100.
    result = rates(4_194_304, 4_194_304 / (7000 * 512), 512, 44.1e9, 989.0)
    assert result["tokens_per_s"] == pytest.approx(7000 * 512)
    assert result["tflops"] == pytest.approx(308.7)
    assert result["mfu"] == pytest.approx(0.3121, abs=1e-4)


def test_the_share_of_the_format_s_own_peak():
    result = rates(1000, 1.0, 1, 700e9, 989.0, format_speedup=FP8_SPEEDUP)
    assert result["mfu"] == pytest.approx(0.7078, abs=1e-4) and result["format_mfu"] == pytest.approx(0.3539, abs=1e-4)


def test_what_is_not_known_is_left_out():
    assert set(rates(10, 1.0, 1, None, 989.0)) == {"tokens_per_s"}
    assert set(rates(10, 1.0, 1, 1e9, None)) == {"tokens_per_s", "tflops"}
    assert set(rates(10, 1.0, 1, 1e9, 989.0)) == {"tokens_per_s", "tflops", "mfu"}


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
        (None, None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


def test_the_clock_leaves_pauses_out():
    now = [100.0]
    clock = StepClock(lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    wait(2)
    with clock.pause():
        wait(50)
        with clock.pause():
            wait(5)
    wait(1)
    assert clock.lap() == pytest.approx(3)
    wait(4)
    assert clock.lap() == pytest.approx(4)
    with pytest.raises(RuntimeError), clock.pause():
        wait(7)
        raise RuntimeError
    assert clock.lap() == pytest.approx(1e-6), "never zero"
    assert clock.elapsed == pytest.approx(2 + 50 + 5 + 1 + 4 + 7), "pauses included"


def test_memory_of_this_process():
    assert 0.01 < memory_gb(cuda=False) < 64
