"""Silence warnings of megatron-core and torch that no user can act on.

The packages checkpoint, convert and train call it when they are imported, and distributed/process_groups.py. A run reports itself
what it uses instead of Transformer Engine, Apex or CUDA.
"""

import logging
import warnings


def silence_known_warnings() -> None:
    """Ignore these warnings in the whole process. Call it before megatron-core is imported."""
    for message in (
        ".*Transformer Engine and Apex are not installed.*",
        ".*Apex is not installed.*",
        ".*full scope is deprecated.*",  # megatron-core's own default value
        ".*MimoModelConfig is experimental.*",
        ".*grad attribute of a Tensor that is not a leaf.*",  # megatron-core's FP32 distributed optimizer reads it on purpose
        ".*torch.jit.script.* is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
        lambda record: (
            "full_param_layout not provided" not in record.getMessage()
        )  # it then computes what we would pass
    )
