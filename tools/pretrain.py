#!/usr/bin/env python
"""Run `megatron-hybrid pretrain` from the checkout."""

import signal

if __name__ == "__main__":  # keep requests to stop pending until they are handled
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])

# ruff: noqa: E402
from megatron_hybrid.cli.main import run_tool
from megatron_hybrid.cli.pretrain import main

if __name__ == "__main__":
    run_tool(main)
