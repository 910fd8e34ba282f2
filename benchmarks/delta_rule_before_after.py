"""Time the delta rule's Hopper backend of this tree against that of an earlier tree, in turn on one GPU; about four minutes.

    python benchmarks/delta_rule_before_after.py --before FOLDER

FOLDER holds the `kernels` folder of an earlier commit, whose Hopper backend was named "hopper": `git archive 6089959 kernels`.
Cases: whole sequences, few heads, documents, other widths, and one slice of a sequence shared by two ranks (the other rank is a
mirror without communication). The number of segments of this tree is varied as well.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
RAGGED = [0, 1, 1, 500, 1700, 1701, 4096, 4160, 8192]
CASES = {  # batch, length, heads, K, V, document bounds
    "30 heads": (1, 8192, 30, 96, 192, None),
    "15 heads": (1, 8192, 15, 96, 192, None),
    "8 heads": (1, 8192, 8, 96, 192, None),
    "2 sequences, 30 heads": (2, 8192, 30, 96, 192, None),
    "4 sequences, 30 heads": (4, 8192, 30, 96, 192, None),
    "65,536 tokens, 15 heads": (1, 65536, 15, 96, 192, None),
    "documents, 30 heads": (1, 8192, 30, 96, 192, RAGGED),
    "documents, 15 heads": (1, 8192, 15, 96, 192, RAGGED),
    "32 documents, 30 heads": (1, 32768, 30, 96, 192, list(range(0, 32769, 1024))),
    "128/128, 32 heads": (1, 8192, 32, 128, 128, None),
    "64/64, 32 heads": (1, 8192, 32, 64, 64, None),
}
SLICES = {"slice of 30 heads": (1, 8192, 30, 96, 192), "slice of 8 heads": (1, 8192, 8, 96, 192)}
SEGMENTS = {"15 heads": (1, 2, 3, 5), "8 heads": (1, 2, 3, 5), "65,536 tokens, 15 heads": (1, 2, 4, 8)}


class TwoRanks:
    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


def inputs_of(batch: int, length: int, heads: int, key_dim: int, value_dim: int) -> list[torch.Tensor]:
    """Draw inputs for an eighth of the length and repeat them, because drawing takes longer than the measurement."""
    from hybrid_kernels.testing import delta_rule_inputs

    small = delta_rule_inputs(1, length // 8, heads, heads, key_dim, value_dim, dtype=torch.bfloat16, device="cuda")
    return [x.repeat(batch, 8, *[1] * (x.dim() - 2)).requires_grad_() for x in small]


def rule_of(backend: str, inputs: list[torch.Tensor], bounds: list[int] | None) -> Callable[[], torch.Tensor]:
    from hybrid_kernels.gated_delta_rule import gated_delta_rule

    cu = None if bounds is None else torch.tensor(bounds, device="cuda", dtype=torch.int32)
    return lambda: gated_delta_rule(*inputs, cu_seqlens=cu, backend=backend)[0]


def slice_of(backend: str, inputs: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    if backend == "hopper":  # the earlier tree, whose kernels took a process group
        from hybrid_kernels import slices
        from hybrid_kernels.gated_delta_rule import gated_delta_rule

        slices.gather = lambda x, group: torch.stack((x, x))
        return lambda: gated_delta_rule(*inputs, group=TwoRanks(), backend=backend)[0]
    from megatron_hybrid.distributed import context_parallel
    from megatron_hybrid.distributed.state_passing import gated_delta_rule_of_slices

    context_parallel.all_gather = lambda x, group: torch.stack((x, x))
    return lambda: gated_delta_rule_of_slices(*inputs, group=TwoRanks(), backend=backend)


def times(rule: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    from kernel_timing import gpu_ms

    do = torch.ones_like(inputs[2])

    def forward() -> None:
        with torch.no_grad():
            rule()

    return {
        "forward": gpu_ms(forward, samples=10),
        "forward + backward": gpu_ms(lambda: torch.autograd.grad(rule(), inputs, do), samples=10),
    }


def measure() -> dict[str, dict[str, float]]:
    """Measure the tree in PYTHONPATH. The earlier tree calls its Hopper backend "hopper", this one "cuda"."""
    from hybrid_kernels import gated_delta_rule as package

    backend = "hopper" if hasattr(package, "_missing_for_hopper") else "cuda"
    found = {}
    for name, (*shape, bounds) in CASES.items():
        inputs = inputs_of(*shape)
        found[name] = times(rule_of(backend, inputs, bounds), inputs)
    for name, shape in SLICES.items():
        inputs = inputs_of(*shape)
        found[name] = times(slice_of(backend, inputs), inputs)
    return found | (in_segments() if backend == "cuda" else {})


def in_segments() -> dict[str, dict[str, float]]:
    from hybrid_kernels.gated_delta_rule.backends.cuda import op

    found, chosen = {}, op.segments_of
    for name, counts in SEGMENTS.items():
        inputs = inputs_of(*CASES[name][:5])
        for count in counts:
            op.segments_of = lambda *_, count=count: count
            found[f"{name}, in {count} segments"] = times(rule_of("cuda", inputs, None), inputs)
    op.segments_of = chosen
    return found


def measured(tree: Path) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        path = os.pathsep.join(map(str, (tree / "kernels", ROOT, ROOT / "benchmarks")))
        command = [sys.executable, __file__, "--measure", str(output)]
        subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
        return json.loads(output.read_text())


def main() -> None:
    from kernel_timing import write_gpu
    from report import row

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder with the `kernels` folder of the earlier commit")
    parser.add_argument("--measure", type=Path, help="only write the times of the tree in PYTHONPATH to a file")
    parser.add_argument("--rounds", type=int, default=2, help="times that each tree is measured")
    args, _ = parser.parse_known_args()
    if args.measure:
        args.measure.write_text(json.dumps(measure()))
        return
    rounds = [[measured(tree) for tree in (args.before.resolve(), ROOT)] for _ in range(args.rounds)]
    rows = []
    for name in rounds[0][1]:
        for metric in ("forward", "forward + backward"):
            before, after = (
                median(one[i][name][metric] for one in rounds) if name in rounds[0][i] else None for i in range(2)
            )
            rows.append(row(name, metric, "ms", after, before, "before"))
    write_gpu("delta_rule_before_after", rows)


if __name__ == "__main__":
    main()
