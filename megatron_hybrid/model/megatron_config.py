"""Translation of a run's configuration into megatron-core's."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hybrid.arch.flops import output_in_layers
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.distributed.tp_comm_overlap import scatters_gradients
from megatron_hybrid.model.hybrid_stack import SLOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class HybridTransformerConfig(TransformerConfig):
    """megatron-core's configuration, with what this package's mixers look for in it."""

    keep_delta_rule_states: bool = False
    """ParallelConfig's field of this name."""


def apex_weight_gradients() -> bool:
    """Return whether megatron-core's own linears add weight gradients to DDP's fp32 buffer in the GEMM, by Apex's kernel."""
    return has_cuda() and find_spec("fused_weight_gradient_mlp_cuda") is not None


def hybrid_layer_pattern(model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig) -> str:
    """Return megatron-core's pattern: every layer in the same slot (model/hybrid_stack.py), `|` between virtual stages."""
    return "|".join(
        SLOT * count for count in parallel.stage_layers(model.num_layers, output_in_layers(model, precision.fp8))
    )


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    if not precision.fp8:
        return {}
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return dict(
        fp8="hybrid",
        fp8_recipe=precision.fp8_recipe,
        fp8_amax_history_len=precision.fp8_amax_history_len,
        fp8_amax_compute_algo="max",
        first_last_layers_bf16=bool(start or end),
        num_layers_at_start_in_bf16=start,
        num_layers_at_end_in_bf16=end,
        disable_parameter_transpose_cache=not precision.cache_fp8_weights,
        fp8_param=precision.fp8_param_gather,  # HybridStack builds its layers in FP8 by this
    )


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, precision: PrecisionConfig, dtype: str
) -> HybridTransformerConfig:
    """Return the TransformerConfig of a run. Heads are padded. Everything else is the model's.

    Its context_parallel_size stays 1: otherwise Transformer Engine's attention would exchange keys on its own. megatron-core
    divides gradients, pipeline tensors and losses by the size of the context parallel group, not by this field.
    """
    cuda = has_cuda()
    groups = round_up(model.kv_heads, parallel.tensor_parallel_size)
    virtual = parallel.virtual_pipeline_parallel_size
    params_dtype = DTYPES[dtype]
    window: dict[str, Any] = {}
    if any(block.sliding_window for block in model.blocks_by_symbol.values()):
        assert model.sliding_window is not None, "validated: a model with such blocks has a window"
        window = dict(
            window_size=(model.sliding_window - 1, 0),
            window_attn_skip_freq=[int(model.known_blocks[symbol].sliding_window) for symbol in model.layers],
        )
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": dict(recompute_granularity="selective", recompute_modules=[]),
        "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    }
    return HybridTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=groups * (model.num_attention_heads // model.kv_heads),
        num_query_groups=groups,
        kv_channels=model.attention_head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        layernorm_zero_centered_gamma=model.zero_centered_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel_on,
        tp_comm_overlap=parallel.tp_comm_overlap,
        tp_comm_bulk_dgrad=False,  # NCCL overlaps these GEMMs as well (distributed/tp_comm_overlap.py)
        tp_comm_bulk_wgrad=False,
        tp_comm_overlap_rs_dgrad=scatters_gradients(parallel, precision),
        params_dtype=params_dtype,
        pipeline_dtype=params_dtype,
        bf16=dtype == "bf16",
        perform_initialization=False,  # model/initialize.py does it, the same under every layout
        use_cpu_initialization=not cuda,
        gradient_accumulation_fusion=apex_weight_gradients(),  # Transformer Engine's modules have their own switch
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        # in a batch, NCCL and gloo match the sends and receives of two ranks by their order alone. Where two interleaved stages are
        # each other's next and previous one, activations and gradients would be swapped, silently
        batch_p2p_comm=False,
        overlap_p2p_comm=virtual > 1 and parallel.overlap_p2p_comm,
        deallocate_pipeline_outputs=True,
        moe_token_dispatcher_type="alltoall",
        keep_delta_rule_states=parallel.keep_delta_rule_states,
        **window,
        **modes[parallel.recompute_granularity],
        **_fp8(precision),
    )
