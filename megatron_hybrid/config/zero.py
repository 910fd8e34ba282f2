"""DeepSpeed's ZeRO: what the data parallel ranks shard, and what is offloaded. Used with train.engine = deepspeed."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from megatron_hybrid.base.errors import ConfigError, Problems, join, shown
from megatron_hybrid.base.section import Section

if TYPE_CHECKING:
    from megatron_hybrid.config.run import RunConfig


class ZeroConfig(Section):
    """Where DeepSpeed keeps the model's state. Checkpoints do not depend on it: any run can resume from any other's."""

    stage: Literal[1, 2, 3] = 2
    """What the data parallel ranks shard. 1: optimizer state; 2: gradients too; 3: parameters too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where master weights, optimizer state and reduced gradients are kept and updated: on the device, or in host memory."""
    offload_fraction: float = Field(1.0, gt=0, le=1)
    """Fraction of that state to offload; the rest stays on the device. Below 1: stage 3 only."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters are kept while they are not in use. Stage 3 only."""

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
                f"{self.offload_parameters} needs sharded parameters; set stage to 3, or set it to none",
            )
        if self.offload_fraction < 1 and (self.stage != 3 or self.offload_optimizer != "cpu"):
            problems.add(
                "offload_fraction",
                f"{self.offload_fraction:g} needs stage 3 and offload_optimizer cpu; set both, or this to 1.0",
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
