"""Buffers for optimizers that need whole matrices: megatron-core's LayerWiseDistributedOptimizer.

With parallel.distributed_optimizer, data parallel ranks share matrices instead of ranges of flattened buffers. Matrices are in buffers
of their own, in which none crosses the border between two ranks. Gradients are reduce-scattered and parameters all-gathered as with
the distributed optimizer, which keeps all other parameters.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_hybrid.arch.optimizers.spec import OptimizerSpec
from megatron_hybrid.model.param_layout import ParamLayout

_DEFAULT_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
"""megatron-core's default of bucket_size: distributed/distributed_data_parallel.py:67."""


def tag_matrices(spec: OptimizerSpec, layout: ParamLayout, chunks: Sequence[torch.nn.Module]) -> None:
    """Mark the parameters whose updates need them whole, by the attribute that megatron-core reads.

    megatron-core's own rule (optimizer/layer_wise_optimizer.py:40) takes every parameter of two dimensions that is no embedding. That
    would include the depthwise convolutions, whose rows are filters of separate channels.
    """
    for parameter, packed in layout.packed_parameters(chunks):
        if spec.of(packed).whole_matrices:
            parameter.is_managed_by_layer_wise_optimizer = True  # type: ignore[attr-defined]


def is_tagged(parameter: torch.Tensor) -> bool:
    """Return whether `tag_matrices` has marked a parameter."""
    return getattr(parameter, "is_managed_by_layer_wise_optimizer", False)


def wrap_layer_wise(
    chunks: Iterable[Any], config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Wrap tagged model chunks in megatron-core's DDP, with buffers whose matrices are whole on one rank.

    `disable_bucketing` is not used for later chunks, as it is with other optimizers: it joins the buffers of matrices and of all other
    parameters in one group (distributed/param_and_grad_buffer.py:1707), which would be gathered after the first of two updates.
    """
    wrapped = []
    for number, chunk in enumerate(chunks):
        split = config.overlap_grad_reduce and groups.pp.rank() == 0 and number == 0
        buffers = _buffers(chunk, config, groups.dp_cp.size(), split)
        wrapped.append(DistributedDataParallel(chunk.config, config, chunk, full_param_layout=buffers))
    return wrapped


def _buffers(chunk: Any, config: DistributedDataParallelConfig, ranks: int, split: bool) -> FullParamLayout:
    """Return the layout of a chunk's buffers. `split`: in buckets, as DDP itself cuts them."""
    size = config.bucket_size or max(_DEFAULT_BUCKET, _BUCKET_PER_RANK * ranks)
    parameters = [parameter for parameter in chunk.parameters() if parameter.requires_grad]
    return LayerWiseDistributedOptimizer.compute_full_param_layout(parameters, size if split else None, ranks, config)
