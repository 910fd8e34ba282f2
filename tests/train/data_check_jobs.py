"""Jobs of test_data_check.py, which run on ranks."""

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data import validate
from megatron_hybrid.train import data_check


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
