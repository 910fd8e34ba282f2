"""parallel.tp_comm_overlap: tensor parallel ranks exchange tokens while they multiply, by Transformer Engine's user buffers.

Forward, the tokens that a column-parallel linear gathers, and the sums that a row-parallel one scatters, travel in as many
pieces as there are ranks: while one is under way, another is multiplied. Backward, so do the gradients that a row-parallel
linear gathers and, in bf16, those of its input that a column-parallel one scatters. The input itself, gathered once more, and
in FP8 its gradient, go through NCCL beside a product of their own, with these buffers as without them.

Buffers have names (TransformerEngine's: qkv, proj, fc1, fc2), not owners: the layers use them in turn, and Gated DeltaNet's
projections those of attention's, whose exchanged side, hidden_size, is as wide.
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

FIELD = "parallel.tp_comm_overlap"
WORDS = "exchanged in pieces, between the products of projections and MLP"
"""What is overlapped, for the run's log."""
_COPIES = {"method": "ring_exchange", "num_sm": 1, "cga_size": 1, "set_sm_margin": False}
METHODS = {"proj_fprop": _COPIES, "fc2_fprop": _COPIES}
"""Where Transformer Engine's own choice is another: it scatters by a kernel that takes 16 processors from the product.
(base.py, initialize_ub, has the names and the defaults.) Two H200s, four layers at 7B widths: 256.5 ms a step against 260.9 with
that kernel, and 260.9 with NCCL alone."""
GRADIENT_METHODS = {"qkv_dgrad": _COPIES, "fc1_dgrad": _COPIES}
"""With these as well 251.6 ms."""


def scatters_gradients(parallel: ParallelConfig, precision: PrecisionConfig) -> bool:
    """Whether column-parallel linears scatter their input's gradient in pieces, too. Not in FP8: where layers in bf16 stand beside
    those in FP8 Transformer Engine fails to make the buffers."""
    return parallel.tp_comm_overlap and not precision.fp8


def start_overlap(
    precision: PrecisionConfig, dtype: str, tokens: int, hidden_size: int, group: dist.ProcessGroup
) -> None:
    """Make the buffers, before the layers that use them. Every rank of the run calls it.

    They are some twelve times a micro-batch's hidden states, in each of bf16 and FP8 where layers of both use them, and not of
    PyTorch's memory.

    Args:
        tokens: of a micro-batch, over all tensor parallel ranks.
        group: the tensor parallel ranks; they are numbered one after the other.

    Raises:
        ConfigError: the group spans several nodes.
    """
    _check_one_node(group)
    from transformer_engine.pytorch.module import base

    # Copies gain nothing by NVLink multicast, and making multicast buffers fails where it is switched off or missing
    os.environ["UB_SKIPMC"] = "1"
    # A kernel that has waited this long for another rank goes on without its data, and only says so: NCCL must give up first
    os.environ.setdefault("UB_TIMEOUT", str(120 * LONGEST_WAIT_MINUTES))
    mode = base.UserBufferQuantizationMode
    modes = [mode.FP8 if precision.fp8 else mode.NONE]
    if precision.num_layers_at_start_in_bf16 or precision.num_layers_at_end_in_bf16:
        modes.append(mode.NONE)
    methods = METHODS if precision.fp8 else METHODS | GRADIENT_METHODS
    base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=group.size(),
        quantization_modes=modes,
        dtype=torch.bfloat16,
        ub_cfgs=methods,
        bootstrap_backend="nccl",  # which this run needs anyway; gloo would have to find the way between the nodes as well
    )


def stop_overlap() -> None:
    """Free the buffers of `start_overlap`, after the last step."""
    from transformer_engine.pytorch.module import base

    torch.cuda.synchronize()
    gc.collect()  # a buffer that outlives the others would take those of the next engine with it when it goes
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
