"""Optimizer state in host memory (train.optimizer.offload_fraction): megatron-core's HybridDeviceOptimizer.

HybridDeviceOptimizer offloads whole parameters (under data parallelism, this rank's parts of them). It takes them in the
order of the decay groups, fp32 parameters first in each, until the fraction is reached. Each offloaded parameter has an
optimizer of its own, torch's, over a copy in host memory. So gradients and updated parameters are copied while the next
one is updated. All other parameters share one optimizer on the device, over fp32 masters there.

The host copy of a bf16 parameter is its fp32 master. A_log and dt_bias are fp32: offloaded, they have copies too;
otherwise they are updated in place.
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer


def offload_options(fraction: float) -> dict[str, Any]:
    """Return the fields of megatron-core's OptimizerConfig for train.optimizer.offload_fraction."""
    if not fraction:
        return {}
    return dict(
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
        use_precision_aware_optimizer=True,  # otherwise DistributedOptimizer makes its own masters on the device
    )


def is_hybrid(optimizer: torch.optim.Optimizer | None) -> bool:
    """Return whether an optimizer is megatron-core's hybrid one."""
    return isinstance(optimizer, HybridDeviceOptimizer)


def inner_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers that hold the state: those that the hybrid one drives, or the optimizer itself."""
    return list(optimizer.sub_optimizers) if is_hybrid(optimizer) else [optimizer]


def updated_tensor(optimizer: Any, shard: torch.Tensor) -> torch.Tensor:
    """Return the tensor that the optimizer updates in place of this rank's part of a parameter."""
    return optimizer.param_to_inner_param[shard] if is_hybrid(optimizer) else shard


def assign_gradients(optimizer: Any) -> None:
    """Assign gradients to fp32 parameters that stay on the device.

    hybrid_optimizer.py (_set_sub_optimizer_grads) assigns them to copies only, so these would never be updated.
    """
    if is_hybrid(optimizer):
        for shard, main in optimizer.param_to_inner_param.items():
            if main is shard:
                shard.grad = shard.decoupled_grad


@torch.no_grad()
def refresh_copies(optimizer: Any) -> None:
    """Copy loaded fp32 parameters to their host copies. These are not masters, so a checkpoint does not hold them."""
    if is_hybrid(optimizer):
        for shard, copy in optimizer.gpu_params_map_cpu_copy.items():
            if shard.dtype == torch.float32:
                copy.copy_(shard)


def implementation_name(optimizer: Any) -> str:
    """Return the implementation, `transformer_engine.FusedAdam`; for a hybrid one, also the share in host memory."""
    if not is_hybrid(optimizer):
        return _class_name(type(optimizer))
    everything = sum(shard.numel() for shard in optimizer.param_to_inner_param)
    share = sum(shard.numel() for shard in optimizer.gpu_params_map_cpu_copy) / max(everything, 1)
    on_host = f"{share:.1%} of the state in host memory, by {_class_name(optimizer.cpu_optimizer_cls)}"
    return f"{_class_name(optimizer.gpu_optimizer_cls)}; {on_host}" if optimizer.gpu_optimizer else on_host


def _class_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"
