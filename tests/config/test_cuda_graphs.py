"""Refusal of configurations that CUDA graphs cannot repeat, with the remedy."""

import pytest

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.load import load_run
from tests.config.wrong_runs import OVERLAP, TINY, ZERO, Case, assert_named, each

GRAPHS = ["train.cuda_graph_impl=full_iteration"]
FIELD = "train.cuda_graph_impl"
KDA = [
    "model={layer_pattern: KA, kda: {num_heads: 2, key_head_dim: 16, value_head_dim: 16}, hidden_size: 32, ffn_hidden_size: 64, "
    "vocab_size: 97, num_attention_heads: 2}"
]
WRONG: list[Case] = [
    (ZERO, FIELD, "for megatron-core's schedules", "train.engine to megatron"),
    (["parallel.pipeline_parallel_size=2"], FIELD, "pipeline stages", "pipeline_parallel_size to 1"),
    (
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
        FIELD,
        "reduces gradients after the backward pass",
        "overlap_grad_reduce and overlap_param_gather to false",
    ),
    (OVERLAP, FIELD, "user buffers", "parallel.tp_comm_overlap to false"),
    (["precision.fp8_recipe=tensorwise"], FIELD, "FP8 scales", "precision.fp8_recipe to null"),
    (["train.optimizer.offload_fraction=0.5"], FIELD, "on the host", "offload_fraction to 0.0"),
    (["debug.nvtx_ranges=true"], FIELD, "no Python", "debug.nvtx_ranges to false"),
    ([*KDA, "data.documents=mask"], FIELD, "reads the number of chunks", "data.documents to keep"),
]


@each(WRONG)
def test_wrong(overrides, field, wrong, remedy):
    assert_named(GRAPHS + overrides, field, wrong, remedy)


@pytest.mark.parametrize("impl", ["full_iteration", "auto"])
@pytest.mark.parametrize(
    "more",
    [
        [],
        KDA,
        ["data.documents=pack"],
        ["parallel.tensor_parallel_size=2", "parallel.recompute_granularity=full"],
        ["parallel.context_parallel_size=2"],
        ["train.optimizer.kind=muon"],
        ["train.batch_ramp={start: 4, increment: 4, samples: 1000}"],
    ],
)
def test_right(impl, more):
    assert load_run(None, [*TINY, f"{FIELD}={impl}", *more]).train.cuda_graph_impl == impl


def test_without_graphs_nothing_is_refused():
    for overrides, *_ in WRONG:
        load_run(None, TINY + overrides)


def test_an_unknown_value_is_refused():
    with pytest.raises(ConfigError, match=FIELD):
        load_run(None, [*TINY, f"{FIELD}=local"])
