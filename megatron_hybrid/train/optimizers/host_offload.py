"""A share of Adam's state kept, and updated, in host memory: megatron-core's HybridDeviceOptimizer.

It takes whole parameters (of a data parallel rank, its parts of them), in the order of the decay groups and fp32 ones first in each,
until the share is reached. Each of those has an Adam of its own, torch's, over a copy in host memory: so that gradients come and
parameters go while the next one is updated. The rest has one Adam on the device, over fp32 masters there.

A copy of a bf16 parameter is its fp32 master. A_log and dt_bias, which are fp32, have copies, too, or else are updated where they are.
"""

from typing import Any

import torch
from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer


def offload_options(fraction: float) -> dict[str, Any]:
    """Of megatron-core's OptimizerConfig, for train.optimizer.offload_fraction."""
    if not fraction:
        return {}
    return dict(
        optimizer_cpu_offload=True,
        optimizer_offload_fraction=fraction,
        overlap_cpu_optimizer_d2h_h2d=True,
        use_precision_aware_optimizer=True,  # else DistributedOptimizer makes masters of its own, on the device
    )


def is_hybrid(optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether it is megatron-core's hybrid one."""
    return isinstance(optimizer, HybridDeviceOptimizer)


def adams(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Those that update and hold the state: the optimizer itself, or those that the hybrid one drives."""
    return optimizer.sub_optimizers if is_hybrid(optimizer) else [optimizer]


def updated_tensor(optimizer: torch.optim.Optimizer, shard: torch.Tensor) -> torch.Tensor:
    """What Adam updates in place of this rank's part of a parameter."""
    return optimizer.param_to_inner_param[shard] if is_hybrid(optimizer) else shard


def hand_over_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Give gradients to what has no copy. hybrid_optimizer.py:_set_sub_optimizer_grads forgets it, and fp32 parameters that stay on
    the device would never be updated."""
    if is_hybrid(optimizer):
        for shard, main in optimizer.param_to_inner_param.items():
            if main is shard:
                shard.grad = shard.decoupled_grad


@torch.no_grad()
def renew_copies(optimizer: torch.optim.Optimizer) -> None:
    """Set copies of fp32 parameters to the parameters, when these were loaded: they are no masters, which a checkpoint has."""
    if is_hybrid(optimizer):
        for shard, copy in optimizer.gpu_params_map_cpu_copy.items():
            if shard.dtype == torch.float32:
                copy.copy_(shard)


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose Adam it is, `transformer_engine.FusedAdam`; of a hybrid one, also how much is on the host."""
    if not is_hybrid(optimizer):
        return _name_of_class(type(optimizer))
    everything = sum(shard.numel() for shard in optimizer.param_to_inner_param)
    share = sum(shard.numel() for shard in optimizer.gpu_params_map_cpu_copy) / max(everything, 1)
    on_host = f"{share:.1%} of the state in host memory, by {_name_of_class(optimizer.cpu_optimizer_cls)}"
    return f"{_name_of_class(optimizer.gpu_optimizer_cls)}; {on_host}" if optimizer.gpu_optimizer else on_host


def _name_of_class(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"
