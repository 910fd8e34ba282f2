#!/usr/bin/env python
"""Run `megatron-hybrid convert from-olmo-core` from the checkout."""

import sys

from megatron_hybrid.cli.convert_from_olmo_core import main

if __name__ == "__main__":
    sys.exit(main())
