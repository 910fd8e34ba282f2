"""Translates our configuration to DeepSpeed's and starts DeepSpeed. Only this file imports DeepSpeed, when it is needed."""

import logging
import os
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.config.zero import ZeroConfig
from megatron_hybrid.distributed.device import has_cuda

SUB_GROUP = 180_000_000
"""Parameters whose state stage 3 updates, offloads and page-locks at once. The last of them may exceed this number.

With any matrix of the 7B model the sum stays below 2^28. Page-locked buffers are rounded up to a power of two, here 1 GiB.
"""


def import_deepspeed(zero: ZeroConfig) -> ModuleType:
    """Import DeepSpeed, set up for this rank's device.

    Raises:
        ConfigError: DeepSpeed is not installed, or the requested offload cannot run on this machine.
    """
    if find_spec("deepspeed") is None:
        raise ConfigError.at(
            "train.engine",
            "deepspeed is not installed; HYBRID_EXTRAS=dev,deepspeed source tools/env.sh installs it, or set it to megatron",
        )
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_cuda() else "cpu")  # read on import
    device = torch.cuda.current_device() if has_cuda() else 0
    os.environ.setdefault("LOCAL_RANK", os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", str(device)))
    deepspeed = import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # on CPU ranks it would spend minutes compiling collectives over shared memory; gloo has collectives
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _check_offload(zero)
    return deepspeed


def start_engine(
    deepspeed: ModuleType,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    groups: ProcessGroupCollection,
    config: dict[str, Any],
) -> Any:
    """Build DeepSpeed's engine around the model, as deepspeed.initialize does, with the existing process groups."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine

    class ZeroEngine(DeepSpeedEngine):  # type: ignore[misc]
        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:
            # engine.py:2303: bf16 at stage 1 would get BF16_Optimizer, whose step cannot be skipped. ZeRO's optimizer works too.
            return "zero_optimization"

    deepspeed.init_distributed(dist_init_required=False)
    mpu = Mpu(groups)
    return ZeroEngine(
        args=None, model=model, optimizer=optimizer, mpu=mpu, config=config, config_class=DeepSpeedConfig(config, mpu)
    )


def _check_offload(zero: ZeroConfig) -> None:
    if zero.offload_fraction < 1 and not has_cuda():
        raise ConfigError.at(
            "zero.offload_fraction",
            f"{zero.offload_fraction:g} leaves a part on a GPU, and there is none; set it to 1.0",
        )


class Mpu:
    """Tensor and data parallel groups under the names that DeepSpeed uses ("model parallel" is tensor parallel)."""

    def __init__(self, groups: ProcessGroupCollection) -> None:
        self._tensor: dist.ProcessGroup = groups.tp
        self._data: dist.ProcessGroup = groups.dp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)


def deepspeed_config(train: TrainConfig, zero: ZeroConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    DeepSpeed's own gradient accumulation stays at 1. The engine marks the end of each step, so that the batch size may
    change from step to step.
    """
    pinned = has_cuda()
    stage: dict[str, Any] = {
        "stage": zero.stage,
        "contiguous_gradients": True,
        "overlap_comm": has_cuda(),
        "sub_group_size": SUB_GROUP,
        "memory_efficient_linear": False,  # it would replace torch's linear in the whole process; our linears are megatron-core's
    }
    if zero.offload_optimizer != "none":
        stage["offload_optimizer"] = {
            "device": zero.offload_optimizer,
            "pin_memory": pinned,
            "ratio": zero.offload_fraction,
        }
    if zero.offload_parameters != "none":
        stage["offload_param"] = {"device": zero.offload_parameters, "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.optimizer.clip_grad,
        "bf16": {"enabled": train.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
        "zero_force_ds_cpu_optimizer": has_cuda(),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
