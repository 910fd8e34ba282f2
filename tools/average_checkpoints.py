#!/usr/bin/env python
"""Run `megatron-hybrid average` from the checkout."""

import sys

from megatron_hybrid.base.output import quiet_on_closed_pipe
from megatron_hybrid.cli.average import main

if __name__ == "__main__":
    with quiet_on_closed_pipe():
        sys.exit(main())
