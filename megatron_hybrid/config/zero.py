"""DeepSpeed ZeRO: sharding and offload. Read only if train.engine = deepspeed."""

from typing import Literal

from pydantic import Field, model_validator

from megatron_hybrid.base.errors import Problems, shown
from megatron_hybrid.base.section import Section


class ZeroConfig(Section):
    """Sharding and offload of the model's state with DeepSpeed. Checkpoints do not depend on it."""

    stage: Literal[1, 2, 3] = 2
    """State that data parallel ranks shard. 1: the optimizer's state; 2: also gradients; 3: also parameters."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Place of master weights, moments and reduced gradients, and of the Adam update: the device, host memory, or NVMe."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Share of that state that is offloaded. Values below 1 need stage 3 and cpu."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Place of parameters that are not in use. Needs stage 3. DeepSpeed 0.19.8 cannot swap this model's parameters to NVMe: an
    assertion in DeepSpeed fails."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk for offloaded state."""

    @model_validator(mode="after")
    def _check(self) -> "ZeroConfig":
        problems, on_nvme = Problems(), self.offload_optimizer == "nvme"
        if self.offload_parameters != "none" and self.stage != 3:
            problems.add(
                "offload_parameters",
                f"{self.offload_parameters} needs sharded parameters; set stage to 3, or this to none",
            )
        if self.offload_optimizer == "nvme" and self.stage != 3:
            problems.add(
                "offload_optimizer", f"nvme needs stage 3, and it is {self.stage}; set stage to 3, or this to cpu"
            )
        if self.offload_fraction < 1 and (self.stage != 3 or self.offload_optimizer != "cpu"):
            problems.add(
                "offload_fraction",
                f"{self.offload_fraction:g} needs stage 3 and offload_optimizer cpu; set both, or this to 1.0",
            )
        if on_nvme and self.nvme_path is None:
            problems.add("nvme_path", "is missing; give a folder on a local NVMe disk, or offload to cpu")
        if self.nvme_path is not None and not on_nvme:
            problems.add(
                "nvme_path", f"{shown(self.nvme_path)} is not used: nothing is offloaded to nvme; set it to null"
            )
        problems.raise_if_any()
        return self
