"""When Gated DeltaNet keeps the delta rule's states for the backward pass."""

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.presets import olmo_hybrid_7b
from megatron_hybrid.mixers.gated_delta_net.module import kept_by_rule
from megatron_hybrid.model.megatron_config import transformer_config

RECOMPUTED = {
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
}
NOT_RECOMPUTED = {
    "nothing": {},
    "the MLP alone": dict(recompute_granularity="selective", recompute_modules=["mlp"]),
    "some layers": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_run_keeps_what_the_planner_counts(recompute, keep):
    parallel = ParallelConfig(recompute_granularity=recompute, keep_delta_rule_states=keep)
    config = transformer_config(olmo_hybrid_7b(), parallel, PrecisionConfig(), "bf16")
    assert kept_by_rule(config) == ("states" if parallel.keeps_states else "scores")
    assert parallel.keeps_states == (keep or recompute != "none")


@pytest.mark.parametrize("name", [*RECOMPUTED, *NOT_RECOMPUTED])
def test_another_model_keeps_states_where_it_recomputes(name):
    fields = (RECOMPUTED | NOT_RECOMPUTED)[name]
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=2, **fields)
    assert kept_by_rule(config) == ("states" if name in RECOMPUTED else "scores")
