#!/usr/bin/env python
"""Run `megatron-hybrid calibrate` from the checkout."""

from megatron_hybrid.cli.calibrate import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
