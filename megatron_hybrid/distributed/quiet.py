"""Silence output of libraries that no user can act on.

The packages checkpoint, convert and train call `silence_known_warnings` when they are imported, and so does
distributed/process_groups.py. A run itself reports what it uses instead of Transformer Engine, Apex or CUDA.
"""

import ctypes
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_WARNINGS = (
    ".*Transformer Engine and Apex are not installed.*",
    ".*Apex is not installed.*",
    ".*full scope is deprecated.*",  # megatron-core's own default value
    ".*MimoModelConfig is experimental.*",
    ".*grad attribute of a Tensor that is not a leaf.*",  # megatron-core's FP32 distributed optimizer reads it on purpose
    ".*torch.jit.script.* is deprecated.*",
    # `setup_device` has selected the rank's device. init_process_group(device_id=...) would also silence it, but then NCCL connects
    # every group of megatron-core at once, including those that a run never uses.
    r".*barrier\(\): using the device under current context.*",
    ".*Detected a JAX installation but could not find the shared object.*",  # Transformer Engine; we use its torch part
)
_USER_BUFFER_BANNER = re.compile(
    rb"!!! \[UB(P2P)?\]|UB_TIMEOUT is set to|UB: warning region \d+ size .* without MC access"
)
"""Lines that Transformer Engine's user buffers print from C++ and Python. Regions have no multicast because copies do not use it."""

_LONGEST_COPY_S = 5.0


def silence_known_warnings() -> None:
    """Ignore these warnings in the whole process. Call it before megatron-core is imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # invalid escape sequences in the sources of installed packages
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\]site-packages[/\\]")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
        lambda record: (
            "full_param_layout not provided" not in record.getMessage()
        )  # it then computes what we would pass
    )


@contextmanager
def without_user_buffer_banners() -> Iterator[None]:
    """Remove the banners of user buffers from standard output and error, also those that C++ prints. Other lines pass."""
    pumps = [_Pump(descriptor) for descriptor in (1, 2) if _is_open(descriptor)]
    try:
        yield
    finally:
        _flush()
        for pump in pumps:
            pump.restore()


def _is_open(descriptor: int) -> bool:
    with suppress(OSError):
        return os.fstat(descriptor) is not None
    return False


def _flush() -> None:
    """Flush the buffers of Python and of C, whose lines go where the descriptors point when they are written."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    ctypes.CDLL(None).fflush(None)


class _Pump(threading.Thread):
    """Thread that copies the lines of a descriptor, except for banners, to where it pointed before."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(name="user buffer banners", daemon=True)
        _flush()
        self._descriptor, self._before = descriptor, os.dup(descriptor)
        self._end, write_end = os.pipe()
        os.dup2(write_end, descriptor)
        os.close(write_end)
        self.start()

    def run(self) -> None:
        with open(self._end, "rb") as lines, open(self._before, "wb", buffering=0) as before:
            for line in lines:
                with suppress(OSError):  # a full disk: the lines are lost, as they would be without this thread
                    if not _USER_BUFFER_BANNER.match(line):
                        before.write(line)

    def restore(self) -> None:
        """Point the descriptor where it pointed before, and wait until all lines are copied."""
        os.dup2(self._before, self._descriptor)
        self.join(_LONGEST_COPY_S)
