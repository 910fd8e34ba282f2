#!/usr/bin/env python
"""Run `megatron-hybrid calibrate` from the checkout."""

import sys

from megatron_hybrid.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
