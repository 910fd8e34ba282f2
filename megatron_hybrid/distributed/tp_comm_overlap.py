"""Overlap of tensor parallel communication with GEMMs (parallel.tp_comm_overlap) by Transformer Engine's user buffers.

Forward, the all-gather of a column-parallel linear and the reduce-scatter of a row-parallel linear are split into one chunk per
rank: the GEMM of one chunk overlaps with the transfer of the next. Backward, the all-gather of a row-parallel linear's gradients
is split as well, and in bf16 the reduce-scatter of a column-parallel linear's input gradient. The second all-gather of the input,
and in FP8 the reduce-scatter of its gradient, use NCCL and overlap with another GEMM, with or without user buffers.

Transformer Engine names the buffers qkv, proj, fc1 and fc2. All layers share them; the projections of Gated DeltaNet use those of
attention, because both exchange tensors of width hidden_size.
"""

import gc
import os

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.device import node_name
from megatron_hybrid.distributed.process_groups import LONGEST_WAIT_MINUTES
from megatron_hybrid.distributed.quiet import without_user_buffer_banners

FIELD = "parallel.tp_comm_overlap"
WORDS = "chunked, overlapped with the GEMMs of projections and MLP"
"""Description for the run's log."""
_COPIES = {"method": "ring_exchange", "num_sm": 1, "cga_size": 1, "set_sm_margin": False}
METHODS = {"proj_fprop": _COPIES, "fc2_fprop": _COPIES}
"""Methods that replace Transformer Engine's defaults (base.py, initialize_ub): its reduce-scatter kernel takes 16 SMs from the GEMM.
256.5 ms per step instead of 260.9 ms with that kernel or with NCCL (two H200s, four layers at 7B widths)."""
GRADIENT_METHODS = {"qkv_dgrad": _COPIES, "fc1_dgrad": _COPIES}
"""Methods for gradients: 251.6 ms per step together with METHODS."""


def scatters_gradients(parallel: ParallelConfig, precision: PrecisionConfig) -> bool:
    """Return True if column-parallel linears overlap the reduce-scatter of their input gradient. In FP8 they do not, because
    Transformer Engine cannot create the buffers if some layers are in bf16.
    """
    return parallel.tp_comm_overlap and not precision.fp8


def start_overlap(
    precision: PrecisionConfig, dtype: str, tokens: int, hidden_size: int, group: dist.ProcessGroup
) -> None:
    """Create the buffers, before the layers that use them. Every rank of the run calls it.

    They take about twelve times the memory of a micro-batch's hidden states, outside of PyTorch's allocator. If there are layers
    in both bf16 and FP8, each format has its own buffers.

    Args:
        tokens: tokens of a micro-batch, over all tensor parallel ranks.
        group: the tensor parallel ranks, which have consecutive numbers.

    Raises:
        ConfigError: the group spans several nodes.
    """
    _check_one_node(group)
    from transformer_engine.pytorch.module import base

    # Copies do not benefit from NVLink multicast, and creating multicast buffers fails if it is disabled or missing
    os.environ["UB_SKIPMC"] = "1"
    # A kernel that has waited this long for a rank continues without its data and only prints a warning: NCCL must time out first
    os.environ.setdefault("UB_TIMEOUT", str(120 * LONGEST_WAIT_MINUTES))
    mode = base.UserBufferQuantizationMode
    modes = [mode.FP8 if precision.fp8 else mode.NONE]
    if precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16:
        modes.append(mode.NONE)
    methods = METHODS if precision.fp8 else METHODS | GRADIENT_METHODS
    with without_user_buffer_banners():
        base.initialize_ub(
            shape=[tokens, hidden_size],
            tp_size=group.size(),
            quantization_modes=modes,
            dtype=torch.bfloat16,
            ub_cfgs=methods,
            bootstrap_backend="nccl",  # already in use; gloo would need a route between the nodes as well
        )


def stop_overlap() -> None:
    """Free the buffers of `start_overlap`, after the last step."""
    from transformer_engine.pytorch.module import base

    torch.cuda.synchronize()
    gc.collect()  # a buffer destroyed later would also destroy those of the next engine
    base.destroy_ub()


def _check_one_node(group: dist.ProcessGroup) -> None:
    nodes: list[str] = [""] * group.size()
    dist.all_gather_object(nodes, node_name(), group=group)
    if len(set(nodes)) > 1:
        raise ConfigError.at(
            FIELD,
            f"true needs tensor parallel ranks on one node, and some are on {', '.join(dict.fromkeys(nodes))}; start a multiple "
            "of parallel.tensor_parallel_size ranks on each node, or set it to false",
        )
