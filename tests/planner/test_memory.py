"""Activation memory and peak memory: sums by hand, and how they change with a layout."""

from dataclasses import replace

import pytest
import torch

from megatron_hybrid.arch.costs import Operation
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.presets import SMALL, olmo3_7b, olmo_hybrid_7b
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.mixers.attention.costs import Widths
from megatron_hybrid.planner.activations import backward_peak, layer_bytes, layer_operations
from megatron_hybrid.planner.memory import expected, fullest, rank_memory
from megatron_hybrid.planner.plan import Plan

MODEL = olmo_hybrid_7b()


def plan(tp=1, pp=1, vpp=1, gpus=64, micro_batch=1, model=MODEL, sequence=8192, **more) -> Plan:
    sizes = dict(tensor_parallel_size=tp, pipeline_parallel_size=pp, virtual_pipeline_parallel_size=vpp)
    return Plan(model, ParallelConfig(**sizes, **more), gpus, sequence, micro_batch, 512)


def test_a_gated_delta_net_layer_by_hand():
    h, f, key, value, heads, packed = 3840, 11008, 2880, 5760, 30, 17344
    stream = 4 * 2 * h + 8  # two residual inputs and two norms' outputs, with the norms' statistics
    mixer = 2 * packed + 2 * (2 * key + value) + 8 * heads + heads * (2 * 64 * 2 + 4) + 2 * value + 2 * value
    found = layer_bytes(plan().shards["G"], "none")
    assert found.saved == stream + mixer + 2 * 3 * f


def test_an_attention_layer_by_hand():
    h, f, heads = 3840, 11008, 30
    stream = 4 * 2 * h + 8  # two linears' inputs, and the inputs of two norms
    mixer = 2 * 3 * h + 8 + 2 * 3 * h + 2 * h + 4 * heads  # qkv before and after the norm, output, log-sum-exp
    found = layer_bytes(plan().shards["A"], "none")
    assert found.saved == stream + mixer + 2 * 3 * f


@pytest.mark.parametrize("kind", ["G", "A"])
def test_tensor_parallelism_divides_what_a_layer_keeps(kind):
    whole, half = (layer_bytes(p.shards[kind], "none").saved for p in (plan(), plan(2)))
    assert half == pytest.approx(whole / 2, rel=1e-3)
    alone = plan(2, sequence_parallel=False)
    assert layer_bytes(alone.shards[kind], "none").saved > half


def test_context_parallelism_divides_activations_and_not_parameters():
    whole, halves = (fullest(plan(sequence=65536, context_parallel_size=n)) for n in (1, 2))
    assert (halves.weights, halves.gradients) == (whole.weights, whole.gradients)
    assert halves.optimizer == pytest.approx(whole.optimizer), "the same ranks share it out"
    gdn, attention = (halves.activations[name] / whole.activations[name] for name in ("Gated DeltaNet", "attention"))
    assert 0.5 < gdn < 0.51, "next to tokens, states and transitions"
    assert 0.5 < attention < 0.56, "attention's output once more"


def test_states_of_slices_by_hand():
    one = plan(sequence=65536, context_parallel_size=2)
    shard = one.shards["G"]
    alone = replace(shard, context_parallel_size=1)
    without, found = (layer_bytes(part, "none").saved for part in (alone, shard))
    state, end = 96 * 192, 96 * (192 + 128)  # 96 columns of a transition are written as two tiles
    assert (found - without) * 32768 == pytest.approx(30 * 4 * (state + end))


def test_dummies_of_an_exchange():
    def gathered(one: Plan) -> float:
        return Widths.of(one.shards["A"]).gathered_heads

    assert gathered(plan(context_parallel_size=2)) == 1
    assert gathered(plan(context_parallel_size=4)) == 32 / 30
    assert gathered(plan(4, context_parallel_size=4)) == 1, "those of tensor parallelism are there already"


@pytest.mark.parametrize("kind", ["G", "A"])
def test_recomputation_keeps_less_and_needs_more_at_a_time(kind):
    none, selective, full = (layer_bytes(plan().shards[kind], r) for r in ("none", "selective", "full"))
    assert none.saved > selective.saved > full.saved == 2 * 3840
    assert full.transient > none.transient
    assert full.saved + full.transient == pytest.approx(none.saved + none.transient, rel=1e-6)


def test_kept_states_by_hand():
    """Count for each chunk of 64 tokens a state [96, 192] per head, and its new values, which are as many as v's."""
    none, kept = (plan(keep_delta_rule_states=on).shards["G"] for on in (False, True))
    before, after = layer_bytes(none, "none"), layer_bytes(kept, "none")
    assert after.saved - before.saved == 30 * 2 * (96 * 192 / 64 + 192) == 28_800
    of_attention = (layer_bytes(plan(keep_delta_rule_states=on).shards["A"], "none") for on in (False, True))
    assert len(set(of_attention)) == 1


@pytest.mark.parametrize(("recompute", "most"), [("selective", 0), ("full", 28_800)])
def test_recomputed_layers_keep_states(recompute, most):
    """No longer than for one layer's backward pass. Selective recompute makes them when the MLP's larger tensors are gone."""
    shard = plan(recompute_granularity=recompute).shards["G"]
    assert shard.keep_delta_rule_states
    other = replace(shard, keep_delta_rule_states=False)
    assert layer_bytes(shard, recompute).saved == layer_bytes(other, recompute).saved
    assert layer_bytes(shard, recompute).transient - layer_bytes(other, recompute).transient == most


