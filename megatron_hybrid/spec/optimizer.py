"""A separate parameter group for the layer's fp32 parameters."""

from megatron.core.optimizer import get_standard_config_overrides
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey

from megatron_hybrid.mixers.gated_delta_net.spec import FP32_PARAMETERS


def optimizer_config_overrides(config: OptimizerConfig) -> dict[ParamKey, dict[str, float]]:
    """Return the `config_overrides` for get_megatron_optimizer under bf16 with the distributed optimizer.

    `A_log` and `dt_bias` stay fp32 in a bf16 model. megatron-core 0.19.2's distributed optimizer finds the wrong state when it saves
    a group of parameters of two dtypes (distrib_optimizer.py, model_param_group_index_map). These overrides add to its standard
    ones a group of the two, without weight decay, as they are in the standard group.

    Example:
        >>> optimizer = get_megatron_optimizer(config, model_chunks, config_overrides=optimizer_config_overrides(config))
    """
    scalars = ParamKey(name=tuple(f"*.{name}" for name in FP32_PARAMETERS))
    # a value that differs from the standard group's makes another group; without decay, its schedule means nothing
    return {**get_standard_config_overrides(config), scalars: {"wd_mult": 0.0, "start_wd": 0.0, "end_wd": 0.0}}
