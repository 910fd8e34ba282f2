"""The whole network: megatron-core's HybridModel with our layers, our final norm and our losses."""

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.padding import PaddedSizes
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.model.cross_entropy import vocab_parallel_losses
from megatron_hybrid.model.layer_specs import stack_submodules
from megatron_hybrid.model.megatron_config import hybrid_layer_pattern, transformer_config
from megatron_hybrid.model.norms import RMSNorm


class HybridLayers(HybridStack):
    """HybridStack with our final norm: its own is hard-coded to Transformer Engine's (hybrid_block.py:215)."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **{**kwargs, "post_layer_norm": False})
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)


class HybridLanguageModel(HybridModel):
    """One pipeline stage (or one virtual stage of it) of the language model."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, dtype: str, sequence_length: int, pg_collection, vp_stage
    ):
        config = transformer_config(model, parallel, dtype)
        self.model = model
        super().__init__(
            config,
            ModuleSpec(module=HybridLayers, submodules=stack_submodules(model)),
            PaddedSizes.of(model, parallel.tensor_parallel_size).vocab_size,
            sequence_length,
            hybrid_layer_pattern=hybrid_layer_pattern(model, parallel),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=model.tie_embeddings,
            position_embedding_type="none" if model.rope_theta is None else "rope",
            rotary_base=model.rope_theta or 0,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """labels [b, s], logits [s, b, vocabulary / tp] -> [2, b, s]: cross-entropy and z-loss of each token."""
        losses = vocab_parallel_losses(logits, labels.t().contiguous(), self.model.vocab_size, self.pg_collection.tp)
        return torch.stack(losses).transpose(1, 2)


def build_model(
    model: ModelConfig, parallel: ParallelConfig, dtype: str, sequence_length: int, groups: ProcessGroupCollection
) -> list[HybridLanguageModel]:
    """This rank's model chunks, one a virtual stage, on its device. Weights are not initialised (model/param_layout.py)."""
    chunks = []
    for stage in range(parallel.virtual_pipeline_parallel_size):
        vp_stage = stage if parallel.virtual_pipeline_parallel_size > 1 else None
        if vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunks.append(HybridLanguageModel(model, parallel, dtype, sequence_length, groups, vp_stage))
    return chunks
