"""Identity of a process, for lock files that other processes and hosts read."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ProcessIdentity:
    """Identity of a process among all hosts of a shared file system. A field is None if the system does not report it."""

    host: str
    pid: int
    started: str | None
    """Start time in clock ticks since boot (/proc/PID/stat): distinguishes a process from a later one with the same ID."""
    boot: str | None
    pid_namespace: str | None
    """Containers of one host may share its name, but not its process IDs."""

    @classmethod
    def current(cls) -> "ProcessIdentity":
        """Return the identity of this process."""
        pid = os.getpid()
        return cls(
            socket.gethostname(), pid, start_time(pid), _read_line("/proc/sys/kernel/random/boot_id"), _namespace()
        )

    def has_ended(self) -> bool | None:
        """Return True if this process has ended, None if it is unknown or the process is on another host or in another container."""
        here = ProcessIdentity.current()
        if None in (here.boot, here.pid_namespace):
            return None
        if (self.host, self.boot, self.pid_namespace) != (here.host, here.boot, here.pid_namespace):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process
            return False
        return start_time(self.pid) not in (None, self.started)  # otherwise, a new process has the ID


def start_time(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot, `ended` for a zombie, None if it is unknown."""
    fields = (_read_line(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _read_line(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
