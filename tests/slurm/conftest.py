"""A SLURM cluster of two nodes on loopback, and the 7B example's script run on it with a tiny model on CPU ranks."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
import yaml

from testing.models import SMALLEST
from testing.slurm_cluster import DAEMONS, Cluster, find_daemon, wait_for

SCRIPT = "examples/pretrain_hybrid_7b.sh"


@dataclass
class Example:
    """The example's script with the tiny run of this test."""

    cluster: Cluster
    root: Path
    folder: Path
    config: dict

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])

    def variables(self, **more: str) -> dict[str, str]:
        """Two CPU ranks a node, from this test's configuration."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(self.config))
        ours = {"CONFIG": str(path), "CPU_RANKS": "2", "NODES": "2", "SBATCH_TIMELIMIT": "10"}
        return ours | {"SBATCH_OUTPUT": str(self.folder / "job.log"), "LOG_DIR": str(self.folder / "logs")} | more

    def submit(self, *overrides: str, **more: str) -> CompletedProcess:
        """`bash examples/pretrain_hybrid_7b.sh` on the login node."""
        command = ("bash", self.root / SCRIPT, *overrides)
        return self.cluster.run(*command, **self.variables(**more))

    def sbatch(self, *overrides: str, **more: str) -> dict[str, str]:
        """`sbatch examples/pretrain_hybrid_7b.sh`, which checks nothing before it queues; the job when it has ended."""
        command = ("sbatch", "--parsable", "--nodes=2", SCRIPT, *overrides)
        done = self.cluster.run("env", f"--chdir={self.root}", *command, **self.variables(**more))
        assert done.returncode == 0, done.stderr
        return self.wait_for_end(done.stdout.strip(), 150)

    def log(self) -> str:
        """Return the output of the job and its nodes."""
        logs = [self.folder / "job.log", *sorted((self.folder / "logs").glob("*"))]
        return "".join(path.read_text() for path in logs if path.exists())

    def metrics(self, run_dir: Path | None = None) -> list[dict]:
        path = (run_dir or self.run_dir) / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float) -> Any:
        """The condition's first true value; after `seconds` without one the test fails, with the log and the queue."""
        try:
            return wait_for(condition, what, seconds)
        except TimeoutError as error:
            queue = self.cluster.run("scontrol", "show", "job", "-o").stdout
            pytest.fail(f"{error}\n{self.log()}\n{queue}\n{self.cluster.logs()}")

    def wait_for_end(self, job: str, seconds: float) -> dict[str, str]:
        """The job once it is over and no longer to be requeued."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.cluster.job(job)["JobState"] in over, f"the end of job {job}", seconds)
        return self.cluster.job(job)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two idle nodes; on failure to start, the daemons' logs. Skips where there are SLURM's commands but not its daemons."""
    if missing := [name for name in DAEMONS if find_daemon(name) is None]:
        pytest.skip(f"no {', '.join(missing)} here (apt-get install slurm-wlm munge)")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster.start()
    except TimeoutError as error:
        pytest.fail(f"{error}\n{cluster.logs()}")
    finally:
        cluster.stop()


@pytest.fixture
def example(cluster, root, tmp_path):
    """A run on tokens that can be learnt, tensor parallel on each of the two nodes."""
    rng = np.random.default_rng(0)
    (np.cumsum(rng.integers(0, 3, 20_000)) % 97).astype("uint16").tofile(tmp_path / "tokens.npy")
    config = dict(
        run_dir=str(tmp_path / "run"),
        model=SMALLEST,
        data=dict(train=[{"path": str(tmp_path / "tokens.npy")}], sequence_length=16, num_workers=0),
        train=dict(
            steps=4, global_batch_size=8, micro_batch_size=1, dtype="fp32", schedule=dict(warmup_steps=2)
        ),
        parallel=dict(tensor_parallel_size=2),
        checkpoint=dict(interval=None),
        logging=dict(plot_interval=0, tensorboard=False),
    )  # fmt: skip
    yield Example(cluster, root, tmp_path, config)
    cluster.run("scancel", "--partition=all")
