#!/usr/bin/env python
"""Run `megatron-hybrid generate` from the checkout."""

import sys

from megatron_hybrid.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
