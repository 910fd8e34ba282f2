#!/usr/bin/env python
"""Run `megatron-hybrid convert to-hf` from the checkout."""

import sys

from megatron_hybrid.cli.convert_to_hf import main

if __name__ == "__main__":
    sys.exit(main())
