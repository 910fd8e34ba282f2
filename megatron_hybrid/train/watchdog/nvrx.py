"""Heartbeats and sections for NVIDIA's Resiliency Extension (NVRx), whose `ft_launcher` restarts ranks that make no progress.

Messages are sent by the watchdog's thread, so a monitor that does not answer never delays training. The limits are those of
`ft_launcher`: NVRx can compute them from times that it has seen, but it needs a collective of all ranks for that.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Self

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
"""Set by ft_launcher for its ranks."""
PACKAGE = "nvidia_resiliency_ext"


class RankMonitor:
    """Connection to ft_launcher's monitor of this rank.

    Args:
        client: NVRx's RankMonitorClient, connected.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._timed = set(client.cfg.rank_section_timeouts)
        """Sections that have a limit. The monitor of NVRx 0.4 fails on others."""
        self._open: str | None = None

    @classmethod
    def connect(cls) -> Self | None:
        """Connect to the monitor; None if ft_launcher did not start this process."""
        if _SOCKET not in os.environ or find_spec(PACKAGE) is None:
            return None
        client = import_module(f"{PACKAGE}.fault_tolerance").RankMonitorClient()
        client.init_workload_monitoring()
        return cls(client)

    def report(self, section: str | None, has_trained: bool) -> None:
        """Report progress: begin the section again, and send a heartbeat.

        The first heartbeat follows the first step: until then, ft_launcher's limit for the first heartbeat applies.

        Args:
            section: `setup`, `step` or `checkpointing`, the sections of Megatron-LM; None: out of section.
        """
        if self._open is not None:
            self._client.end_section(self._open)
            self._open = None
        if section in self._timed:
            self._client.start_section(section)
            self._open = section
        if has_trained:
            self._client.send_heartbeat()

    def close(self) -> None:
        """End monitoring: nothing that follows is a hang."""
        self._client.shutdown_workload_monitoring()
