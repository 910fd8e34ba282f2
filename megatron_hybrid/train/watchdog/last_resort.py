"""Exit with a given status without Python: for a main thread that hangs in C++ while it holds the GIL."""

import contextlib
import ctypes
import faulthandler
from typing import TextIO

_CLOCK_MONOTONIC, _SIGEV_THREAD = 1, 2  # linux/time.h, bits/sigevent-consts.h
_STACKS_FIRST_S = 1.0


class _Event(ctypes.Structure):
    """struct sigevent of Linux with a function that a new thread calls."""

    _fields_ = [
        ("value", ctypes.c_size_t),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("padding", ctypes.c_byte * 32),
    ]


class _Interval(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = [(name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns")]


class ExitTimer:
    """Timer of the C library that prints the stacks of all threads and calls `_exit(status)`, unless it is set again in time.

    A process that is suspended for longer than the timer ends when it is resumed.
    """

    def __init__(self, status: int, output: TextIO) -> None:
        self._libc, self._output = ctypes.CDLL(None, use_errno=True), output
        self._timer = ctypes.c_void_p()
        exit_function = ctypes.cast(self._libc._exit, ctypes.c_void_p)
        event = _Event(status, 0, _SIGEV_THREAD, exit_function)
        if self._libc.timer_create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create failed")

    def set(self, seconds: float) -> None:
        """Exit after this many seconds."""
        self._settime(seconds)
        with contextlib.suppress(ValueError, AttributeError):  # the output is closed, or has no descriptor
            faulthandler.dump_traceback_later(max(seconds - _STACKS_FIRST_S, 0.1), file=self._output)

    def cancel(self) -> None:
        """Do not exit."""
        self._settime(0.0)
        faulthandler.cancel_dump_traceback_later()

    def _settime(self, seconds: float) -> None:
        whole = int(seconds)
        interval = _Interval(0, 0, whole, int((seconds - whole) * 1e9))
        if self._libc.timer_settime(self._timer, 0, ctypes.byref(interval), None):
            raise OSError(ctypes.get_errno(), "timer_settime failed")
