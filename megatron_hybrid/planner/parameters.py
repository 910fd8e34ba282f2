"""Parameters that a rank holds, as the trainer lays them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from megatron_hybrid.arch.blocks import Block
from megatron_hybrid.arch.layer import in_module_order, layer_parameters, outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.planner.plan import Chunk, Plan


@dataclass(frozen=True)
class Parameter:
    """One parameter of a rank."""

    name: str
    numel: int
    packed: PackedParameter
    """Its packing, which decides how an optimizer treats it."""
    always_fp32: bool = False
    own_bucket: bool = False
    """Tied embedding of a pipeline's ends."""
    in_fp8: bool = False

    def size(self, element: int) -> int:
        """Return the bytes per value, where `element` are those of the model's dtype."""
        return 4 if self.always_fp32 else 1 if self.in_fp8 else element


@dataclass(frozen=True)
class ChunkLayout:
    """Everything about a chunk that decides which parameters its rank holds."""

    model: ModelConfig
    tp: int
    symbols: tuple[str, ...]
    embedding: bool
    head: bool
    pipeline: bool
    """The model is split over pipeline ranks, so that tied embeddings exist twice."""
    fp8: tuple[bool, ...] = ()
    """Layers that hold their matrices in FP8. Empty: none."""

    @classmethod
    def of(cls, plan: Plan, chunk: Chunk) -> "ChunkLayout":
        """Return the layout of a chunk."""
        fp8: tuple[bool, ...] = ()
        if plan.precision.fp8_param_gather:
            fp8 = tuple(layer in plan.fp8_layers for layer, _ in enumerate(chunk.symbols, chunk.first_layer))
        return cls(plan.model, plan.tp, chunk.symbols, chunk.embedding, chunk.head, plan.pp > 1, fp8)


@lru_cache(maxsize=1024)
def chunk_parameters(layout: ChunkLayout) -> tuple[Parameter, ...]:
    """Return the parameters of one model chunk on one rank, in the order of the module's."""
    model, tp, tied = layout.model, layout.tp, layout.model.tie_embeddings
    outer = outer_parameters(model)
    blocks = model.blocks_by_symbol
    found: list[Parameter] = []
    if layout.embedding:
        found.append(_outer("embedding", outer["embedding"], tp, own_bucket=tied and layout.pipeline))
        if "embedding_norm" in outer:
            found.append(_outer("embedding_norm", outer["embedding_norm"], tp))
    for symbol, in_fp8 in zip(layout.symbols, layout.fp8 or (False,) * len(layout.symbols), strict=True):
        found += rank_layer_parameters(model, blocks[symbol], tp, in_fp8)
    if layout.head:
        found.append(_outer("final_norm", outer["final_norm"], tp))
        if not tied or (layout.pipeline and not layout.embedding):
            found.append(_outer("output", outer["embedding"], tp, own_bucket=tied))
    return tuple(found)


def _outer(name: str, packed: PackedParameter, tp: int, own_bucket: bool = False) -> Parameter:
    return Parameter(name, packed.rank_numel(tp), packed, own_bucket=own_bucket)


@lru_cache(maxsize=256)
def packed_layer(model: ModelConfig, block: Block) -> tuple[PackedParameter, ...]:
    """Return the parameters of a layer with their packing, in the order of the module's."""
    return tuple(in_module_order(layer_parameters(model, block)))


@lru_cache(maxsize=256)
def rank_layer_parameters(model: ModelConfig, block: Block, tp: int, in_fp8: bool) -> tuple[Parameter, ...]:
    """Return a layer's parameters on one rank. `in_fp8`: it holds the weights of its linears in FP8."""
    return tuple(
        Parameter(
            packed.name,
            packed.rank_numel(tp),
            packed,
            always_fp32=any(tensor.always_fp32 for tensor in packed.tensors),
            in_fp8=in_fp8 and packed.is_gemm,
        )
        for packed in packed_layer(model, block)
    )


@lru_cache(maxsize=256)
def gemm_weights(model: ModelConfig, block: Block, tp: int) -> Mapping[str, int]:
    """Return the elements on a rank of the weight of each linear of a layer, by the name of its first tensor."""
    return {one.tensors[0].name: one.rank_numel(tp) for one in packed_layer(model, block) if one.is_gemm}


def rank_parameters(plan: Plan, pipeline_rank: int) -> int:
    """Return the number of a rank's parameters, with dummy heads, without alignment of buffers."""
    return sum(_count(ChunkLayout.of(plan, chunk)) for chunk in plan.chunks_of(pipeline_rank))


@lru_cache(maxsize=1024)
def _count(layout: ChunkLayout) -> int:
    return sum(parameter.numel for parameter in chunk_parameters(layout))


def padding_parameters(plan: Plan, pipeline_rank: int) -> float:
    """Return how many of a rank's parameters only pad heads, widths and vocabulary, as a mean over the tensor parallel ranks."""
    model, total = plan.model, 0.0
    layers = {symbol: _layer_padding(model, block, plan.tp) for symbol, block in plan.blocks.items()}
    for chunk in plan.chunks_of(pipeline_rank):
        for symbol in chunk.symbols:
            total += layers[symbol]
        table = (plan.vocab - model.vocab_size / plan.tp) * model.hidden_size
        total += table * (chunk.embedding + (chunk.head and not model.tie_embeddings))
    return total


@lru_cache(maxsize=256)
def _layer_padding(model: ModelConfig, block: Block, tp: int) -> float:
    packed = packed_layer(model, block)
    padded = sum(parameter.rank_numel(tp) for parameter in packed)
    return padded - sum(one.numel if one.split == "replicated" else one.numel / tp for one in packed)
