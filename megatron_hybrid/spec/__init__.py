"""Gated DeltaNet layers for any megatron-core 0.19.2 model. Guide: docs/layer-spec.md.

    from megatron.core.models.gpt import GPTModel
    from megatron_hybrid.spec import GatedDeltaNetConfig, gated_delta_net_layer_spec

    gdn = GatedDeltaNetConfig(num_key_heads=30, num_value_heads=30, key_head_dim=96, value_head_dim=192)
    model = GPTModel(config, gated_delta_net_layer_spec(gdn), vocab_size=100352, max_sequence_length=8192)

Sizes that are not Gated DeltaNet's (hidden size, norm, MLP, dtype, parallelism, FP8, recompute) are the TransformerConfig's.
Importing this changes nothing in the process: no patches, no warning filters, no environment variables.
"""

from megatron_hybrid.mixers.gated_delta_net.config import GatedDeltaNetConfig
from megatron_hybrid.spec.cpu import enable_cpu_backend
from megatron_hybrid.spec.layers import gated_delta_net_layer_spec, olmo_hybrid_stack_spec
from megatron_hybrid.spec.optimizer import optimizer_config_overrides

__all__ = [
    "GatedDeltaNetConfig",
    "enable_cpu_backend",
    "gated_delta_net_layer_spec",
    "olmo_hybrid_stack_spec",
    "optimizer_config_overrides",
]
