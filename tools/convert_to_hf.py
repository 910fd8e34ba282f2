#!/usr/bin/env python
"""Run `megatron-hybrid convert to-hf` from the checkout."""

from megatron_hybrid.cli.convert_to_hf import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
