"""Curves of layouts of two, four and eight ranks that share one GPU, against one rank on it, and of two launchers against one.

python benchmarks/shared_gpu.py [--ranks 8 4 2] [--only REGEX]

For NCCL each rank is a node of its own, so that all exchanges go through sockets (testing/shared_gpu.py). Kernels and layouts are
those of several nodes. The times say nothing.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]


def main() -> None:
    from gpu_parity import layout_rows, rows_of
    from kernel_timing import write_gpu

    from testing import gpu_jobs as jobs
    from testing.two_launchers import STEPS, curves

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 4, 2], choices=jobs.LAYOUTS)
    parser.add_argument("--only", default="", help="layouts whose name it finds")
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder, begin = Path(name), time.monotonic()
        one, two = curves(folder, STEPS)
        for layout, result in two.items():
            rows += rows_of(f"two launchers, {layout}: from one", one, result, 1e-4)
        print(f"launchers: {time.monotonic() - begin:.0f} s", flush=True)
        write_gpu("shared_gpu", rows)
        begin = time.monotonic()
        todo = {count: jobs.layout_jobs(count, folder, args.only) for count in args.ranks}
        one_gpu = jobs.on_one_gpu(folder / "one", [0], {jobs.one_gpu_of(job) for own in todo.values() for job in own})
        print(f"one rank: {time.monotonic() - begin:.0f} s", flush=True)
        for count in args.ranks:
            begin = time.monotonic()
            found = jobs.on_several(count, [0], args.only)
            rows += [row | {"case": f"{count} ranks, {row['case']}"} for row in layout_rows(one_gpu, found)]
            print(f"{count} ranks: {time.monotonic() - begin:.0f} s", flush=True)
            write_gpu("shared_gpu", rows)


if __name__ == "__main__":
    main()
