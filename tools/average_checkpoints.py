#!/usr/bin/env python
"""Run `megatron-hybrid average` from the checkout."""

import sys

from megatron_hybrid.cli.average import main

if __name__ == "__main__":
    sys.exit(main())
