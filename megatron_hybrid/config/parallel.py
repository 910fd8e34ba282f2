"""Parallel layout: degrees, overlap of communication, recompute."""

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from megatron_hybrid.base.errors import ConfigError, Problems
from megatron_hybrid.base.section import Section

LARGEST_OVERLAP = 8
"""Largest tensor parallel degree with tp_comm_overlap: the number of peers of Transformer Engine's CUDA IPC buffers."""


class ParallelConfig(Section):
    """Parallel degrees. The data parallel size is world size / (tensor * context * pipeline)."""

    tensor_parallel_size: PositiveInt = 1
    """Ranks that shard each weight matrix. If heads do not divide, padding heads are added; the result stays exact."""
    sequence_parallel: bool | None = None
    """Shard the tokens of norms and residual over the tensor parallel ranks. None: on if tensor_parallel_size > 1."""
    tp_comm_overlap: bool = False
    """Overlap tensor parallel all-gathers and reduce-scatters with GEMMs. It needs sequence parallelism, Transformer Engine with bf16
    or the FP8 recipes delayed or tensorwise, and all tensor parallel ranks in one node."""
    context_parallel_size: PositiveInt = 1
    """Ranks that shard the tokens of each sequence, for long sequences. Gated DeltaNet passes its state from rank to rank; attention
    uses all-to-alls between tokens and heads. Parameters, gradients and the optimizer are sharded as over data parallel ranks.
    data.sequence_length must be a multiple of it (of it x tensor_parallel_size with sequence parallelism). Slices of whole 64-token
    chunks are slightly faster."""
    pipeline_parallel_size: PositiveInt = 1
    """Ranks that share the layers, in stages."""
    virtual_pipeline_parallel_size: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved 1F1B). 1: plain 1F1B."""
    overlap_p2p_comm: bool = True
    """Overlap the exchange of activations and gradients between interleaved stages with compute. False: compute waits for the
    exchange, which then takes no SMs from it. Try false if NVLink connects the stages."""
    pipeline_split: tuple[PositiveInt, ...] | None = Field(None, strict=False)
    """Layers of each (virtual) stage in model order. None: as evenly as possible, with fewer layers on the last pipeline rank in
    proportion to the size of the output layer."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over the data and context parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the all-gather of updated parameters with the next forward pass. It needs the two fields above."""
    bucket_size: PositiveInt | None = None
    """Parameters per bucket of overlapped communication. None: megatron-core's default."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """selective: recompute the operations between the projections of Gated DeltaNet mixers and MLPs, whose outputs are large and
    cheap; full: recompute whole layers."""
    keep_delta_rule_states: bool = False
    """Keep the states of Gated DeltaNet's chunks for the backward pass, which otherwise computes them again: 29 kB per token and layer
    of OLMo Hybrid 7B. Recomputed layers always keep them, for the time of their own backward pass."""

    @model_validator(mode="after")
    def _check(self) -> "ParallelConfig":
        problems = Problems()
        if self.sequence_parallel and self.tensor_parallel_size == 1:
            problems.add(
                "sequence_parallel",
                "true needs tensor_parallel_size > 1; leave it out, or set tensor_parallel_size to 2",
            )
        self._check_overlap(problems)
        if self.virtual_pipeline_parallel_size > 1 and self.pipeline_parallel_size == 1:
            problems.add(
                "virtual_pipeline_parallel_size",
                f"{self.virtual_pipeline_parallel_size} needs pipeline_parallel_size > 1; set it to 1, or "
                "pipeline_parallel_size to 2",
            )
        if self.pipeline_split is not None and len(self.pipeline_split) != self.num_stages:
            problems.add(
                "pipeline_split",
                f"{list(self.pipeline_split)} has {len(self.pipeline_split)} entries; give pipeline_parallel_size x "
                f"virtual_pipeline_parallel_size = {self.num_stages} of them, or leave it out",
            )
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            problems.add(
                "overlap_param_gather",
                "true needs distributed_optimizer and overlap_grad_reduce; set both to true, or this to false",
            )
        problems.raise_if_any()
        return self

    def _check_overlap(self, problems: Problems) -> None:
        size = self.tensor_parallel_size
        reason = None
        if self.tp_comm_overlap and size == 1:
            reason = "has nothing to overlap at tensor_parallel_size 1; set that to 2, or this to false"
        elif self.tp_comm_overlap and self.sequence_parallel is False:
            reason = "needs sequence parallelism, whose gathers it overlaps; leave sequence_parallel out, or set this to false"
        elif self.tp_comm_overlap and size > LARGEST_OVERLAP:
            reason = (
                f"copies between at most {LARGEST_OVERLAP} GPUs of one node, and tensor_parallel_size is {size}; set that to "
                f"{LARGEST_OVERLAP}, or this to false"
            )
        if reason:
            problems.add("tp_comm_overlap", f"true {reason}")

    @property
    def num_stages(self) -> int:
        """Number of virtual stages of the whole pipeline."""
        return self.pipeline_parallel_size * self.virtual_pipeline_parallel_size

    @property
    def sequence_parallel_on(self) -> bool:
        return self.tensor_parallel_size > 1 if self.sequence_parallel is None else self.sequence_parallel

    @property
    def keeps_states(self) -> bool:
        return self.keep_delta_rule_states or self.recompute_granularity != "none"

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def replica_size(self) -> int:
        """Number of ranks that share the work on each sequence."""
        return self.model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Return the data parallel size of `world_size` ranks, which `RunConfig.check_world` has checked."""
        return world_size // self.replica_size

    def stage_layers(self, num_layers: int, output_in_layers: float) -> tuple[int, ...]:
        """Return the number of layers of each virtual stage, in model order.

        Args:
            output_in_layers: time of the output layer in units of a layer's. The last pipeline rank gets fewer layers for it.

        Raises:
            ConfigError: fewer layers than stages, or a pipeline_split with another total.
        """
        if self.pipeline_split is not None:
            total = sum(self.pipeline_split)
            if total != num_layers:
                change = f"add {num_layers - total} to" if total < num_layers else f"take {total - num_layers} from"
                raise ConfigError.at(
                    "pipeline_split",
                    f"{list(self.pipeline_split)} sums to {total}; layer_pattern has {num_layers} layers; {change} its "
                    "entries, or leave it out",
                )
            return self.pipeline_split
        stages = self.num_stages
        if num_layers < stages:
            pipeline, virtual = self.pipeline_parallel_size, self.virtual_pipeline_parallel_size
            if num_layers // virtual >= min(2, virtual):  # one pipeline rank cannot interleave
                remedy = f"set it to at most {num_layers // virtual}"
            elif pipeline <= num_layers:
                remedy = f"set virtual_pipeline_parallel_size to at most {num_layers // pipeline}"
            else:
                remedy = f"set it to at most {num_layers} and virtual_pipeline_parallel_size to 1"
            raise ConfigError.at(
                "pipeline_parallel_size",
                f"{pipeline} x virtual_pipeline_parallel_size {virtual} = {stages} stages exceed "
                f"the {num_layers} layers of layer_pattern; {remedy}",
            )
        ranks, virtual = self.pipeline_parallel_size, self.virtual_pipeline_parallel_size
        by_rank = [_spread(count, virtual) for count in _rank_layers(num_layers, ranks, virtual, output_in_layers)]
        by_rank[-1].reverse()
        return tuple(by_rank[rank][place] for place in range(virtual) for rank in range(ranks))


def _rank_layers(num_layers: int, ranks: int, least: int, output_in_layers: float) -> list[int]:
    """Return the layers of each pipeline rank, at least `least`, so that the slowest one is as fast as it can be.

    Ranks further down the pipeline hold fewer micro-batches, so they get a layer more where the number does not divide.
    """
    if ranks == 1:
        return [num_layers]

    def slowest(last: int) -> float:
        return max(-(-(num_layers - last) // (ranks - 1)), last + output_in_layers)

    even = num_layers // ranks
    last = min(range(even, least - 1, -1), key=slowest)  # of equal ones the largest: the others hold more activations
    return [*_spread(num_layers - last, ranks - 1), last]


def _spread(count: int, places: int) -> list[int]:
    """Return `count` as a sum of `places` numbers that differ by at most one, in ascending order."""
    base, extra = divmod(count, places)
    return [base] * (places - extra) + [base + 1] * extra


def averages_exactly(ranks: int) -> bool:
    """Return whether collectives may average gradients over the ranks, instead of a kernel that divides them before a sum.

    For a power of two both give the same bits. For other sizes the result would depend on where a backend divides: NCCL before
    it adds, gloo after.
    """
    return ranks > 1 and ranks.bit_count() == 1
