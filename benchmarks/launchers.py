"""Curves of every launcher, compared bit for bit: 20 steps of a tiny hybrid at TP2, fp32, two CPU ranks.

python benchmarks/launchers.py        torchrun, tools/launch.py, mpirun; srun on a cluster of its own where SLURM is installed
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
STEPS = 20


@contextlib.contextmanager
def srun(folder: Path):
    """As `launchers`: srun with and without PMIx, on two nodes and one; nothing where SLURM's daemons are missing."""
    from testing.slurm_cluster import DAEMONS, Cluster, find_daemon

    if not all(map(find_daemon, DAEMONS)):
        yield {}
        return
    folder.mkdir()
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield {
            f"srun --mpi={mpi}": (
                ["srun", f"--mpi={mpi}", f"--nodes={nodes}", "--ntasks=2", "--overcommit", sys.executable],
                {"SLURM_CONF": cluster.environment["SLURM_CONF"]},
            )
            for mpi, nodes in (("none", 2), ("pmix", 1))
        }
    finally:
        cluster.stop()


def main() -> None:
    from report import bounded, write

    from testing.launchers import curve, launchers, write_run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_run(folder, STEPS)
        with srun(folder / "slurm") as more:
            curves = {
                name: curve(*launcher, ROOT, config, folder / f"run-{number}")
                for number, (name, launcher) in enumerate((launchers(folder) | more).items())
            }
    expected = curves.pop("torchrun")
    assert len(expected) == STEPS
    rows = []
    for name, found in curves.items():
        assert [line[0] for line in found] == [line[0] for line in expected]
        for column, what in ((1, "losses"), (2, "gradient norms")):
            differ = sum(a[column] != b[column] for a, b in zip(found, expected, strict=True))
            rows.append(bounded(f"{name} against torchrun", f"{what} that differ", f"of {STEPS}", differ, 0))
    write("launchers", rows, ("torch", "megatron-core", "mpi4py"))


if __name__ == "__main__":
    main()
