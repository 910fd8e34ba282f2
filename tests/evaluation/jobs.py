"""Jobs of test_tools.py, which run on ranks."""

import contextlib
import io
import sys

from megatron_hybrid.distributed.process_groups import leave_groups
from testing import jobs


def tools_on_a_run(config: dict, calls: list[tuple[str, list[str]]]) -> list[tuple[int, str, str]]:
    """Train a run, then call tools on it in this process: (status, stdout, stderr) of each call."""
    jobs.pretrain_run(config)
    return tools(calls)


def tools(calls: list[tuple[str, list[str]]]) -> list[tuple[int, str, str]]:
    """Call tools in this process: (status, stdout, stderr) of each call."""
    results = []
    for tool, arguments in calls:
        leave_groups()
        results.append(_call(tool, arguments))
    return results


def _call(tool: str, arguments: list[str]) -> tuple[int, str, str]:
    from importlib import import_module

    from megatron_hybrid.distributed import process_groups as launch

    launch.stop_distributed = lambda: None  # the next call uses the same process group
    out, err, status = io.StringIO(), io.StringIO(), 0
    sys.argv = [f"tools/{tool}.py", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            import_module(f"tools.{tool}").main()
        except SystemExit as end:
            status = end.code or 0
    return status, out.getvalue(), err.getvalue()
