"""Where the network runs: how many ranks share each part of it."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from megatron_hybrid.config.base import Section


class ParallelConfig(Section):
    """Parallel degrees. The data parallel size is what is left: world size / (tensor * pipeline)."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each matrix. Heads that do not divide are padded, exactly."""
    sequence_parallel: bool | None = None
    """Share the norms' and residual's tokens over the tensor parallel ranks. None: on where tensor_parallel_size > 1."""
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Model chunks a pipeline rank holds (interleaved 1F1B); 1: plain 1F1B."""
    pipeline_split: tuple[PositiveInt, ...] | None = None
    """Layers of each (virtual) stage in model order. None: as even as can be, extra layers to the middle stages."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs. Needs both settings above."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing; the cheap, large parts of each mixer; whole layers."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            raise ValueError("sequence_parallel: true needs tensor_parallel_size > 1: leave it out, or set tensor_parallel_size = 2")
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            raise ValueError("virtual_pipeline_parallel_size > 1 needs pipeline_parallel_size > 1: set it to 1, or pipeline_parallel_size = 2")
        if self.pipeline_split is not None and len(self.pipeline_split) != self.num_stages:
            raise ValueError(
                f"pipeline_split has {len(self.pipeline_split)} entries: pipeline_parallel_size x virtual_pipeline_parallel_size "
                f"= {self.num_stages} are needed"
            )
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather: true needs distributed_optimizer: true and overlap_grad_reduce: true")
        return self

    @property
    def num_stages(self) -> int:
        """Virtual stages over the whole pipeline."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    @property
    def sequence_parallel_on(self) -> bool:
        return self.tensor_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each virtual stage, in model order.

        Raises:
            ValueError: fewer layers than stages, or a pipeline_split of another total.
        """
        if self.pipeline_split is not None:
            if sum(self.pipeline_split) != num_layers:
                raise ValueError(f"pipeline_split sums to {sum(self.pipeline_split)}: layer_pattern has {num_layers} layers")
            return self.pipeline_split
        stages = self.num_stages
        if num_layers < stages:
            raise ValueError(
                f"pipeline_parallel_size x virtual_pipeline_parallel_size = {stages} exceeds the {num_layers} layers of layer_pattern: "
                f"at most {num_layers}"
            )
        base, extra = divmod(num_layers, stages)
        first = (stages - extra) // 2  # the first and last stages carry embedding and logits: spare them
        return tuple(base + (first <= i < first + extra) for i in range(stages))
