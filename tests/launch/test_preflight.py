"""The preflight over gloo: ranks that pose as several nodes, of which one is wrong in one way."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_hybrid.distributed.bandwidth import pairings
from megatron_hybrid.launch import node_checks
from megatron_hybrid.launch.preflight import RankReport, outliers, outlying_nodes, table, verdict
from tests.launch import preflight_jobs


def test_nodes_that_are_well(ranks, tmp_path):
    first, second, *_ = ranks.run(preflight_jobs.check, 4, run_dir=str(tmp_path / "run"), nodes=2)
    assert first["raised"] is second["raised"] is None and second["printed"] == "", "rank 0 speaks for all"
    lines = first["printed"].splitlines()
    assert lines[0].startswith("preflight: 2 nodes, 4 ranks")
    assert [line.split()[:2] for line in lines[2:4]] == [["n0", "2"], ["n1", "2"]]
    assert all("-" not in line.split()[4:] for line in lines[2:4]), "both bandwidths were measured"
    assert f"torch {torch.__version__}" in lines[4]
    assert first["left"] == [], "its files are gone"


@pytest.mark.parametrize(
    ("odd", "says"),
    [
        ("version", "n1: torch 2.10.0, but .* on n0"),
        ("matmul", r"n1: local rank 1 \(CPU\) gets 3 entries of a GEMM wrong; exclude the node"),
        ("disk", "n1: run_dir .* has 100 B free, and a checkpoint takes 1 MiB; make room"),
        ("data", "n1: data: corpus.npy: cannot be read: Permission denied"),
        ("fault", "n1: GPU 3: 2 uncorrected ECC errors"),
        (
            "unshared",
            "n1: run_dir .* is not the folder that n0 writes to .*set it to a folder of a file system that all",
        ),
    ],
)
def test_the_node_that_is_not_well_is_named_on_every_rank(ranks, tmp_path, odd, says):
    results = ranks.run(preflight_jobs.check, 4, run_dir=str(tmp_path / "run"), nodes=2, odd=odd)
    messages = {result["raised"] for result in results}
    assert len(messages) == 1, "all ranks raise the same"
    (message,) = messages
    assert re.search(says, message), message
    others = [line for line in message.splitlines()[1:] if not line.strip().startswith("n1: ")]
    assert odd == "version" or not others, "nobody else is blamed"
    assert results[0]["left"] == []


@pytest.mark.parametrize("slow_nodes", ["warn", "stop"])
def test_a_slow_node_is_named_and_stops_the_run_if_asked_to(ranks, tmp_path, slow_nodes):
    run = dict(run_dir=str(tmp_path / "run"), nodes=4, odd="slow", slow_nodes=slow_nodes)
    first = ranks.run(preflight_jobs.check, 4, **run)[0]
    assert "preflight: n3 local rank 0: GEMMs at 1e-09 TFLOP/s, 0% of the median" in first["printed"]
    assert (first["raised"] is None) == (slow_nodes == "warn")


@pytest.mark.parametrize("nodes", [1, 2])
def test_bandwidth_beside_the_groups_of_pipeline_stages(nodes, ranks):
    parallel = dict(tensor_parallel_size=2, pipeline_parallel_size=2)
    for result in ranks.run(preflight_jobs.bandwidths, 4, nodes=nodes, parallel=parallel):
        assert (result["inside"], result["between"]) != (None, None)


@pytest.mark.parametrize(("world", "nodes"), [(4, 2), (3, 3), (4, 4), (2, 1)])
def test_bandwidth_inside_and_between(ranks, world, nodes):
    for result in ranks.run(preflight_jobs.bandwidths, world, nodes=nodes):
        assert (result["inside"] is None) == (world == nodes) and (result["between"] is None) == (nodes == 1)
        assert all(value is None or 0 < value < 1e4 for value in result.values())


@pytest.mark.parametrize("nodes", range(1, 12))
def test_every_node_meets_both_neighbours_and_none_twice_at_once(nodes):
    rounds = pairings(nodes)
    for pairs in rounds:
        members = [node for pair in pairs for node in pair]
        assert len(members) == len(set(members)) and set(members) <= set(range(nodes))
    met = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    ring = sorted({tuple(sorted((n, (n + 1) % nodes))) for n in range(nodes) if nodes > 1})
    assert met == ring


def report(rank: int, node: str, **values) -> RankReport:
    """Return the report of a healthy H100."""
    healthy = RankReport(rank, node, rank % 2, "H100", 2, 78.0, 79.0, 700.0, inside_gb_s=400.0, between_gb_s=90.0)
    return dataclasses.replace(healthy, **values)


def test_a_slow_connection_and_a_busy_gpu():
    reports = [report(r, f"n{r // 2}") for r in range(8)]
    assert verdict(reports, 0.7) == ([], [])
    reports[4] = report(4, "n2", between_gb_s=30.0)
    reports[7] = report(7, "n3", free_gib=50.0)
    broken, slow = verdict(reports, 0.7)
    assert slow == ["n2: all-reduce with other nodes at 30 GB/s, 33% of the median 90"]
    assert broken == ["n3: local rank 1 (H100) has 50.0 of 79.0 GiB free; end the other processes on it (nvidia-smi)"]
    assert table(reports, 1.0).splitlines()[4].split()[:7] == ["n2", "2", "78.0", "79.0", "700", "400", "30"]
    reports[0].versions = {f"package {n}": "1.2.3" for n in range(12)}
    assert all(len(line) <= 80 for line in table(reports, 1.0).splitlines())
    cpu = [report(0, "vm", device="CPU", visible=0)]
    assert len(table(cpu, 1.0).splitlines()) == 1, "a node without GPUs has no peers to compare with"


def test_a_node_that_lost_a_gpu():
    reports = [report(r, f"n{r // 2}") for r in range(6)] + [report(6, "n3", visible=1)]
    broken, _ = verdict(reports, 0.7)
    assert [line.split(";")[0] for line in broken] == [
        "n3: 1 ranks, but 2 ranks on n0, n1, n2",
        "n3: 1 GPUs visible, but 2 GPUs visible on n0, n1, n2",
    ]


def test_outlying_nodes_and_outliers():
    many = {f"n{i}": "a" for i in range(9)} | {"x": "b"}
    assert outlying_nodes(many) == [("x", "b", "a", "n0, n1, n2 and 6 more")] and outlying_nodes({"n": "a"}) == []
    assert outliers({"a": 1.0, "b": 10.0, "c": 10.0}, 0.7) == {"a": 1.0} and outliers({"a": 1.0}, 0.7) == {}


def test_what_nvidia_smi_says():
    assert node_checks.faults_in("0, 0\n1, [N/A]\n2, 17\n", (node_checks._ECC,)) == [
        "GPU 2: 17 uncorrected ECC errors since the driver was loaded; reset the GPU"
    ]
    answer = "GPU-aa, 0, 0\nGPU-bb, 1, 0\nGPU-cc, No, Yes\n"
    found = node_checks.faults_in(answer, node_checks._REMAPPED)
    assert [line.split(":")[0] for line in found] == ["GPU GPU-bb", "GPU GPU-cc"]
    assert "pends; reset" in found[0] and "replace the GPU" in found[1]


def test_products_are_exact_here():
    assert node_checks.wrong_gemm_entries() == 0 and node_checks.matmul_tflops() > 0


def test_a_wrong_product_is_seen(monkeypatch):
    """A device with one stuck bit in one entry."""
    multiply = torch.Tensor.__matmul__

    def faulty(a, b):
        c = multiply(a, b)
        if c.dtype == torch.float32:
            c[3, 4] += 1
        return c

    monkeypatch.setattr(torch.Tensor, "__matmul__", faulty)
    assert node_checks.wrong_gemm_entries() == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    _, problem = node_checks.write_probe(tmp_path / "file" / "run", "n0", 0)
    assert problem and "cannot be written" in problem and "set run_dir to another folder" in problem
    free, problem = node_checks.write_probe(tmp_path / "run", "n0", 0)
    assert problem is None and free > 0


def test_our_version_names_the_commit(root):
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True)
    if commit.returncode:
        pytest.skip("not a git checkout")
    assert commit.stdout.strip() in node_checks.our_version()


@pytest.mark.slow
def test_the_command(root, tmp_path):
    """tools/preflight.py under the launcher, with a folder that it can write to, and with one that it cannot."""
    (tmp_path / "file").write_text("")
    base = [sys.executable, "tools/launch.py", "--cpu-ranks", "2", "tools/preflight.py", "olmo_hybrid_tiny"]
    np.zeros(5000, dtype="uint16").tofile(tmp_path / "tokens.npy")
    fields = [f"data.train.0.path={tmp_path}/tokens.npy", "data.sequence_length=16", "train.steps=1"]
    for run_dir, status in ((tmp_path / "run", 0), (tmp_path / "file" / "run", 78)):
        command = [*base, *fields, "train.global_batch_size=2", f"run_dir={run_dir}"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
        assert done.returncode == status, done.stdout + done.stderr
        assert "preflight: 1 node, 2 ranks" in done.stdout
        assert ("cannot be written" in done.stderr) == (status == 78) and "Traceback" not in done.stderr
