#!/usr/bin/env python
"""Run `megatron-hybrid preprocess` from the checkout."""

import sys

from megatron_hybrid.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
