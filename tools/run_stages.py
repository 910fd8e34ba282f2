#!/usr/bin/env python
"""Run `megatron-hybrid run-stages` from the checkout."""

import sys

from megatron_hybrid.cli.run_stages import main

if __name__ == "__main__":
    sys.exit(main())
