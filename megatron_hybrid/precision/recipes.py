"""Transformer Engine's recipes that megatron-core has no field for."""

from functools import cache

from transformer_engine.common.recipe import DelayedScaling, Format


@cache
def attention_recipe(amax_history: int) -> DelayedScaling:
    """Delayed scaling for attention, e4m3 forward and e5m2 backward."""
    return DelayedScaling(
        fp8_format=Format.HYBRID, amax_history_len=amax_history, amax_compute_algo="max", fp8_dpa=True
    )
