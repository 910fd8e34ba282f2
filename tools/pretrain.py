#!/usr/bin/env python
"""Run `megatron-hybrid pretrain` from the checkout."""

import signal

if __name__ == "__main__":  # keep requests to stop pending until they are handled
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])

# ruff: noqa: E402
import sys

from megatron_hybrid.base.output import quiet_on_closed_pipe
from megatron_hybrid.cli.pretrain import main

if __name__ == "__main__":
    with quiet_on_closed_pipe():
        sys.exit(main())
