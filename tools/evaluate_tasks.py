#!/usr/bin/env python
"""Run `megatron-hybrid evaluate-tasks` from the checkout."""

import sys

from megatron_hybrid.cli.evaluate_tasks import main

if __name__ == "__main__":
    sys.exit(main())