def test_backward_peak_counts_what_is_freed_on_the_way():
    ops = [
        Operation("a", saved=10, gradient=4),
        Operation("b", saved=100, gradient=1),
        Operation("c", saved=1, gradient=50),
    ]
    # c: 111 kept + 50 of its gradient + 5 coming in;  b: 110 + 50 + 1
    assert backward_peak(ops, 0.0) == 111 + 50
    assert backward_peak(ops, 5.0) == 111 + 50 + 5 + 5


class _Saved:
    """Bytes of distinct storages that autograd saves, without parameters and tensors that existed before."""

    def __init__(self, *known: torch.Tensor):
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.found: dict[int, int] = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self.hooks.__exit__(*exception)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.found[storage.data_ptr()] = storage.nbytes()
        return tensor


def test_swiglu_keeps_what_the_table_says():
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    from megatron_hybrid.distributed.cpu_backend import use_cpu_backend

    use_cpu_backend()
    tokens, ffn = 64, 48
    packed = torch.randn(tokens, 1, 2 * ffn, dtype=torch.bfloat16, requires_grad=True)
    with _Saved() as saved:
        bias_swiglu_impl(packed * 1, None)
    row = next(op for op in layer_operations(plan().shards["G"]) if op.name == "SwiGLU")
    assert sum(saved.found.values()) == row.saved * tokens * ffn / plan().shards["G"].ffn


def test_pipelines_hold_more_micro_batches_on_their_first_rank():
    first, last = (rank_memory(plan(pp=4, pipeline_split=(8,) * 4), rank) for rank in (0, 3))
    assert first.activations["Gated DeltaNet"] == pytest.approx(4 * last.activations["Gated DeltaNet"])
    interleaved = rank_memory(plan(pp=4, vpp=2, pipeline_split=(4,) * 8), 0)
    assert interleaved.activations["Gated DeltaNet"] / first.activations["Gated DeltaNet"] == pytest.approx(1 + 3 / 8)


def test_the_embedding_norm_is_kept_on_the_first_stage():
    model = SMALL["olmo_hybrid_small_1.4b"]()
    without = model.model_copy(update={"embedding_norm": False})
    first, last = ([rank_memory(plan(pp=2, model=one), rank).ends for one in (model, without)] for rank in (0, 1))
    assert first[0] - first[1] == pytest.approx(2 * 8192 * (2 * 1280 + 4)), (
        "bf16 input and statistics of two micro-batches"
    )
    assert last[0] == last[1]


def test_dummy_heads_are_told():
    assert fullest(plan(2)).padding < 0.01e9 < fullest(plan(4)).padding
    assert fullest(plan(1, model=olmo3_7b())).padding == 0


def test_weights_held_in_fp8_save_two_bytes_and_leave_a_transpose():
    cast, held = (
        fullest(replace(plan(2), precision=PrecisionConfig(fp8_recipe="tensorwise", fp8_param_gather=on)))
        for on in (False, True)
    )
    assert cast.fp8_weights == 2 * held.fp8_weights
    assert cast.weights - held.weights == pytest.approx(held.fp8_weights, rel=1e-6)
    assert (cast.gradients, cast.optimizer) == pytest.approx((held.gradients, held.optimizer), rel=1e-6)
    assert cast.total - held.total == pytest.approx(2 * held.fp8_weights, rel=1e-6)


def test_offloaded_state_is_the_hosts():
    kept, moved = fullest(plan(gpus=1)), fullest(replace(plan(gpus=1), offload_fraction=0.8))
    parameters = kept.optimizer / 12
    assert moved.optimizer == pytest.approx(0.2 * 12 * parameters, rel=1e-6)
    assert (kept.host, moved.host) == (0, pytest.approx(0.8 * 16 * parameters, rel=1e-5))
    assert kept.total - moved.total == pytest.approx(0.8 * 12 * parameters, rel=1e-6)
    assert f"and at least {moved.host / 1e9:.1f} GB of host memory" in moved.line()
    assert "host" not in kept.line()


def test_parts_add_up_and_the_line_says_so():
    memory = fullest(plan(2))
    assert sum(memory.parts().values()) == pytest.approx(memory.total)
    assert f"{memory.total / 1e9:.1f} GB" in memory.line()


def test_what_the_trainer_asks():
    run = RunConfig.model_validate(
        {
            "run_dir": "x",
            "model": MODEL.model_dump(mode="json"),
            "data": {"train": [{"path": "x"}], "sequence_length": 8192},
            "train": {"steps": 1, "global_batch_size": 512},
            "parallel": {"tensor_parallel_size": 2},
        }
    )
    assert expected(run, 64) == fullest(plan(2))


def test_buffers_of_overlapped_tensor_parallelism_by_hand():
    """Transformer Engine's initialize_ub makes twelve: two hold 2 tp - 1 pieces, ten the tp pieces of a micro-batch."""
    one = 8192 * 3840
    for tp, pieces in ((2, 10 + 2 * 3 / 2), (8, 10 + 2 * 15 / 8)):
        without, overlapped = (rank_memory(plan(tp, tp_comm_overlap=on), 0).total for on in (False, True))
        assert overlapped - without == pytest.approx(2 * one * pieces)
    fp8 = replace(plan(2, tp_comm_overlap=True), precision=PrecisionConfig(fp8_recipe="tensorwise"))
    without = replace(fp8, parallel=plan(2).parallel)
    assert rank_memory(fp8, 0).total - rank_memory(without, 0).total == pytest.approx(one * (8 + 2 * 2 + 2 * 3))
