"""Repeat small training runs on a loaded machine and compare every tensor, bit for bit and with one rank's.

Four CPU ranks over gloo train four steps with an evaluation every two. Random delays surround every exchange, random ranks are
stopped for moments, and busy processes share the cores. A planted race shows that the comparison would find one.

python benchmarks/repetitions.py [--share 0.1]
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOLERANCE = 1e-6
SPIN = [sys.executable, "-c", "import os; os.nice(10)\nwhile True: pass"]
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
    """What a case's repetitions showed."""
    from report import bounded

    from tests.repetitions import difference_of_curves, difference_of_parameters

    records = [result["first"] for result in results]
    different = {number for result in results for number, _ in result["differences"]}
    for rank, result in enumerate(results):
        for number, tensor in result["differences"]:
            print(f"{name}: repetition {number} differs first on rank {rank} at: {tensor}", flush=True)
    case, tensors = f"{name}: {repetitions} repetitions", sum(result["tensors"] for result in results)
    return [
        bounded(case, "repetitions that differ in any bit", "", len(different), 0),
        bounded(case, "tensors compared in each, over all ranks", "", tensors, None),
        bounded(case, "loss, norm and evaluation against one rank", "relative", difference_of_curves(records, one), TOLERANCE),
        bounded(case, "parameters against one rank", "absolute", difference_of_parameters(records, one), TOLERANCE),
    ]  # fmt: skip


def main() -> None:
    from report import bounded, write

    from tests.disturbance import Stopper
    from tests.ranks import RankPool
    from tests.repetitions import repeat, run_config

    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="of each case's repetitions")
    args, _ = parser.parse_known_args()
    pool, rows, stops = RankPool(), [], 0

    def run(count: int, folder: Path, layout: dict, tied: bool, repetitions: int, race: bool = False) -> list[dict]:
        config = run_config(folder, layout, tied)
        return pool.run(repeat, count, 36_000, config=config, repetitions=repetitions, seed="benchmark", race=race)

    def folder() -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="repetitions-")

    one = {}
    for tied in (True, False):
        with folder() as place:
            one[tied] = run(1, Path(place), {}, tied, 0)[0]["first"]
    spinners = [subprocess.Popen(SPIN) for _ in range(os.cpu_count() or 1)]
    try:
        for name, (repetitions, layout, tied) in CASES.items():
            repetitions = max(1, round(args.share * repetitions))
            with folder() as place, Stopper(Path(place)) as stopper:
                results = run(4, Path(place), layout, tied, repetitions)
            stops += stopper.stops
            rows += rows_of(name, repetitions, results, one[tied])
            print(*(f"{row['metric']}: {row['ours']}" for row in rows[-4:]), sep="; ", flush=True)
        for name in PLANTED:
            _, layout, tied = CASES[name]
            planted = max(1, round(10 * args.share))
            with folder() as place, Stopper(Path(place)) as stopper:
                results = run(4, Path(place), layout, tied, planted, race=True)
            stops += stopper.stops
            found = {number for result in results for number, _ in result["differences"]}
            case = f"{name}, with a planted race: {planted} repetitions"
            rows.append(bounded(case, "repetitions in which it was not found", "", planted - len(found), 0))
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()
    notes = [
        f"Four steps of a GAGA model in fp32, evaluated every two. Ranks were stopped {stops} times for 5 to 150 ms; 2%, 20% or 50% "
        "of a rank's waits, sends and receives were delayed, by 2 ms on average and receives by 50 ms; and as many busy processes as "
        "cores ran next to the ranks.",
        "Compared are batches, gradients, parameters and moments after every step and every evaluation, and all losses and norms.",
        "The planted race reuses the memory of a pipeline stage's output without waiting until it is sent.",
    ]
    write("repetitions", rows, ("torch", "megatron-core"), notes=notes)


if __name__ == "__main__":
    main()
