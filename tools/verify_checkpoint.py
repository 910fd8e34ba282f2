#!/usr/bin/env python
"""Run `megatron-hybrid verify` from the checkout."""

import sys

from megatron_hybrid.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
