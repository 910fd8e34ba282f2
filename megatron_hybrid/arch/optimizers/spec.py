"""Declaration of an optimizer: its state, its bytes per parameter, and the implementations that run it."""

from dataclasses import dataclass
from typing import Any, Protocol

MASTER = "master"
"""State name of the fp32 master weight, which every optimizer has for parameters that are not fp32."""
FP32_BYTES = 4
"""Bytes per parameter of a gradient, of a master weight and of each optimizer state: all are fp32."""


class Settings(Protocol):
    """The fields of `train.optimizer` that declarations read."""

    @property
    def betas(self) -> tuple[float, float]: ...

    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class OptimizerSpec:
    """Torch-free declaration of an optimizer."""

    name: str
    """Value of `train.optimizer.name`."""
    states: tuple[str, ...]
    """States per parameter, fp32 and of its shape. The keys are those of the optimizer's own `state`; checkpoints use them too."""
    torch_class: str
    """Dotted name of torch's implementation, which DeepSpeed runs on the device."""
    host_class: str | None
    """Dotted name of the implementation that DeepSpeed runs in host memory; None: not available."""
    distributed: bool = True
    """Whether megatron-core's distributed optimizer supports it."""
    counts_steps: bool = True
    """Whether it counts its steps, for bias correction."""

    def torch_arguments(self, settings: Settings) -> dict[str, Any]:
        """Return the hyperparameters of `torch_class` and `host_class`, besides the learning rate and weight decay."""
        raise NotImplementedError

    def megatron_fields(self, settings: Settings) -> dict[str, Any]:
        """Return fields of megatron-core's OptimizerConfig: the optimizer's name and hyperparameters."""
        raise NotImplementedError

    @property
    def state_bytes(self) -> int:
        """Bytes per parameter of the states, without the master weight."""
        return FP32_BYTES * len(self.states)

    @property
    def host_bytes(self) -> int:
        """Bytes per parameter in host memory for offloaded state: the states, an fp32 copy of the parameter, its gradient."""
        return self.state_bytes + 2 * FP32_BYTES

    @property
    def update_bytes(self) -> int:
        """Bytes per parameter that an update moves: read the gradient; read and write master weight and states."""
        return FP32_BYTES + 2 * (FP32_BYTES + self.state_bytes)

    def checkpoint_bytes(self, parameter_bytes: int) -> int:
        """Return bytes per parameter in a checkpoint: weight, states, and the master weight unless the weight is fp32."""
        return parameter_bytes + self.state_bytes + (FP32_BYTES if parameter_bytes < FP32_BYTES else 0)
