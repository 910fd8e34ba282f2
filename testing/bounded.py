"""Work in a forked process whose address space may grow by 300 MB, and which is killed after 10 s of CPU time.

The limit of time ends what grows without bound. How long each bad input really takes is measured by benchmarks/bad_input.py: a
closer limit would fail on a busy machine.
"""

import gc
import os
import resource
from collections.abc import Callable
from pathlib import Path

from megatron_hybrid.base.errors import UserError

ROOM_BYTES, CPU_SECONDS = 300 << 20, 10


def outcome(work: Callable[[], object]) -> str:
    """Run `work` in a forked process with limited memory and CPU time; return the type of its error, or its text.

    Returns:
        "no error", "refused" for a user error, the text of any other error, or the process's status (a signal is negative).
    """
    out, into = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGESIZE") + ROOM_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            gc.freeze()  # what the tests have loaded is no part of the work: no collection looks through it
            told = "no error"
            try:
                work()
            except UserError:
                told = "refused"
            except BaseException as error:  # noqa: BLE001 - reported to the test
                told = repr(error)[:300]
            os.write(into, told.encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        told = pipe.read()
    _, status = os.waitpid(pid, 0)
    return told or f"ended with status {os.waitstatus_to_exitcode(status)}"


def refused(work: Callable[[], object]) -> None:
    """Assert that `work` ends in a user error within the bounds."""
    assert outcome(work) == "refused"
