"""The whole network: megatron-core's HybridModel with our layers, final norm and losses."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hybrid.arch.layer import outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.mixers.backend import Backend
from megatron_hybrid.mixers.documents import Documents
from megatron_hybrid.model.backends.choose import choose_backend
from megatron_hybrid.model.embedding import scale_and_normalise
from megatron_hybrid.model.hybrid_stack import HybridStackWithNorm, one_slot
from megatron_hybrid.model.layer_specs import layer_specs
from megatron_hybrid.model.megatron_config import hybrid_layer_pattern, transformer_config
from megatron_hybrid.model.output_layer import OutputLayer, TokenLosses
from megatron_hybrid.precision.context import around_layers


class HybridLayers(HybridStackWithNorm):
    """The layers of a stage, in their FP8 context."""

    def __init__(self, config: TransformerConfig, *args: Any, precision: PrecisionConfig, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.precision = precision

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with around_layers(self.precision, self.config):
            return super().forward(*args, **kwargs)


class HybridLanguageModel(HybridModel):
    """One stage of the language model's pipeline, or one virtual stage."""

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        precision: PrecisionConfig,
        backend: Backend,
        dtype: str,
        sequence_length: int,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        self.model, tied = model, model.tie_embeddings
        layers = ModuleSpec(
            module=HybridLayers,
            params=dict(norm=backend.norm, precision=precision),
            submodules=one_slot(layer_specs(model, backend)),
        )
        super().__init__(
            transformer_config(model, parallel, precision, dtype),
            layers,
            _padded_vocabulary(model, parallel.tensor_parallel_size),
            sequence_length,
            hybrid_layer_pattern=hybrid_layer_pattern(model, parallel, precision),
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=tied,
            position_embedding_type="none" if model.rope_theta is None else "rope",
            rotary_base=model.rope_theta or 0,
            rotary_percent=model.rotary_factor,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.scaled_rotary_pos_emb = self._scaled_rotary_embedding()
        if self.pre_process:
            scale_and_normalise(self.embedding, model, backend.norm)
        if self.post_process:
            self.output_layer.__class__ = OutputLayer  # megatron-core has no slot for it

    def _scaled_rotary_embedding(self) -> YarnRotaryEmbedding | None:
        """Return YaRN's angles for attention without a window.

        Its attention factor is part of the softmax scale (mixers/attention/module.py).
        """
        scaling = self.model.rope_scaling
        if scaling is None:
            return None
        return YarnRotaryEmbedding(
            self.model.attention_head_dim,
            rotary_base=self.model.rope_theta,
            scaling_factor=scaling.factor,
            original_max_position_embeddings=scaling.original_max_position_embeddings,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            use_cpu_initialization=self.config.use_cpu_initialization,
            cp_group=self.pg_collection.cp,
        )

    def rotary_angles(self, length: int, documents: Documents | None) -> torch.Tensor | None:
        """Return the angles of this rank's `length` tokens: [s, 1, 1, d], with documents [s, b, 1, d]. With rope_scaling plain and
        scaled ones are stacked: [2, s, ...].
        """
        if self.position_embedding_type != "rope":
            return None
        tables = self.angle_tables(length, documents is not None)
        table = tables[0] if len(tables) == 1 else torch.stack(tables)
        return table if documents is None else documents.rotary_angles(table)

    def angle_tables(self, length: int, documents: bool) -> list[torch.Tensor]:
        """Return the tables that `rotary_angles` reads: plain and, with rope_scaling, scaled angles [positions, 1, 1, d].

        megatron-core keeps the tables of the last 32 lengths.

        Args:
            length: this rank's tokens of a sequence.
            documents: whether sequences hold several documents, whose tokens may have any position of a sequence.
        """
        if self.position_embedding_type != "rope":
            return []
        cp = self.pg_collection.cp
        # packed_seq: positions are contiguous. megatron-core's own slices are two per rank, one from either end
        if documents:
            positions, options = length * cp.size(), dict(packed_seq=True)
        else:
            positions, options = length, dict(offset=cp.rank() * length, packed_seq=True)
        tables = [self.rotary_pos_emb(positions, **options)]
        if self.scaled_rotary_pos_emb is not None:
            tables.append(self.scaled_rotary_pos_emb(positions, **options)[0])
        return tables

    def forward(
        self,
        tokens: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_mask: torch.Tensor | None = None,
        z_loss: float = 0.0,
        documents: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        count_correct: bool = False,
    ) -> torch.Tensor | TokenLosses:
        """tokens [b, s] -> logits [b, s, vocabulary / tp]; with labels and loss_mask [b, s], the TokenLosses (z_loss is the weight
        of the z-loss), means over these tokens. On a stage that is not the last: hidden states [s, b, h], of this rank's tokens.
        Under context parallelism s is this rank's slice of every sequence (distributed/context_parallel.py).

        documents [b, whole length] and cu_seqlens (`Batch`): documents of whole sequences, which do not see each other. None: each
        sequence is one. count_correct: `TokenLosses` with the number of correct predictions.

        megatron-core's own forward has inference and multi-token prediction in it as well, and always makes all logits.
        """
        x_sbh = self.embedding(input_ids=tokens, position_ids=None) if self.pre_process else None
        packed = self._documents(documents, cu_seqlens)
        angles = self.rotary_angles(tokens.shape[1], packed)
        x_sbh = self.decoder(hidden_states=x_sbh, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=packed)
        if not self.post_process:
            return x_sbh
        weight = self.shared_embedding_or_output_weight() if self.model.tie_embeddings else None
        if labels is None or loss_mask is None:
            logits, _ = self.output_layer(x_sbh, weight=weight)
            return logits.transpose(0, 1).contiguous()
        options = dict(true_vocab_size=self.model.vocab_size, z_loss_weight=z_loss, count=count_correct)
        return self.output_layer(x_sbh, weight=weight, labels=labels.t(), loss_mask=loss_mask.t(), **options)

    def _documents(self, starts_bs: torch.Tensor | None, cu_seqlens: torch.Tensor | None) -> Documents | None:
        if starts_bs is None:
            return None
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: needed with documents, because its length bounds their number on the host")
        return Documents.of(starts_bs, cu_seqlens, self.pg_collection.cp)


def _padded_vocabulary(model: ModelConfig, ranks: int) -> int:
    table = outer_parameters(model)["embedding"]
    return table.padded_size(table.tensors[0], ranks)


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    dtype: str,
    sequence_length: int,
    groups: ProcessGroupCollection,
) -> list[HybridLanguageModel]:
    """Return this rank's model chunks, one per virtual stage, on its device. Weights are not initialised (model/initialize.py).

    Raises:
        ConfigError: a format or backend that cannot run here.
    """
    backend, _ = choose_backend(model.backend, precision, dtype)
    chunks = []
    for stage in range(parallel.virtual_pipeline_parallel_size):
        vp_stage = stage if parallel.virtual_pipeline_parallel_size > 1 else None
        if vp_stage is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        chunks.append(
            HybridLanguageModel(model, parallel, precision, backend, dtype, sequence_length, groups, vp_stage)
        )
    return chunks
