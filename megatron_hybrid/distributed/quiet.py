"""Silence what megatron-core and torch say on import and at start-up that no user can act on.

This package's programs call it: checkpoint/, convert/ and train/ when they are imported, and distributed/process_groups.py. What a run
really uses instead of Transformer Engine, Apex or CUDA, it says itself.
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
        ".*grad attribute of a Tensor that is not a leaf.*",  # megatron-core's FP32 distributed optimizer looks on purpose
        ".*torch.jit.script.* is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").addFilter(
        lambda record: (
            "full_param_layout not provided" not in record.getMessage()
        )  # it then computes what we would pass
    )
