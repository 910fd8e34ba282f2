"""A model and its batch under one layout: what memory and time are predicted of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_hybrid.arch.model import LayerKind, ModelConfig
from megatron_hybrid.arch.padding import PackedWidths, PaddedSizes
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig


@dataclass(frozen=True)
class Plan:
    """One layout of one training job."""

    model: ModelConfig
    parallel: ParallelConfig
    world_size: int
    sequence_length: int
    micro_batch_size: int
    global_batch_size: int
    dtype: str = "bf16"
    """Of weights and activations: train.dtype."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    offload_fraction: float = 0.0
    """train.optimizer.offload_fraction."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> "Plan":
        """Of a run that `check_world` has passed."""
        train = config.train
        return cls(
            config.model,
            config.parallel,
            world_size,
            config.data.sequence_length,
            train.micro_batch_size,
            train.global_batch_size,
            train.dtype,
            config.precision,
            train.optimizer.offload_fraction,
        )

    @property
    def tp(self) -> int:
        return self.parallel.tensor_parallel_size

    @property
    def pp(self) -> int:
        return self.parallel.pipeline_parallel_size

    @property
    def vpp(self) -> int:
        return self.parallel.virtual_pipeline_parallel_size

    @property
    def cp(self) -> int:
        return self.parallel.context_parallel_size

    @property
    def dp(self) -> int:
        return self.parallel.data_parallel_size(self.world_size)

    @property
    def sharing(self) -> int:
        """Ranks that hold the same parameters, and share out the optimizer's state: data and context parallel ones."""
        return self.dp * self.cp

    @property
    def microbatches(self) -> int:
        """That a pipeline runs in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on a rank before tensor parallelism shares them."""
        return self.slice_length * self.micro_batch_size

    @property
    def slice_length(self) -> int:
        """Tokens of a sequence on a context parallel rank."""
        return self.sequence_length // self.cp

    @property
    def dummies(self) -> float:
        """Heads that the context parallel ranks of a tensor parallel rank attend with, for each of its heads."""
        groups = PaddedSizes.of(self.model, self.tp).num_key_value_heads // self.tp
        return -(-groups // self.cp) * self.cp / groups

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def transformer_engine(self) -> bool:
        """Whether a GPU would build the layers from Transformer Engine's parts."""
        return self.dtype == "bf16" and self.model.backend != "local"

    @cached_property
    def chunks(self) -> tuple["Chunk", ...]:
        """Every virtual stage of the pipeline, in model order."""
        kinds, at, found = self.model.layers, 0, []
        counts = self.parallel.stage_layers(len(kinds))
        for stage, count in enumerate(counts):
            found.append(Chunk(stage, at, kinds[at : at + count], stage == 0, stage == len(counts) - 1))
            at += count
        return tuple(found)

    def chunks_of(self, pipeline_rank: int) -> tuple["Chunk", ...]:
        """The virtual stages that a pipeline rank holds, in the order it holds them."""
        return self.chunks[pipeline_rank :: self.pp]

    @cached_property
    def widths(self) -> "Widths":
        """With dummy heads."""
        return Widths.padded(self.model, self.tp)

    @cached_property
    def true_widths(self) -> "Widths":
        """As if heads could be split anywhere."""
        return Widths.true(self.model, self.tp)

    @property
    def label(self) -> str:
        """`TP2 CP2 PP4 VPP2 DP8 mbs1 selective`."""
        sizes = (("TP", self.tp), ("CP", self.cp), ("PP", self.pp), ("VPP", self.vpp))
        parts = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.tp > 1 and not self.parallel.sequence_parallel_on:
            parts.append("no-SP")
        parts += [f"DP{self.dp}", f"mbs{self.micro_batch_size}", f"recompute-{self.parallel.recompute_granularity}"]
        if not self.parallel.distributed_optimizer:
            parts.append("plain-optimizer")
        return " ".join(parts)


@dataclass(frozen=True)
class Chunk:
    """A virtual stage: some of the layers, and the embedding or the head at the ends."""

    stage: int
    first_layer: int
    kinds: tuple[LayerKind, ...]
    embedding: bool
    head: bool


@dataclass(frozen=True)
class Widths:
    """Of one tensor parallel rank's slices, in elements."""

    hidden: float
    q: float
    kv: float
    heads: float
    ffn: float
    vocab: float
    gdn_key: float = 0
    gdn_value: float = 0
    gdn_heads: float = 0
    gdn_packed: float = 0
    """Of in_proj's output."""
    key_head_dim: int = 1

    @classmethod
    def padded(cls, model: ModelConfig, tp: int) -> "Widths":
        """What the trainer allocates."""
        sizes, d = PaddedSizes.of(model, tp), model.attention_head_dim
        more: Mapping[str, Any] = {}
        if model.gdn is not None:
            packed = PackedWidths.of(model, tp)
            more = dict(gdn_key=packed.q, gdn_value=packed.v, gdn_heads=packed.a, gdn_packed=packed.total)
            more = {**more, "key_head_dim": model.gdn.key_head_dim}
        heads, groups = sizes.num_attention_heads // tp, sizes.num_key_value_heads // tp
        ffn, vocab = model.ffn_hidden_size // tp, sizes.vocab_size // tp
        return cls(model.hidden_size, heads * d, groups * d, heads, ffn, vocab, **more)

    @classmethod
    def true(cls, model: ModelConfig, tp: int) -> "Widths":
        """Without padding: what the difference to `padded` is measured from."""
        d, more = model.attention_head_dim, {}
        if (gdn := model.gdn) is not None:
            packed = 2 * (gdn.key_dim + gdn.value_dim + gdn.num_value_heads)
            more = dict(
                gdn_key=gdn.key_dim / tp,
                gdn_value=gdn.value_dim / tp,
                gdn_heads=gdn.num_value_heads / tp,
                gdn_packed=packed / tp,
                key_head_dim=gdn.key_head_dim,
            )
        heads, groups = model.num_attention_heads / tp, model.kv_heads / tp
        ffn, vocab = model.ffn_hidden_size / tp, model.vocab_size / tp
        return cls(model.hidden_size, heads * d, groups * d, heads, ffn, vocab, **more)
