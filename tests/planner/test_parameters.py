"""Bytes of weights, gradients and optimizer state equal what the trainer allocates, on every rank."""

from dataclasses import replace

import pytest

from megatron_hybrid.arch.flops import count_parameters
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.presets import SIZED, olmo_hybrid_7b
from megatron_hybrid.planner.parameters import ChunkLayout, chunk_parameters, padding_parameters, rank_parameters
from megatron_hybrid.planner.state import rank_state
from testing import planner_jobs as jobs
from testing.planner_cases import CASES, MODEL, layout, plan_of


@pytest.mark.parametrize("name", CASES)
def test_state_is_what_the_trainer_allocates(name, ranks):
    count, model, parallel, dtype = CASES[name]
    train = dict(steps=1, global_batch_size=count * 4, dtype=dtype)
    plan = plan_of(model, parallel, count, dtype)
    for found in ranks.run(
        jobs.state_bytes, count, model=model.model_dump(mode="json"), parallel=parallel, train=train
    ):
        state = rank_state(plan, found["pipeline_rank"], found["dp_rank"])
        assert rank_parameters(plan, found["pipeline_rank"]) == found["parameters"]
        assert state.weights == found["weights"]
        assert state.gradients == found["gradients"]
        assert state.optimizer == found["optimizer"]


OFFLOADED = {"one rank": (1, 0.5), "DP2": (2, 0.5), "all of it": (1, 1.0)}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", OFFLOADED)
def test_offloaded_state_is_what_the_trainer_allocates(name, dtype, ranks):
    count, fraction = OFFLOADED[name]
    train = dict(steps=1, global_batch_size=count * 4, dtype=dtype, optimizer=dict(offload_fraction=fraction))
    plan = replace(plan_of(MODEL, layout(), count, dtype), offload_fraction=fraction)
    parameters = chunk_parameters(ChunkLayout.of(plan, plan.chunks[0]))
    largest = max(p.numel for p in parameters)  # the host may hold this much more than its share
    for found in ranks.run(
        jobs.offloaded_bytes, count, model=MODEL.model_dump(mode="json"), parallel=layout(), train=train
    ):
        state = rank_state(plan, 0, found["dp_rank"])
        assert state.host <= found["host"] <= state.host + 16 * largest
        assert state.optimizer - 12 * largest <= found["device"] <= 1.001 * state.optimizer  # A_log has no master
        assert state.weights == rank_state(replace(plan, offload_fraction=0.0), 0, found["dp_rank"]).weights


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_ranks_without_padding_add_up_to_the_model(name, pp):
    model = SIZED[name]()
    plan = plan_of(model, layout(pp=pp), pp)
    padding = sum(padding_parameters(plan, rank) for rank in range(pp))
    copy = model.vocab_size * model.hidden_size if model.tie_embeddings and pp > 1 else 0  # the last stage's output matrix
    assert sum(rank_parameters(plan, rank) for rank in range(pp)) - padding - copy == count_parameters(model)


def test_the_7b_is_exact():
    plan = plan_of(olmo_hybrid_7b(), layout(), 1)
    assert rank_parameters(plan, 0) - padding_parameters(plan, 0) == 7_430_870_688
    aligned = 24 * 4 * olmo_hybrid_7b().hidden_size  # in_proj's rows, 17,340 rounded up to 17,344
    assert rank_parameters(plan, 0) - 7_430_870_688 == aligned


def test_weights_held_in_fp8_take_a_byte():
    # 7B widths, GGGA, on an H100: measured in buffers and optimizer of a run with precision.fp8_param_gather
    model = olmo_hybrid_7b().model_copy(update=dict(layer_pattern="GGGA"))
    measured = {0: (2_374_159_616, 6_413_095_936, 19_239_283_872), 1: (2_589_691_136, 6_413_095_936, 19_239_283_872)}
    for start, expected in measured.items():
        precision = PrecisionConfig(fp8_recipe="tensorwise", fp8_param_gather=True, num_layers_at_start_in_bf16=start)
        state = rank_state(replace(plan_of(model, layout(), 1), precision=precision), 0)
        assert (state.weights, state.gradients, state.optimizer) == expected
    shared = replace(plan_of(model, layout(2), 4), precision=precision)
    assert rank_state(shared, 0).weights < rank_state(replace(shared, precision=PrecisionConfig()), 0).weights


def test_dummy_heads_are_counted():
    plan = plan_of(olmo_hybrid_7b(), layout(4), 4)
    heads = 2 / 30 * 1 / 4  # of the true mixers, a rank
    mixers = 24 * 3840 * (2 * 2880 + 3 * 5760 + 60) + 8 * 4 * 3840 * 3840
    assert padding_parameters(plan, 0) == pytest.approx(heads * mixers, rel=2e-3)
