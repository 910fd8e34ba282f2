#!/usr/bin/env python
"""Run `megatron-hybrid verify` from the checkout."""

from megatron_hybrid.cli.main import run_tool
from megatron_hybrid.cli.verify import main

if __name__ == "__main__":
    run_tool(main)
