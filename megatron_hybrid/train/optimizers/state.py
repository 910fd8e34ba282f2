"""State that optimizers keep per parameter, and the step count that their bias correction uses.

The count does not include skipped steps. torch's optimizers keep it in a tensor per parameter, DeepSpeed's for the host
in an int per parameter, Transformer Engine's and Apex's in an int per parameter group. Muon does not count.
"""

from typing import Any

import torch

from megatron_hybrid.arch.optimizers.spec import OptimizerSpec


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, spec: OptimizerSpec) -> dict[str, Any]:
    """Return the state of a parameter. Before the first step, create zeros, as the optimizer itself would."""
    state: dict[str, Any] = optimizer.state[parameter]
    if spec.states[0] not in state:
        state.update({name: torch.zeros_like(parameter.detach()) for name in spec.states})
        if spec.counts_steps and (_is_torch(optimizer) or _is_deepspeed(optimizer)):
            state["step"] = _new_count(optimizer, parameter, 0)
    return state


def step_count(optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the count of the first optimizer that has one; 0 before the first step."""
    for optimizer in optimizers:
        holders = [*optimizer.state.values(), *optimizer.param_groups]
        if counts := [holder["step"] for holder in holders if "step" in holder]:
            return int(counts[0])
    return 0


def set_step_count(optimizers: list[torch.optim.Optimizer], count: int) -> None:
    """Restore the count of optimizers that have state already."""
    for optimizer in optimizers:
        if _is_torch(optimizer) or _is_deepspeed(optimizer):
            for parameter, state in optimizer.state.items():
                if "step" in state:
                    state["step"] = _new_count(optimizer, parameter, count)
        elif count and _is_fused(optimizer):
            for group in optimizer.param_groups:
                group["step"] = count


def _is_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.")


def _is_deepspeed(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith(("transformer_engine.", "apex."))


def _new_count(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, count: int) -> int | torch.Tensor:
    if _is_deepspeed(optimizer):
        return count
    fused = any(group.get("fused") for group in optimizer.param_groups)
    return torch.full((), float(count), device=parameter.device if fused else "cpu")
