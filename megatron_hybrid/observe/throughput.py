"""How fast and how full: tokens/s, TFLOP/s, MFU and memory.

Tokens/s are those of all devices together; TFLOP/s and MFU are of one device. FLOPs are the model's (forward and
backward, nothing for recomputation), so MFU compares layouts fairly. Evaluation and checkpoints do not count as time.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Dense bf16 TFLOP/s by words of the device's name, the most specific first. NVIDIA's data sheets mostly give them with
# sparsity, which doubles them.
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
    """Peak dense bf16 TFLOP/s of a device by its name, as `torch.cuda.get_device_name` gives it; None: not known."""
    # "NVIDIA A100-SXM4-80GB": whole words, so that an A1000 is not taken for an A100.
    words = (device_name or "").upper().replace("-", " ").split()
    if "MIG" in words:  # a slice of a device
        return None
    for needed, peak in PEAK_BF16_TFLOPS:
        if all(word.upper() in words for word in needed):
            return peak
    return None


class StepClock:
    """Wall-clock seconds between laps, without what is paused."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._paused = 0.0
        self._depth = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time within does not count: evaluation, checkpoints, plots. May be nested."""
        start, self._depth = self._now(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._paused += self._now() - start

    def lap(self) -> float:
        """Seconds since the last lap (or the start), at least a microsecond. Begins the next."""
        now = self._now()
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        return max(seconds, 1e-6)


def rates(
    tokens: int, seconds: float, num_devices: int, flops_per_token: float | None, peak: float | None
) -> dict[str, float]:
    """`tokens_per_s`, and where they can be known `tflops` (a device) and `mfu` (a share, 0 to 1)."""
    per_second = tokens / seconds
    result = {"tokens_per_s": per_second}
    if flops_per_token is not None:
        result["tflops"] = per_second * flops_per_token / num_devices / 1e12
        if peak is not None:
            result["mfu"] = result["tflops"] / peak
    return result


def memory_gb(cuda: bool) -> float:
    """In 10^9 bytes: the most that CUDA tensors took so far on this rank's device, or the process's resident memory."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import psutil

    return psutil.Process().memory_info().rss / 1e9
