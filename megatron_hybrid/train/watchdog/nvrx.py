"""Heartbeats to NVIDIA's Resiliency Extension, whose `ft_launcher` restarts ranks that send none."""

import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"
"""Set by ft_launcher for its ranks."""
PACKAGE = "nvidia_resiliency_ext"


def nvrx_heartbeat() -> Callable[[], None] | None:
    """Return a function that sends a heartbeat to ft_launcher's monitor; None if ft_launcher did not start this process."""
    if _SOCKET not in os.environ or find_spec(PACKAGE) is None:
        return None
    client = import_module(f"{PACKAGE}.fault_tolerance").RankMonitorClient()
    client.init_workload_monitoring()

    def send() -> None:
        client.send_heartbeat()

    return send
