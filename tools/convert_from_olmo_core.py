#!/usr/bin/env python
"""Run `megatron-hybrid convert from-olmo-core` from the checkout."""

from megatron_hybrid.cli.convert_from_olmo_core import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
