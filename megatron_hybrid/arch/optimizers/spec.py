"""Declaration of an optimizer: its state, its bytes per parameter, and the implementations that run it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.base.section import Section

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
    """Value of `train.optimizer.kind`."""
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
    whole_matrices: bool = False
    """Its update of a matrix needs the whole matrix. Data parallel ranks then share matrices, not ranges of flattened buffers
    (train/optimizers/layer_wise.py)."""
    implementation: str | None = None
    """Dotted name of the module that makes it known to megatron-core (train/optimizers/muon.py); None: megatron-core has it."""
    unsupported: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Reasons why it does not run with `deepspeed`, `offload` or `fp8_param_gather`, by these names."""

    config_class: ClassVar[type[Section] | None] = None
    """Section with the fields of `train.optimizer` that only it reads. OptimizerConfig inherits them."""

    def torch_arguments(self, settings: Settings) -> dict[str, Any]:
        """Return the hyperparameters of `torch_class` and `host_class`, besides the learning rate and weight decay."""
        raise NotImplementedError

    def megatron_fields(self, settings: Settings) -> dict[str, Any]:
        """Return fields of megatron-core's OptimizerConfig: the optimizer's name and hyperparameters."""
        raise NotImplementedError

    def of(self, parameter: PackedParameter) -> "OptimizerSpec":
        """Return the declaration that applies to a parameter: this one, unless others update some of the parameters."""
        return self

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

    def update_flops(self, parameter: PackedParameter, ranks: int, settings: Settings) -> float:
        """Return the FLOPs of GEMMs with which one of `ranks` tensor parallel ranks updates a parameter, as those of bf16."""
        return 0.0

    def update_collectives(
        self, parameter: PackedParameter, ranks: int, settings: Settings
    ) -> Iterable[tuple[str, float]]:
        """Return the collectives among tensor parallel ranks in an update: name in the planner, bytes of the whole tensor."""
        return ()

    def checkpoint_bytes(self, parameter_bytes: int) -> int:
        """Return bytes per parameter in a checkpoint: weight, states, and the master weight unless the weight is fp32."""
        return parameter_bytes + self.state_bytes + (FP32_BYTES if parameter_bytes < FP32_BYTES else 0)
