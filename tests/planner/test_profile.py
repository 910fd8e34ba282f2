"""Predicted times of memory-bound operations, compared with the kernels of a profiled step (benchmarks/train_step.py --profile)."""

import json
from dataclasses import replace

import pytest

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.presets import olmo_hybrid_7b
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.optimizer_time import optimizer_seconds
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.timing import StepPredictor

H200 = load("h200")
MODEL = olmo_hybrid_7b().model_copy(update={"layer_pattern": "GGGA"})
OPERATIONS = {
    "SwiGLU": {"swiglu"},
    "convolution and gates": {"conv_gates"},
    "gated norm, q and k norm, RoPE": {"gated_norm", "qk_norm_rope"},
    "RMSNorm": {"norm"},
    "loss head": {"linear_cross_entropy"},
    "optimizer and gradient norm": {"optimizer"},
    "other elementwise": {"embedding", "residual"},
}
"""Operations of copy_efficiency by the profile's kind of kernel."""
COPIED = 10 / 50
"""Share of the optimizer's bytes that PyTorch's own kernels move: new weights 6, and 4 to set gradients to zero."""


def profile(replicas: int = 1) -> Plan:
    """Return the plan of the profiled step: eight sequences of 8,192 tokens, one at a time."""
    return Plan(MODEL, ParallelConfig(), replicas, 8192, 1, 8 * replicas)


@pytest.fixture(scope="module")
def kernels(root) -> dict[str, float]:
    """Seconds of a step's kernels by kind, in bf16."""
    rows = json.loads((root / "benchmarks" / "results" / "train_step-H200.json").read_text())["rows"]
    rows = [row for row in rows if row["case"] == "GGGA, TP1, bf16" and row["metric"].startswith("kernels: ")]
    return {row["metric"].removeprefix("kernels: "): row["ours"] / 1e3 for row in rows}


def predicted(operations: set[str]) -> float:
    """Return how much shorter the step would be if the operations took no time."""
    free = {name: 1e12 if name in operations else share for name, share in H200.copy_efficiency.items()}
    with_, without = (StepPredictor(h).step(profile()) for h in (H200, replace(H200, copy_efficiency=free)))
    return with_.seconds - without.seconds


@pytest.mark.parametrize("kind", OPERATIONS)
def test_memory_bound_operations_take_as_long_as_their_kernels(kind, kernels):
    """The head once counted sums of weight gradients that its GEMMs do, 15 of 45 ms, and the update divisions by one replica."""
    copied = COPIED * predicted({"optimizer"})
    moved = {"optimizer and gradient norm": -copied, "other elementwise": copied}.get(kind, 0.0)
    assert predicted(OPERATIONS[kind]) + moved == pytest.approx(kernels[kind], rel=0.07)


def test_gradients_are_divided_where_collectives_cannot_average():
    one, two, three = (optimizer_seconds(profile(replicas), 0, H200) for replicas in (1, 2, 3))
    assert two < one and three > two
