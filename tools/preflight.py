#!/usr/bin/env python
"""Run `megatron-hybrid preflight` from the checkout."""

import sys

from megatron_hybrid.cli.preflight import main

if __name__ == "__main__":
    sys.exit(main())
