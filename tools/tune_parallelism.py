#!/usr/bin/env python
"""Run `megatron-hybrid plan` from the checkout."""

import sys

from megatron_hybrid.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
