"""Watchdog: a thread of each rank that ends the run when it hangs, prints stacks and names the lagging rank."""

from megatron_hybrid.train.watchdog.build import build_watchdog, collective_timeout
from megatron_hybrid.train.watchdog.thread import Watchdog

__all__ = ["Watchdog", "build_watchdog", "collective_timeout"]
