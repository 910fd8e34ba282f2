"""Throughput: tokens/s, TFLOP/s, MFU, goodput and memory.

Tokens/s are of all devices; TFLOP/s and MFU are per device. FLOPs are those of the model, forward and backward without recompute,
so that MFU compares layouts. Evaluation and checkpoints count as time only in the goodput.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Dense bf16 TFLOP/s by words of the device's name, the most specific first. NVIDIA's data sheets mostly give values with
# sparsity, which are twice as high.
PEAK_BF16_TFLOPS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("H100", "PCIe"), 756.0),
    (("H100", "NVL"), 835.0),
    (("H100",), 989.0),
    (("H200", "NVL"), 835.0),
    (("H200",), 989.0),
    (("GH200",), 989.0),
    (("GB200",), 2500.0),
    (("B200",), 2250.0),
    (("A100",), 312.0),
    (("L40S",), 362.0),
)


def peak_tflops(device_name: str | None) -> float | None:
    """Return the peak dense bf16 TFLOP/s of a device by its name in `torch.cuda.get_device_name`. None: unknown."""
    # Compare whole words ("NVIDIA A100-SXM4-80GB"): an A1000 is not an A100.
    words = (device_name or "").upper().replace("-", " ").split()
    if "MIG" in words:  # a slice of a device
        return None
    for needed, peak in PEAK_BF16_TFLOPS:
        if all(word.upper() in words for word in needed):
            return peak
    return None


class StepClock:
    """Clock of the seconds between laps, without pauses."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = self._begin = now()
        self._paused = 0.0
        self._depth = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Return a context whose time does not count: evaluation, checkpoints, plots. It may be nested."""
        start, self._depth = self._now(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += self._now() - start

    def lap(self) -> float:
        """Return the seconds since the last lap or the start, at least one microsecond, and begin the next lap."""
        now = self._now()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-6)

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made, pauses included, at least one microsecond."""
        return max(self._now() - self._begin, 1e-6)


def rates(
    tokens: int,
    seconds: float,
    num_devices: int,
    flops_per_token: float | None,
    peak: float | None,
    format_speedup: float | None = None,
) -> dict[str, float]:
    """Return `tokens_per_s`, and if known `tflops` (per device), `mfu` (0 to 1) and `format_mfu`.

    Args:
        peak: dense bf16 TFLOP/s, against which `mfu` is taken.
        format_speedup: peak of the linears' format over that of bf16: arch.fp8_recipes.FP8_SPEEDUP in FP8. None: unknown, no
            `format_mfu`, which is taken against it.
    """
    per_second = tokens / seconds
    result = {"tokens_per_s": per_second}
    if flops_per_token is not None:
        result["tflops"] = per_second * flops_per_token / num_devices / 1e12
        if peak is not None:
            result["mfu"] = result["tflops"] / peak
            if format_speedup is not None:
                result["format_mfu"] = result["mfu"] / format_speedup
    return result


def memory_gb(cuda: bool) -> float:
    """Return the peak memory of CUDA tensors on this rank's device, or the process's resident memory, in 10^9 bytes."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e9
