"""Plan: a model and its batch under one layout, for which memory and step time are predicted."""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.costs import Shard
from megatron_hybrid.arch.documents import ASSUMED_LENGTH, assumed_attended_length
from megatron_hybrid.arch.flops import output_in_layers
from megatron_hybrid.arch.layer import outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.config.data import DataConfig
from megatron_hybrid.config.parallel import ParallelConfig
from megatron_hybrid.config.precision import PrecisionConfig
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.config.train import OptimizerConfig


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
    """Dtype of weights and activations (train.dtype)."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    offload_fraction: float = 0.0
    """train.optimizer.offload_fraction."""
    optimizer: str = "adamw"
    """train.optimizer.kind."""
    attended_length: int | None = None
    """Attended length of separated documents (arch/documents.py). None: data.documents is keep."""
    optimizer_settings: OptimizerConfig = field(default_factory=OptimizerConfig)
    """train.optimizer, whose hyperparameters may change the work of an update."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int, document_length: float = ASSUMED_LENGTH) -> "Plan":
        """Return the plan of a run that `check_world` has accepted.

        Args:
            document_length: mean tokens of a document, if documents are separated.
        """
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
            train.optimizer.kind,
            planned_attended_length(config.data, document_length),
            train.optimizer,
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
    def dp_cp(self) -> int:
        """Data and context parallel ranks: they hold the same parameters and shard the optimizer state."""
        return self.dp * self.cp

    @property
    def microbatches(self) -> int:
        """Micro-batches per step and pipeline."""
        return self.global_batch_size // (self.micro_batch_size * self.dp)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on a context parallel rank, over all tensor parallel ranks."""
        return self.sequence_length // self.cp * self.micro_batch_size

    @property
    def element(self) -> int:
        """Bytes per weight or activation."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def transformer_engine(self) -> bool:
        """True if a GPU builds the layers from Transformer Engine's modules."""
        return self.dtype == "bf16" and self.model.backend != "local"

    @property
    def gemm_format(self) -> str:
        """Format in which the linears multiply: bf16 or an FP8 recipe."""
        return self.precision.fp8_recipe or "bf16"

    @property
    def attention_format(self) -> str:
        """Format in which softmax attention multiplies: bf16 or fp8."""
        return "fp8" if self.precision.fp8_attention else "bf16"

    @cached_property
    def fp8_layers(self) -> range:
        """Layers whose linears multiply in FP8, if the run uses FP8."""
        return range(
            self.precision.num_layers_at_start_in_bf16, self.model.num_layers - self.precision.num_layers_at_end_in_bf16
        )

    @cached_property
    def chunks(self) -> tuple["Chunk", ...]:
        """Every virtual stage of the pipeline, in model order."""
        symbols, at, found = self.model.layers, 0, []
        counts = self.parallel.stage_layers(len(symbols), output_in_layers(self.model, self.precision.fp8))
        for stage, count in enumerate(counts):
            found.append(Chunk(stage, at, symbols[at : at + count], stage == 0, stage == len(counts) - 1))
            at += count
        return tuple(found)

    def chunks_of(self, pipeline_rank: int) -> tuple["Chunk", ...]:
        """Return the virtual stages of a pipeline rank, in the order in which it holds them."""
        return self.chunks[pipeline_rank :: self.pp]

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """The model's blocks, by layer_pattern symbol."""
        return dict(self.model.blocks_by_symbol)

    @cached_property
    def vocab(self) -> int:
        """Vocabulary rows per tensor parallel rank, padding included."""
        return outer_parameters(self.model)["embedding"].rank_shape(self.tp)[0]

    @cached_property
    def shards(self) -> dict[str, Shard]:
        """Share of a rank in each kind of layer, by layer_pattern symbol."""
        return {symbol: self._shard(block) for symbol, block in self.blocks.items()}

    @cached_property
    def unpadded_shards(self) -> dict[str, Shard]:
        """`shards` as if heads could be split anywhere."""
        return {symbol: replace(shard, padded=False) for symbol, shard in self.shards.items()}

    def _shard(self, block: Block) -> Shard:
        return Shard(
            self.model,
            block,
            _mixer_parameters(self.model, block),
            self.element,
            self.sequence_length,
            self.micro_batch_size,
            tensor_parallel_size=self.tp,
            sequence_parallel=self.parallel.sequence_parallel_on,
            context_parallel_size=self.cp,
            transformer_engine=self.transformer_engine,
            fp8=self.precision.fp8_recipe is not None,
            fp8_attention=self.precision.fp8_attention,
            keep_delta_rule_states=self.parallel.keeps_states,
            attended_length=self.attended_length,
        )

    @property
    def label(self) -> str:
        """`TP2 CP2 PP4 VPP2 DP8 mbs1 recompute-selective`."""
        sizes = (("TP", self.tp), ("CP", self.cp), ("PP", self.pp), ("VPP", self.vpp))
        parts = [f"{name}{size}" for name, size in sizes if size > 1]
        if self.tp > 1 and not self.parallel.sequence_parallel_on:
            parts.append("no-SP")
        parts += [f"DP{self.dp}", f"mbs{self.micro_batch_size}", f"recompute-{self.parallel.recompute_granularity}"]
        if self.parallel.keep_delta_rule_states:
            parts.append("states-kept")
        if not self.parallel.distributed_optimizer:
            parts.append("plain-optimizer")
        return " ".join(parts)


def planned_attended_length(data: DataConfig, document_length: float) -> int | None:
    """Return the attended length of documents with this mean length; None if they are not separated."""
    if data.documents == "keep":
        return None
    return assumed_attended_length(document_length, data.sequence_length, packed=data.documents == "pack").tokens


@lru_cache(maxsize=256)
def _mixer_parameters(model: ModelConfig, block: Block) -> tuple[PackedParameter, ...]:
    return mixer_spec(block.mixer).parameters(model, block)


@dataclass(frozen=True)
class Chunk:
    """Virtual stage: some of the layers, and the embedding or the head at the model's ends."""

    stage: int
    first_layer: int
    symbols: tuple[str, ...]
    """Layers, by their layer_pattern symbols."""
    embedding: bool
    head: bool
