"""DeepSpeed ZeRO: sharding and offload. Used with train.engine = deepspeed."""

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_hybrid.base.errors import ConfigError, Problems
from megatron_hybrid.base.section import Section


class ZeroConfig(Section):
    """Sharding and offload of the model's state with DeepSpeed. Checkpoints do not depend on it."""

    stage: Literal[1, 2, 3] = 2
    """State that the data parallel ranks shard. 1: optimizer state; 2: also gradients; 3: also parameters."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Place of master weights, optimizer state and reduced gradients, and of the update: the device, or host memory."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of that state to offload; the rest stays on the device. Below 1: stage 3 only."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Place of parameters that are not in use. Stage 3 only."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_nvme(cls, values: Any) -> Any:
        """Refuse offload to NVMe, which earlier versions had. Their saved configurations hold `nvme_path: null`."""
        if not isinstance(values, dict):
            return values
        if values.get("offload_optimizer") == "nvme":
            raise ConfigError.at(
                "offload_optimizer", "nvme is no longer supported; set it to cpu, and leave nvme_path out"
            )
        if values.get("nvme_path") is not None:
            raise ConfigError.at("nvme_path", "offload to NVMe is no longer supported; leave it out")
        return {name: value for name, value in values.items() if name != "nvme_path"}

    @model_validator(mode="after")
    def _check(self) -> "ZeroConfig":
        problems = Problems()
        if self.offload_parameters != "none" and self.stage != 3:
            problems.add(
                "offload_parameters",
                f"{self.offload_parameters} needs sharded parameters; set stage to 3, or this to none",
            )
        if self.offload_fraction < 1 and (self.stage != 3 or self.offload_optimizer != "cpu"):
            problems.add(
                "offload_fraction",
                f"{self.offload_fraction:g} needs stage 3 and offload_optimizer cpu; set both, or this to 1.0",
            )
        problems.raise_if_any()
        return self
