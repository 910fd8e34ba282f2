#!/usr/bin/env python
"""Run `megatron-hybrid check-data` from the checkout."""

from megatron_hybrid.cli.check_data import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
