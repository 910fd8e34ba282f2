#!/usr/bin/env python
"""Run `megatron-hybrid plan` from the checkout."""

from megatron_hybrid.cli.main import run_tool
from megatron_hybrid.cli.plan import main

if __name__ == "__main__":
    run_tool(main)
