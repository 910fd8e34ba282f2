#!/usr/bin/env python
"""Run `megatron-hybrid make-tasks` from the checkout."""

import sys

from megatron_hybrid.cli.make_tasks import main

if __name__ == "__main__":
    sys.exit(main())
