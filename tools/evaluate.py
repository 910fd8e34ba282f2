#!/usr/bin/env python
"""Run `megatron-hybrid evaluate` from the checkout."""

import sys

from megatron_hybrid.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
