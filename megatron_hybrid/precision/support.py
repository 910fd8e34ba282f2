"""Checks whether this machine supports the configured FP8 formats, before anything is built."""

import torch

from megatron_hybrid.arch.fp8_recipes import RECOMMENDED
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.precision import PrecisionConfig

ATTENTION_CUDNN = (9, 19, 0)
"""Oldest cuDNN whose FP8 attention is correct on Hopper. The relative error is 0.37 with 9.14 and 0.06 with 9.19."""


def check_support(precision: PrecisionConfig) -> None:
    """Check that the GPU, its CUDA and its cuDNN can run the configured formats.

    Raises:
        ConfigError: one of them cannot; the message names it.
    """
    recipe = precision.recipe
    if recipe is None:
        return
    from transformer_engine.pytorch import quantization
    from transformer_engine.pytorch.utils import get_cudnn_version

    able, reason = getattr(quantization, recipe.support_check)()
    if not able:
        same = recipe.support_check == RECOMMENDED.support_check
        remedy = "set it to null" if same else f"set it to {RECOMMENDED.name}, or to null"
        gpu = torch.cuda.get_device_name()
        raise ConfigError.at("precision.fp8_recipe", f"{recipe.name} cannot run on this {gpu}: {reason} {remedy}")
    version = get_cudnn_version()
    if precision.fp8_attention and version < ATTENTION_CUDNN:
        found, needed = (".".join(map(str, v)) for v in (version, ATTENTION_CUDNN))
        raise ConfigError.at(
            "precision.fp8_attention",
            f"true needs cuDNN {needed} or newer, and {found} is loaded, whose FP8 attention is wrong on Hopper; put a newer "
            "cuDNN first in LD_LIBRARY_PATH (pip install nvidia-cudnn-cu13), or set it to false",
        )
