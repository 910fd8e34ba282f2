"""The FP8 context around the layers of a pipeline stage."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from megatron_hybrid.config.precision import PrecisionConfig


def around_layers(precision: PrecisionConfig, config: Any) -> AbstractContextManager[None]:
    """Return the context that encloses all layers of a stage.

    Inside it, megatron-core opens a context per layer (one for all layers with delayed scaling). Delayed scaling updates its
    scales when the outermost context ends. FP8 attention always uses delayed scaling. Next to GEMMs with another recipe,
    this context makes the update happen once per pass instead of once per layer.

    Args:
        config: megatron-core's TransformerConfig.
    """
    if not precision.fp8_attention:
        return nullcontext()
    from megatron.core import parallel_state
    from transformer_engine.pytorch import fp8_autocast

    from megatron_hybrid.precision.recipes import attention_recipe

    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    context: AbstractContextManager[None] = fp8_autocast(
        enabled=True, fp8_recipe=attention_recipe(config.fp8_amax_history_len), fp8_group=group
    )
    return context
