"""Job: a model to train and the GPUs to train it on, without a layout."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_hybrid.arch.documents import ASSUMED_LENGTH
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.data import DataConfig, SourceConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.train import OptimizerConfig, TrainConfig
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.plan import Plan, planned_attended_length


@dataclass(frozen=True)
class Job:
    """Model, batch and hardware for which layouts are searched."""

    model: ModelConfig
    gpus: int
    hardware: Hardware
    sequence_length: int
    global_batch_size: int
    dtype: Literal["fp32", "bf16"] = "bf16"
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: str = "auto"
    """none, selective or full; auto: the best of them."""
    tp_comm_overlap: bool = False
    """Use it in the layouts that support it. Its memory is predicted; its speed is not."""
    offload_fraction: float = 0.0
    """train.optimizer.offload_fraction. Its memory is predicted; updates are timed as if the device made all of them."""
    optimizer: str = "adamw"
    """train.optimizer.kind."""
    attended_length: int | None = None
    """Attended length of separated documents (arch/documents.py). None: data.documents is keep."""
    base: RunConfig | None = None
    """Run to plan for. The trainer also checks its other fields, such as train.batch_ramp."""

    @classmethod
    def of(
        cls,
        run: RunConfig,
        gpus: int,
        hardware: Hardware,
        recompute: str = "auto",
        document_length: float = ASSUMED_LENGTH,
    ) -> "Job":
        """Return the job that trains `run` on this many GPUs.

        Args:
            document_length: mean tokens of a document, if documents are separated.
        """
        return cls(
            run.model,
            gpus,
            hardware,
            run.data.sequence_length,
            run.train.global_batch_size,
            run.train.dtype,
            run.precision,
            recompute,
            run.parallel.tp_comm_overlap,
            run.train.optimizer.offload_fraction,
            run.train.optimizer.kind,
            planned_attended_length(run.data, document_length),
            run,
        )

    def run(self, parallel: ParallelConfig, micro_batch_size: int) -> RunConfig:
        """Return the run under a layout, not validated. Without a base, data and training are placeholders."""
        if self.base is not None:
            train = self.base.train.model_copy(update={"micro_batch_size": micro_batch_size})
            return self.base.model_copy(update={"parallel": parallel, "train": train})
        train = TrainConfig.model_construct(
            steps=1, global_batch_size=self.global_batch_size, micro_batch_size=micro_batch_size, dtype=self.dtype
        )
        data = DataConfig.model_construct(
            train=(SourceConfig.model_construct(path="none", dtype=None),),
            validation={},
            sequence_length=self.sequence_length,
        )
        return RunConfig.model_construct(
            run_dir="runs/none", model=self.model, data=data, train=train, parallel=parallel, precision=self.precision
        )

    def plan(self, parallel: ParallelConfig, micro_batch_size: int) -> Plan:
        """Return the plan of a layout."""
        return Plan(
            self.model,
            parallel,
            self.gpus,
            self.sequence_length,
            micro_batch_size,
            self.global_batch_size,
            self.dtype,
            self.precision,
            self.offload_fraction,
            self.optimizer,
            self.attended_length,
            self.base.train.optimizer if self.base is not None else OptimizerConfig(),
        )
