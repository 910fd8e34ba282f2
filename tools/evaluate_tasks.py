#!/usr/bin/env python
"""Run `megatron-hybrid evaluate-tasks` from the checkout."""

from megatron_hybrid.cli.evaluate_tasks import main
from megatron_hybrid.cli.main import run_tool

if __name__ == "__main__":
    run_tool(main)
