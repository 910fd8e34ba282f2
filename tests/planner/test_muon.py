"""Muon in the planner: state is what the trainer allocates, FLOPs are those that torch counts, and an update takes its time."""

import random
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.packing import PackedParameter, TensorSpec
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.presets import olmo_hybrid_7b
from megatron_hybrid.config.run_dir import checkpoint_bytes
from megatron_hybrid.config.train import OptimizerConfig
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.layer_wise import whole_shards
from megatron_hybrid.planner.memory import fullest
from megatron_hybrid.planner.optimizer_time import optimizer_seconds
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.state import rank_state
from testing import planner_jobs as jobs
from testing.muon import NOT_HERE, REASON
from testing.planner_cases import CASES, layout, plan_of
from tests.config.wrong_runs import TINY

NAMES = (
    "one rank",
    "one rank, fp32, plain optimizer",
    "DP3, fp32, overlapped",
    "DP2, plain optimizer",
    "TP3, padded heads",
    "TP2, DP2",
    "PP2, VPP2, DP2",
    "PP2, DP2, tied embeddings",
)
MUON = OPTIMIZERS["muon"]


@pytest.mark.skipif(NOT_HERE, reason=REASON)
@pytest.mark.parametrize("name", NAMES)
def test_state_is_what_the_trainer_allocates(name, ranks):
    count, model, parallel, dtype = CASES[name]
    train = dict(steps=1, global_batch_size=count * 4, dtype=dtype, optimizer=dict(kind="muon"))
    plan = replace(plan_of(model, parallel, count, dtype), optimizer="muon")
    found = ranks.run(jobs.state_bytes, count, model=model.model_dump(mode="json"), parallel=parallel, train=train)
    for one in found:
        state = rank_state(plan, one["pipeline_rank"], one["dp_rank"])
        assert (state.weights, state.gradients) == (one["weights"], one["gradients"])
        assert state.optimizer == one["optimizer"]
    for stage in range(plan.pp):
        most = max(one["optimizer"] for one in found if one["pipeline_rank"] == stage)
        assert 0.99 * most <= rank_state(plan, stage).optimizer <= 1.2 * most  # all but some padding


@pytest.mark.parametrize("limit", [None, 700, 5_000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shards_are_those_of_megatron_core(ranks, limit):
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

    generator = random.Random(ranks)
    sizes = [generator.choice((64, 100, 100, 257, 900, 3000)) for _ in range(40)]
    matrices = [torch.nn.Parameter(torch.empty(size, device="meta")) for size in sizes]
    theirs = LayerWiseDistributedOptimizer._compute_per_buffer_param_layout(
        matrices, limit, ranks, DistributedDataParallelConfig()
    )
    ours = whole_shards(sizes, limit, ranks)
    assert ours.numel == theirs.bucket_indices[-1][1]
    for matrix, owner in zip(matrices, ours.owners, strict=True):
        start, _, bucket = theirs.param_index_map[matrix]
        first, last = theirs.bucket_indices[bucket]
        assert (start - first) // ((last - first) // ranks) == owner
    assert limit is None or len(theirs.bucket_indices) > 1


def iterated(rows: int, columns: int, steps: int) -> int:
    """Return the FLOPs of a plain Newton-Schulz iteration, as torch counts them."""
    x = torch.empty(min(rows, columns), max(rows, columns), device="meta")
    with FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            gram = x @ x.T
            x = x + (gram + gram @ gram) @ x
    return counter.get_total_flops()


def test_flops_are_those_of_the_iteration():
    tensors = (TensorSpec("gate", (96, 48)), TensorSpec("up", (24, 48)))
    packed = PackedParameter("fc1", tensors, "rows", groups=24, is_gemm=True)
    settings = OptimizerConfig(kind="muon", muon_num_ns_steps=3)
    expected = iterated(96, 48, 3) + iterated(24, 48, 3)
    assert MUON.update_flops(packed, 1, settings) == MUON.update_flops(packed, 2, settings) == expected
    blocks = settings.model_copy(update={"muon_tp_mode": "blockwise"})
    assert MUON.update_flops(packed, 2, blocks) == iterated(48, 48, 3) + iterated(12, 48, 3)
    shared = settings.model_copy(update={"muon_tp_mode": "distributed"})
    assert MUON.update_flops(packed, 2, shared) == 3 * sum(4 * 48**2 * share + 2 * 48**3 for share in (48, 12))
    assert OPTIMIZERS["adamw"].update_flops(packed, 1, settings) == 0


def plan_7b(optimizer: str, gpus: int = 8, **options) -> Plan:
    plan = replace(plan_of(olmo_hybrid_7b(), layout(), gpus), optimizer=optimizer)
    return replace(plan, optimizer_settings=OptimizerConfig(kind=optimizer, **options))


def test_an_update_takes_longer_and_less_memory_than_adamws():
    h200 = load("h200")
    adamw, muon = plan_7b("adamw"), plan_7b("muon")
    flops = sum(MUON.update_flops(p.packed, 1, muon.optimizer_settings) for p in matrices(muon))
    assert 5e14 < flops < 7e14
    iterations = flops / 8 * h200.linear["bf16"]["forward"].per_flop
    more = optimizer_seconds(muon, 0, h200) - optimizer_seconds(adamw, 0, h200)
    assert more == pytest.approx(
        iterations, rel=0.15
    )  # eight ranks do not share the matrices equally; AdamW moves more bytes
    assert fullest(muon).optimizer < 0.72 * fullest(adamw).optimizer
    slow = plan_7b("muon", muon_fp32_matmul_prec="highest")
    assert optimizer_seconds(slow, 0, h200) > 10 * optimizer_seconds(muon, 0, h200)


def matrices(plan: Plan):
    from megatron_hybrid.planner.parameters import ChunkLayout, chunk_parameters

    (chunk,) = plan.chunks
    return [p for p in chunk_parameters(ChunkLayout.of(plan, chunk)) if p.packed.is_gemm]


def test_a_checkpoint_is_smaller_than_adamws():
    adamw, muon = (checkpoint_bytes(load_run(None, [*TINY, f"train.optimizer.kind={name}"])) for name in OPTIMIZERS)
    assert 0.7 < muon / adamw < 1
