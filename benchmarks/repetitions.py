"""Repeat small training runs on a loaded machine and compare every tensor, bit for bit and with one rank's.

Four CPU ranks over gloo train four steps with an evaluation every two. Random delays surround every exchange, random ranks are
stopped for moments, and busy processes share the cores. A planted race shows that the comparison would find one.

python benchmarks/repetitions.py [--share 0.1] [--only 'TP2 x PP2']
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOLERANCE = 1e-6
RANKS = 4
LAUNCHES = max(1, (os.cpu_count() or 1) // RANKS)
"""Launches of four ranks that share a case's repetitions and run at the same time."""
SPIN = [sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"]
CASES = {
    # name: (repetitions, layout, tied embeddings)
    "TP2 x PP2, tied embeddings": (200, dict(tensor_parallel_size=2, pipeline_parallel_size=2), True),
    "TP2 x PP2": (20, dict(tensor_parallel_size=2, pipeline_parallel_size=2), False),
    "TP2 x PP2, VPP2, tied embeddings": (
        20,
        dict(tensor_parallel_size=2, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
        True,
    ),
    "TP2 x PP2, VPP2, exchanges waited for, tied embeddings": (
        10,
        dict(
            tensor_parallel_size=2,
            pipeline_parallel_size=2,
            virtual_pipeline_parallel_size=2,
            overlap_p2p_comm=False,
        ),
        True,
    ),
    "DP2 x PP2, tied embeddings": (20, dict(pipeline_parallel_size=2), True),
    "DP2 x PP2, VPP2, overlapped, tied embeddings": (
        20,
        dict(
            pipeline_parallel_size=2,
            virtual_pipeline_parallel_size=2,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        True,
    ),
    "CP2 x PP2, tied embeddings": (20, dict(context_parallel_size=2, pipeline_parallel_size=2), True),
    "PP4, tied embeddings": (10, dict(pipeline_parallel_size=4), True),
}
PLANTED = ("TP2 x PP2, tied embeddings", "TP2 x PP2, VPP2, tied embeddings")


def rows_of(name: str, repetitions: int, results: list[dict], one) -> list[dict]:
    """Return the rows of a case's repetitions."""
    from report import bounded

    from testing.repetitions import difference_of_curves, difference_of_parameters

    records = [result["first"] for result in results]
    different = {number for result in results for number, _ in result["differences"]}
    for number, tensor in (difference for result in results for difference in result["differences"]):
        print(f"{name}: repetition {number} of a launch differs first at: {tensor}", flush=True)
    case, tensors = f"{name}: {repetitions} repetitions", sum(result["tensors"] for result in results[:RANKS])
    return [
        bounded(case, "repetitions that differ in any bit", "", len(different), 0),
        bounded(case, "tensors compared in each, over all ranks", "", tensors, None),
        bounded(case, "loss, norm and evaluation against one rank", "relative", difference_of_curves(records, one), TOLERANCE),
        bounded(case, "parameters against one rank", "absolute", difference_of_parameters(records, one), TOLERANCE),
    ]  # fmt: skip


def row_of_planted(name: str, repetitions: int, results: list[dict]) -> dict:
    """In how many repetitions a planted race went unnoticed."""
    from report import bounded

    found = {number for result in results for number, _ in result["differences"]}
    case = f"{name}, with a planted race: {repetitions} repetitions"
    return bounded(case, "repetitions in which it was not found", "", repetitions - len(found), 0)


class Runs:
    """Runs on one pool of ranks, each in a folder of its own, on a machine whose cores are busy."""

    def __init__(self):
        from testing.ranks import RankPool

        self.pool, self.stops = RankPool(), 0

    def __enter__(self) -> "Runs":
        self.spinners = [subprocess.Popen(SPIN) for _ in range(os.cpu_count() or 1)]
        return self

    def __exit__(self, *exception: object) -> None:
        for spinner in self.spinners:
            spinner.kill()
            spinner.wait()

    def run(self, ranks: int, layout: dict, tied: bool, repetitions: int, race: bool = False) -> list[dict]:
        """Return what testing.repetitions.repeat returns, by launch and rank."""
        launches = min(LAUNCHES, repetitions) or 1
        shares = [repetitions // launches + (number < repetitions % launches) for number in range(launches)]
        with ThreadPoolExecutor(launches) as threads:
            found = threads.map(
                lambda n: self._launch(ranks, layout, tied, shares[n], race, f"launch {n}"), range(launches)
            )
            results = [result for launch in found for result in launch]
        for number, result in enumerate(results):
            if difference := result["first"].first_difference(results[number % ranks]["first"]):
                result["differences"].append((f"undisturbed, of launch {number // ranks}", difference))
        return results

    def _launch(self, ranks: int, layout: dict, tied: bool, repetitions: int, race: bool, seed: str) -> list[dict]:
        """Run one launch, whose ranks are stopped for moments."""
        from testing.disturbance import Stopper
        from testing.repetitions import repeat, run_config

        with tempfile.TemporaryDirectory(prefix="repetitions-") as folder, Stopper(Path(folder)) as stopper:
            config = run_config(Path(folder), layout, tied)
            arguments = dict(config=config, repetitions=repetitions, seed=seed, race=race)
            results = self.pool.run(repeat, ranks, 36_000, **arguments)
        self.stops += stopper.stops
        for result in results:  # tell repetitions of different launches apart
            result["differences"] = [(f"{number} ({seed})", tensor) for number, tensor in result["differences"]]
        return results


def notes_of(runs: Runs) -> list[str]:
    """Return notes on how the machine was disturbed and what is compared."""
    return [
        f"Four steps of a GAGA model in fp32, evaluated every two. Ranks were stopped {runs.stops} times for 5 to 150 ms; 2%, 20% or "
        "50% of a rank's waits, sends and receives were delayed, by 2 ms on average and receives by 50 ms; and as many busy "
        "processes as cores ran next to the ranks.",
        "Compared are batches, gradients, parameters and moments after every step and every evaluation, and all losses and norms.",
        "The planted race reuses the memory of a pipeline stage's output without waiting until it is sent.",
    ]


def main() -> None:
    from report import write

    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="of each case's repetitions")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run")
    args, _ = parser.parse_known_args()
    rows = []

    def share(count: int) -> int:
        return max(1, round(args.share * count))

    def add(found: list[dict]) -> None:
        """Write the file after each case: a rank that dies in a later one must not lose what was measured."""
        rows.extend(found)
        write("repetitions", rows, ("torch", "megatron-core"), notes=notes_of(runs), printed=len(rows) - len(found))

    with Runs() as runs:
        one = {tied: runs.run(1, {}, tied, 0)[0]["first"] for tied in (True, False)}
        for name in args.only:
            repetitions, layout, tied = CASES[name]
            results = runs.run(RANKS, layout, tied, share(repetitions))
            add(rows_of(name, share(repetitions), results, one[tied]))
        for name in (name for name in PLANTED if name in args.only):
            _, layout, tied = CASES[name]
            add([row_of_planted(name, share(10), runs.run(RANKS, layout, tied, share(10), race=True))])


if __name__ == "__main__":
    main()
