"""The FP8 context around a stage's layers."""

from contextlib import AbstractContextManager, nullcontext

from megatron_hybrid.config.precision import PrecisionConfig


def around_layers(precision: PrecisionConfig, config) -> AbstractContextManager:
    """What encloses all layers of a stage; inside it megatron-core opens each layer's own context (or delayed scaling's one).

    Delayed scaling updates its scales when the outermost context ends. FP8 attention is always delayed; beside linears that
    are not, only this context makes that once a pass and not once a layer.
    """
    if not precision.fp8_attention:
        return nullcontext()
    from megatron.core import parallel_state
    from transformer_engine.pytorch import fp8_autocast

    from megatron_hybrid.precision.recipes import attention_recipe

    group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    return fp8_autocast(enabled=True, fp8_recipe=attention_recipe(config.fp8_amax_history_len), fp8_group=group)
