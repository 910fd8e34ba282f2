"""Ranks that tests on GPUs start on one GPU, and launchers that they start as nodes: here on the CPU."""

import json
import os
import sys
import time

import pytest

from testing import gpu_jobs, shared_gpu, two_launchers

RANK = """
import json, os, pathlib, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank())])
dist.all_reduce(total)
mine = {name: os.environ[name] for name in ("NCCL_HOSTID", "LOCAL_RANK")}
pathlib.Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(mine | {"total": total.item()}))
dist.barrier()
"""
FAILING = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("rank 1 has had enough")
time.sleep(300)
"""


def run(script: str, folder, timeout_s: float = 100) -> tuple[int, str]:
    return shared_gpu.run_ranks([sys.executable, "-c", script, str(folder)], 3, os.environ, folder, timeout_s)


def test_ranks_join_as_the_only_ones_of_their_nodes(tmp_path):
    assert run(RANK, tmp_path)[0] == 0
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert found == [{"NCCL_HOSTID": f"host-{rank}", "LOCAL_RANK": "0", "total": 3.0} for rank in range(3)]


def test_a_rank_that_fails_ends_the_others(tmp_path):
    start = time.monotonic()
    status, said = run(FAILING, tmp_path)
    assert status == 1 and "rank 1 has had enough" in said and time.monotonic() - start < 60


def test_ranks_that_take_too_long_are_ended(tmp_path):
    assert run("import time; time.sleep(300)", tmp_path, timeout_s=0.5)[0] == -1


@pytest.mark.slow
def test_two_launchers_have_the_curve_of_one(tmp_path):
    one, two = two_launchers.curves(tmp_path, 2, ["PP2"], cpu=True)
    assert len(one["losses"]) == 2
    assert gpu_jobs.difference(one, two["PP2"], "losses") < 1e-6
    assert gpu_jobs.difference(one, two["PP2"], "norms") < 1e-5


def test_a_launcher_that_fails_says_why(tmp_path):
    config = two_launchers.write_run(tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"status 78:(.|\n)*train.steps"):
        two_launchers.curve(config, tmp_path / "run", [{}], "train.steps=none", cpu=True)
