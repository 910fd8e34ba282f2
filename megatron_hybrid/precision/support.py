"""What this machine can do of what the configuration asks for. Asked before anything is built."""

import torch

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig

CUDNN_OF_ATTENTION = (9, 19, 0)
"""Older ones get FP8 attention wrong on Hopper: 9.14 errs by 0.37 where 9.19 errs by 0.06."""


def check_support(precision: PrecisionConfig) -> None:
    """
    Raises:
        ConfigError: a format that this GPU, its CUDA or its cuDNN cannot run, naming which.
    """
    if not precision.fp8:
        return
    from transformer_engine.pytorch.quantization import check_fp8_block_scaling_support, check_fp8_support
    from transformer_engine.pytorch.utils import get_cudnn_version

    blockwise = precision.fp8_recipe == "blockwise"
    able, reason = (check_fp8_block_scaling_support if blockwise else check_fp8_support)()
    gpu = torch.cuda.get_device_name()
    if not able:
        remedy = "set it to tensorwise, or to null" if blockwise else "set it to null"
        raise ConfigError.at(
            "precision.fp8_recipe", f"{precision.fp8_recipe} cannot run on this {gpu}: {reason} {remedy}"
        )
    version = get_cudnn_version()
    if precision.fp8_attention and version < CUDNN_OF_ATTENTION:
        found, needed = (".".join(map(str, v)) for v in (version, CUDNN_OF_ATTENTION))
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true needs cuDNN {needed} or newer, and {found} is loaded, whose FP8 attention is wrong on Hopper; put a newer "
            "cuDNN first in LD_LIBRARY_PATH (pip install nvidia-cudnn-cu13), or set it to false",
        )
