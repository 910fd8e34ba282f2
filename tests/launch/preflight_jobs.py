"""Functions that the tests of preflight run on ranks: several nodes on one machine, by the names that SLURM would give them."""

import contextlib
import io
import os
import shutil
from collections import namedtuple
from pathlib import Path

import torch.distributed as dist

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.preflight import PreflightConfig
from megatron_hybrid.distributed import bandwidth
from megatron_hybrid.launch import node_checks, preflight
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed

GIB = 2**30


def check(
    run_dir: str, nodes: int, odd: str | None = None, slow_nodes: str = "warn", needed: int = GIB // 1024
) -> dict:
    """The preflight, with two ranks a node; what is wrong with the last node: `odd`. What was raised, and what was printed."""
    rank, world = dist.get_rank(), dist.get_world_size()
    per_node = world // nodes
    os.environ["SLURMD_NODENAME"] = f"n{rank // per_node}"
    if rank // per_node == nodes - 1:
        _make_odd(odd, rank)

    def read_data() -> None:
        if odd == "data" and rank // per_node == nodes - 1:
            raise UserError("corpus.npy: cannot be read: Permission denied")

    folder = f"{run_dir}-elsewhere" if odd == "unshared" and rank // per_node == nodes - 1 else run_dir
    printed, raised = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        try:
            preflight.SHARED_DISK_S = 0.5
            launch = Launch(rank, rank % per_node, world)
            config = PreflightConfig(all_reduce_mib=1, slow_nodes=slow_nodes, slow_below=0.1)
            preflight.preflight(config, launch, Path(folder), needed, read_data)
        except preflight.PreflightError as error:
            raised = str(error)
    return {"raised": raised, "printed": printed.getvalue(), "left": sorted(p.name for p in Path(folder).glob("*"))}


def _make_odd(odd: str | None, rank: int) -> None:
    if odd == "version":
        versions = node_checks.versions()
        node_checks.versions = lambda: versions | {"torch": "2.10.0"}
    elif odd == "matmul" and rank % 2:
        node_checks.wrong_gemm_entries = lambda: 3
    elif odd == "disk":
        usage = namedtuple("usage", "total used free")(GIB, GIB - 100, 100)
        shutil.disk_usage = lambda path: usage
    elif odd == "fault" and rank % 2 == 0:
        node_checks.gpu_faults = lambda: ["GPU 3: 2 uncorrected ECC errors since the driver was loaded; reset the GPU"]
    elif odd == "slow":
        node_checks.matmul_tflops = lambda: 1e-9


def bandwidths(nodes: int, parallel: dict | None = None) -> dict:
    """All-reduces inside nodes and between them, and that ranks are where they were afterwards."""
    if parallel:
        start_distributed(Launch.from_environment(), ParallelConfig(**parallel), seed=0, quiet=True)
    world = dist.get_world_size()
    per_node = world // nodes
    ranks_of_nodes = [list(range(n * per_node, (n + 1) * per_node)) for n in range(nodes)]
    inside = bandwidth.all_reduce_gb_s(ranks_of_nodes, 1 << 18)
    between = bandwidth.between_gb_s(ranks_of_nodes, 1 << 18)
    dist.barrier()
    return {"inside": inside, "between": between}
