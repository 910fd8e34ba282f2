#!/usr/bin/env python
"""Run `megatron-hybrid convert from-hf` from the checkout."""

import sys

from megatron_hybrid.cli.convert_from_hf import main

if __name__ == "__main__":
    sys.exit(main())
