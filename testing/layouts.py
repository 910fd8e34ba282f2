"""The layouts under which training must give one curve, and the model and settings it is compared with."""

from testing import jobs
from testing.models import hybrid, qwen, small
from testing.parallel import OVERLAP, layout

SHALLOW, DEEP = "GGGA", "GGGA*2"  # gloo is slow: the deep model only where the pipeline needs its layers
MODEL = hybrid(SHALLOW, 48, 6, 8, key_heads=3, num_key_value_heads=3, head_dim=8)
QWEN = qwen(SHALLOW, 48, 4, 2, 16, 3)
"""Two key/value heads: at TP4 two ranks attend with dummies alone. Three key heads: one rank has no Gated DeltaNet."""
PERI_NORM = small(SHALLOW, 48, 6, 3, 8, init_std=0.1)
"""Blocks of AI2's small hybrid suite: norms around mixers and MLPs, gated attention, a scale and a norm behind the embedding."""
TRAIN = dict(
    steps=20,
    global_batch_size=8,
    micro_batch_size=2,
    dtype="fp32",
    # Adam divides by the root of the second moment: a small eps turns rounding into a visible difference
    optimizer=dict(eps=1e-2),
)
TOLERANCE = 1e-5
STEPS, SAVED, LR = 5, 3, 1e-2
"""How long a curve is, after which step those that go on elsewhere are saved, and a rate at which so few steps tell."""
PERI_NORM_STEPS, PERI_NORM_LR = 4, 1e-3
"""Those of PERI_NORM. A norm behind a sublayer undoes the scale of its weights, so rounding grows faster: a rate like LR is
chaotic. A rate that is wrong by a hundredth changes the gradient norm by several times the tolerance.
"""


LAYOUTS = {
    # name: (ranks, layout)
    "one rank, plain optimizer": (1, layout(distributed_optimizer=False)),
    "one rank, selective recompute": (1, layout(recompute_granularity="selective")),
    "one rank, full recompute": (1, layout(recompute_granularity="full")),
    "DP2": (2, layout()),
    "DP2, plain optimizer": (2, layout(distributed_optimizer=False)),
    "DP2, overlapped": (2, layout(**OVERLAP)),
    "DP2, overlapped in many buckets": (
        2,
        layout(**OVERLAP, bucket_size=10_000),
    ),
    "TP2": (2, layout(2)),
    "TP2, no sequence parallelism": (2, layout(2, sequence_parallel=False)),
    "PP2": (2, layout(pp=2)),
    "PP2, uneven": (2, layout(pp=2, pipeline_split=[3, 1])),
    "PP2, VPP2": (2, layout(pp=2, vpp=2)),
    "PP2, VPP2, exchanges waited for": (2, layout(pp=2, vpp=2, overlap_p2p_comm=False)),
    "TP4, padded heads": (4, layout(4)),
    "TP4, padded heads, no sequence parallelism, full recompute": (
        4,
        layout(4, sequence_parallel=False, recompute_granularity="full"),
    ),
    "PP4": (4, layout(pp=4)),
    "PP4, VPP2": (4, layout(pp=4, vpp=2)),
    "TP2, DP2": (4, layout(2)),
    "TP2, DP2, plain optimizer": (4, layout(2, distributed_optimizer=False)),
    "TP2, PP2": (4, layout(2, 2)),
    "TP2, PP2, VPP2, selective recompute": (4, layout(2, 2, 2, recompute_granularity="selective")),
    "PP2, VPP2, DP2, overlapped": (4, layout(pp=2, vpp=2, **OVERLAP)),
    "DP4": (4, layout()),
    # three key/value heads: over two context parallel ranks or more, some are exchanged as dummies
    "CP2": (2, layout(cp=2)),
    "CP2, plain optimizer": (2, layout(cp=2, distributed_optimizer=False)),
    "CP2, selective recompute": (2, layout(cp=2, recompute_granularity="selective")),
    "CP2, full recompute": (2, layout(cp=2, recompute_granularity="full")),
    "CP4": (4, layout(cp=4)),
    "CP2, TP2": (4, layout(2, cp=2)),
    "CP2, TP2, no sequence parallelism": (4, layout(2, cp=2, sequence_parallel=False)),
    "CP2, PP2": (4, layout(pp=2, cp=2)),
    "CP2, PP2, VPP2": (4, layout(pp=2, vpp=2, cp=2)),
    "CP2, DP2": (4, layout(cp=2)),
    "CP2, DP2, overlapped": (4, layout(cp=2, **OVERLAP)),
    "DP8, overlapped": (8, layout(**OVERLAP)),
    "TP8, padded heads": (8, layout(8)),
    "TP4, padded heads, PP2": (8, layout(4, 2)),
    "PP8": (8, layout(pp=8)),
    "PP4, VPP2, DP2, overlapped": (8, layout(pp=4, vpp=2, **OVERLAP)),
    "TP2, PP2, DP2": (8, layout(2, 2)),
    "TP2, PP2, VPP2, DP2, overlapped": (8, layout(2, 2, 2, **OVERLAP)),
    "CP8": (8, layout(cp=8)),
    "CP4, TP2": (8, layout(2, cp=4)),
    "CP4, PP2": (8, layout(pp=2, cp=4)),
    "CP2, TP2, PP2": (8, layout(2, 2, cp=2)),
    "CP2, TP2, DP2": (8, layout(2, cp=2)),
    "CP2, PP2, VPP2, DP2": (8, layout(pp=2, vpp=2, cp=2)),
}


def relative_difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_same(found: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    for what in ("losses", "norms"):
        difference = relative_difference(found[what], expected[what])
        assert difference < tolerance, f"{what} differ by {difference:.1e}: {found[what]} {expected[what]}"


def few_micro_batches(count: int, parallel: dict) -> dict:
    """TRAIN with two micro-batches a step, not four, where slices of one model fill all ranks and no pipeline needs more:
    each costs as many exchanges over gloo, and the curve is that of one rank's four. Micro-batches are smaller where replicas leave
    a rank too few for its pipeline.
    """
    tp, pp, cp, vpp = (
        parallel[f"{kind}_parallel_size"] for kind in ("tensor", "pipeline", "context", "virtual_pipeline")
    )
    if count == tp * cp > 1:
        return TRAIN | {"micro_batch_size": 4}
    replicas = count // (tp * pp * cp)
    micro_batches = TRAIN["global_batch_size"] // replicas // TRAIN["micro_batch_size"]
    needed = pp if vpp > 1 else 1
    return TRAIN if micro_batches >= needed else TRAIN | {"micro_batch_size": 1}


def smallest_pattern(parallel: dict) -> str:
    """Return the pattern with the fewest layers that has both mixers and gives every slice of the pipeline a layer."""
    slices = parallel["pipeline_parallel_size"] * parallel["virtual_pipeline_parallel_size"]
    if "pipeline_split" in parallel:
        return SHALLOW
    return "GA" if slices <= 2 else SHALLOW if slices <= 4 else DEEP


def run(ranks, count: int, pattern: str, parallel: dict, **more) -> list[dict]:
    model, train = MODEL | {"layer_pattern": pattern}, few_micro_batches(count, parallel)
    return ranks.run(jobs.curve, count, **dict(model=model, parallel=parallel, train=train, steps=STEPS, lr=LR) | more)
