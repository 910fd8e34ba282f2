#!/usr/bin/env python
"""Run `megatron-hybrid launch` from the checkout."""

import signal

if __name__ == "__main__":  # keep requests to stop pending until they are handled
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])

# ruff: noqa: E402
from megatron_hybrid.cli.launch import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
