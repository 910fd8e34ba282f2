"""Specs for megatron.training's `--spec`: `--spec layer_specs layer_spec`. Change the sizes to your model's."""

from megatron_hybrid.spec import GatedDeltaNetConfig, gated_delta_net_layer_spec, olmo_hybrid_stack_spec

GDN = GatedDeltaNetConfig(num_key_heads=4, num_value_heads=4, key_head_dim=32, value_head_dim=64)

layer_spec = gated_delta_net_layer_spec(GDN)
"""For GPTModel (gpt_builder): every layer is Gated DeltaNet and an MLP."""
stack_spec = olmo_hybrid_stack_spec(GDN)
"""For HybridModel (hybrid_builder), with `--hybrid-layer-pattern GGG*`."""
