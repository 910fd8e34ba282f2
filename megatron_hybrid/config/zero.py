"""DeepSpeed's ZeRO: what data parallel ranks share out, and what leaves the device. Read where train.engine = deepspeed."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from megatron_hybrid.base.errors import Problems, join, shown
from megatron_hybrid.base.section import Section

if TYPE_CHECKING:
    from megatron_hybrid.config.run import RunConfig


class ZeroConfig(Section):
    """How DeepSpeed keeps the model's state. A checkpoint does not depend on it: any run resumes from any other's."""

    stage: Literal[1, 2, 3] = 2
    """What data parallel ranks share out: 1 the optimizer's state; 2 gradients too; 3 parameters too."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights, moments and reduced gradients lie, and Adam runs: on the device, in host memory, or on NVMe."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Share of that state which is offloaded; the rest stays on the device. Below 1: stage 3 and cpu only."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters lie while they are not in use. Stage 3 only. (DeepSpeed 0.19.8's swapping of parameters to NVMe ends in an
    assertion of its own with this model.)"""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for what is offloaded there."""

    @model_validator(mode="after")
    def _check(self) -> "ZeroConfig":
        problems, on_nvme = Problems(), self.offload_optimizer == "nvme"
        if self.offload_parameters != "none" and self.stage != 3:
            problems.add(
                "offload_parameters",
                f"{self.offload_parameters} needs parameters that are shared out: set stage to 3; or set it to none",
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


def check_engine(run: "RunConfig", problems: Problems) -> None:
    """What train.engine asks of the other sections."""
    if run.train.engine == "deepspeed":
        _check_deepspeed(run, problems)
        return
    for field in ZeroConfig.model_fields:
        value = getattr(run.zero, field)
        if value != ZeroConfig.model_fields[field].default:
            problems.add(
                join("zero", field),
                f"{shown(value)} has no meaning with train.engine = megatron; set that to deepspeed, or leave zero out",
            )


def _check_deepspeed(run: "RunConfig", problems: Problems) -> None:
    parallel, defaults = run.parallel, type(run.parallel).model_fields
    if parallel.pipeline_parallel_size > 1:
        problems.add(
            "parallel.pipeline_parallel_size",
            f"{parallel.pipeline_parallel_size} cannot run with train.engine = deepspeed: its ZeRO reduces and shares out "
            "after each micro-batch's backward pass, and a pipeline has several micro-batches under way; set it to 1, or "
            "train.engine to megatron",
        )
    if parallel.context_parallel_size > 1:
        problems.add(
            "parallel.context_parallel_size",
            f"{parallel.context_parallel_size} is for train.engine = megatron, whose data parallel groups hold these ranks as well; "
            "set it to 1, or train.engine to megatron",
        )
    for field in ("distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "bucket_size"):
        value = getattr(parallel, field)
        if value != defaults[field].default:
            problems.add(
                join("parallel", field),
                f"{shown(value)} is for train.engine = megatron; leave it out: zero.stage says what is shared out",
            )
    if parallel.tp_comm_overlap:
        problems.add("parallel.tp_comm_overlap", "true is for train.engine = megatron; set that, or this to false")
    if run.precision.fp8:
        problems.add(
            "precision.fp8_recipe",
            f"{run.precision.fp8_recipe} needs megatron's fp32 gradient buffers; set train.engine to megatron, or this to null",
        )
