"""What test_data_check.py and test_inference.py run on ranks."""

import contextlib
import io
import sys
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data import validate
from megatron_hybrid.distributed.process_groups import leave_groups
from megatron_hybrid.train import data_check
from testing import jobs


def check(config: dict, all_at_once: bool = False, missing_on: int | None = None) -> dict:
    """The check of a run's data on this rank: what it read, and its error. No collective is allowed.

    Args:
        all_at_once: no rank ends its first piece before every rank has begun one. missing_on: a rank that finds no file.
    """
    run = RunConfig(**config)
    read, real = [], validate.scan
    store = dist.distributed_c10d._get_default_store()

    def scan(shard, *arguments):
        read.append((Path(shard.path).name, *arguments[1:]))
        if all_at_once:
            store.set(f"began/{dist.get_rank()}", "")
            store.wait([f"began/{rank}" for rank in range(dist.get_world_size())], timedelta(minutes=4))
        return real(shard, *arguments)

    def refuse_collective(*arguments, **options):
        raise AssertionError("a collective waits for the check")

    validate.scan, validate.PIECE_BYTES, validate._THREADS = scan, 2000, 1
    for name in ("barrier", "broadcast", "all_reduce", "all_gather", "broadcast_object_list", "all_gather_object"):
        setattr(dist, name, refuse_collective)
    if dist.get_rank() == missing_on:
        run = run.model_copy(update={"data": run.data.model_copy(update={"train": (_gone(run),)})})
    try:
        data_check.open_data(run)
        return {"read": read, "error": None}
    except UserError as error:
        return {"read": read, "error": str(error), "printed_by": error.printed_by}


def _gone(run: RunConfig):
    return run.data.train[0].model_copy(update={"path": "/nowhere/gone.npy"})


def tools_on_a_run(config: dict, calls: list[tuple[str, list[str]]]) -> list[tuple[int, str, str]]:
    """Train a run, then call tools on it in this process: (status, stdout, stderr) of each call."""
    jobs.pretrain_run(config)
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
