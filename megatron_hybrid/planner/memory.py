"""Peak memory of a rank's CUDA tensors, by part. Weights, gradients and optimizer state are exact; activations are estimated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_hybrid.arch.costs import Shard
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.activations import LayerBytes, embedding_bytes, head_bytes, layer_bytes
from megatron_hybrid.planner.parameters import gemm_weights, padding_parameters
from megatron_hybrid.planner.plan import Chunk, Plan
from megatron_hybrid.planner.schedule import chunks_in_flight
from megatron_hybrid.planner.state import per_parameter_bytes, rank_state

GB = 1e9
FIXED_BYTES = 0.15e9
"""cuBLAS and Transformer Engine workspaces, rotary angles, batches."""
BATCH_BYTES = 24.0
"""Tokens, labels and positions, in bytes per token."""
Layers = dict[str, LayerBytes]
"""Activation memory of each kind of layer, by layer_pattern symbol."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank at the peak of a step, in bytes by part."""

    weights: float
    gradients: float
    optimizer: float
    fp8_weights: float
    """FP8 copies of the weights."""
    activations: dict[str, float]
    """Saved by each kind of layer, by its title, over all micro-batches in flight."""
    ends: float
    """Saved by the embedding and the head."""
    logits: float
    """Chunk of the logits, and the output weight's gradient."""
    transient: float
    """Peak of a backward pass beyond all this, and workspaces."""
    padding: float = field(compare=False, default=0.0)
    """Share of all these that only dummy heads and padded widths take."""
    pipeline_rank: int = 0
    host: float = 0.0
    """Host memory, for the optimizer state that train.optimizer.offload_fraction puts there."""

    @property
    def total(self) -> float:
        """Value that torch.cuda.max_memory_allocated is expected to return."""
        parts = (self.weights, self.gradients, self.optimizer, self.fp8_weights, self.ends, self.logits, self.transient)
        return sum(parts) + sum(self.activations.values())

    def parts(self) -> dict[str, float]:
        """Return the bytes of every part that is not empty, by name."""
        named = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        named["FP8 weights"] = self.fp8_weights
        named |= {f"activations: {title}": size for title, size in self.activations.items()}
        named |= {"activations: ends": self.ends, "logits": self.logits, "backward and workspaces": self.transient}
        return {name: size for name, size in named.items() if size}

    def line(self) -> str:
        """Return the text that a run prints at its start.

        `at most 57.8 GB of tensors per GPU (weights 14.9, gradients 29.7, ...)`
        """
        short = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer + self.fp8_weights}
        short["activations"] = sum(self.activations.values()) + self.ends
        short["logits and backward"] = self.logits + self.transient
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in short.items())
        host = f", and at least {self.host / GB:.1f} GB of host memory per GPU" if self.host else ""
        return f"at most {self.total / GB:.1f} GB of tensors per GPU ({parts}){host}"


def expected(config: RunConfig, world_size: int) -> Memory:
    """Return the memory of a run's fullest rank. `config.check_world(world_size)` has passed."""
    return fullest(Plan.of(config, world_size))


def fullest(plan: Plan) -> Memory:
    """Return the memory of the pipeline rank that needs most.

    Of ranks with the same layers, only the first is looked at: it has most micro-batches in flight.
    """
    like: dict[object, int] = {}
    for rank in range(plan.pp):
        like.setdefault(tuple((c.symbols, c.embedding, c.head) for c in plan.chunks_of(rank)), rank)
    return max((rank_memory(plan, rank) for rank in like.values()), key=lambda memory: memory.total)


def rank_memory(plan: Plan, pipeline_rank: int) -> Memory:
    """Return the memory of one pipeline rank. Of its data parallel ranks it is rank 0, which holds no less than the others."""
    state, chunks = rank_state(plan, pipeline_rank), plan.chunks_of(pipeline_rank)
    flying, layers = chunks_in_flight(plan.pp, plan.vpp, plan.microbatches, pipeline_rank), _layers(plan, plan.shards)
    ends = logits = transient = 0.0
    for chunk, count in zip(chunks, flying, strict=True):
        if chunk.embedding or chunk.head:
            ends += BATCH_BYTES * plan.tokens * count
        if chunk.embedding:
            ends += embedding_bytes(plan) * count
        ends += _document_bytes(plan) * plan.tokens * count
        during = _backward(plan, chunk, layers)
        if chunk.head:
            head, weight_gradient = head_bytes(plan), 4 * plan.vocab * plan.model.hidden_size
            ends += head.saved - weight_gradient
            logits = weight_gradient + head.logits
            during = max(0.0, during - logits)  # never at the same time
        transient = max(transient, during)
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        fp8_weights=_fp8_weights(plan, chunks, flying),
        activations=_activations(plan, chunks, flying, layers),
        ends=ends,
        logits=logits,
        transient=transient + FIXED_BYTES + _dummy_weight_gradients(plan, chunks) + _overlap_buffers(plan),
        padding=_padding(plan, pipeline_rank, chunks, flying, layers),
        pipeline_rank=pipeline_rank,
        host=state.host,
    )


def _document_bytes(plan: Plan) -> float:
    """Return the bytes per token of documents: starts of whole sequences, positions, and angles of RoPE for each token."""
    if plan.attended_length is None:
        return 0.0
    tables = 0 if plan.model.rope_theta is None else 1 if plan.model.rope_scaling is None else 2
    return 4.0 * (plan.cp + 1 + tables * plan.model.attention_head_dim)


def _layers(plan: Plan, shards: dict[str, Shard]) -> Layers:
    return {symbol: layer_bytes(shard, plan.parallel.recompute_granularity) for symbol, shard in shards.items()}


def _activations(plan: Plan, chunks: Sequence[Chunk], in_flight: Sequence[int], layers: Layers) -> dict[str, float]:
    """Return the bytes that each kind of layer saves, by its title."""
    found: dict[str, float] = {}
    for symbol, tokens in _saved_tokens(plan, chunks, in_flight):
        title, saved = plan.blocks[symbol].title, layers[symbol].saved
        found[title] = found.get(title, 0.0) + tokens * saved
    return found


def _padding(
    plan: Plan, pipeline_rank: int, chunks: Sequence[Chunk], in_flight: Sequence[int], layers: Layers
) -> float:
    """Return the bytes that only padding of heads and widths takes."""
    padding = padding_parameters(plan, pipeline_rank) * per_parameter_bytes(plan)
    unpadded = _layers(plan, plan.unpadded_shards)
    for symbol, tokens in _saved_tokens(plan, chunks, in_flight):
        padding += tokens * (layers[symbol].saved - unpadded[symbol].saved)
    return padding


def _saved_tokens(plan: Plan, chunks: Sequence[Chunk], in_flight: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Yield the kinds of layers of every chunk, with the tokens for which they save activations, summed over layers."""
    for chunk, count in zip(chunks, in_flight, strict=True):
        for symbol in dict.fromkeys(chunk.symbols):
            yield symbol, chunk.symbols.count(symbol) * count * plan.tokens


def _backward(plan: Plan, chunk: Chunk, layers: Layers) -> float:
    """Return the peak of a chunk's backward pass beyond all that is saved. Later layers have freed theirs by then."""
    most, freed = 0.0, 0.0
    for symbol in reversed(chunk.symbols):
        layer = layers[symbol]
        most = max(most, layer.transient * plan.tokens - freed)
        freed += layer.saved * plan.tokens
    if chunk.embedding:  # its gradient is whole, in the weight's dtype
        most = max(most, plan.vocab * plan.model.hidden_size * plan.element - freed)
    return most


def _fp8_weights(plan: Plan, chunks: Sequence[Chunk], in_flight: Sequence[int]) -> float:
    """Return the bytes of FP8 copies of weights.

    There is a cast of each matrix and its transpose. Next to weights that are held in FP8 there is the transpose alone. Copies
    are kept over the micro-batches of a step, or else made by each forward pass and kept for its backward pass.
    """
    recipe = plan.precision.recipe
    if recipe is None:
        return 0.0
    copies = recipe.weight_copy_bytes - plan.precision.fp8_param_gather
    sizes = {
        symbol: copies * sum(gemm_weights(plan.model, block, plan.tp).values()) for symbol, block in plan.blocks.items()
    }
    layers = [
        (sizes[symbol], count)
        for chunk, count in zip(chunks, in_flight, strict=True)
        for index, symbol in enumerate(chunk.symbols, chunk.first_layer)
        if index in plan.fp8_layers
    ]
    if plan.precision.cache_fp8_weights:
        return sum(size for size, _ in layers)
    if plan.parallel.recompute_granularity == "full":
        return max((size for size, _ in layers), default=0)
    return sum(size * count for size, count in layers)


def _dummy_weight_gradients(plan: Plan, chunks: Sequence[Chunk]) -> float:
    """Return the bytes of the gradients that linears hand to autograd.

    Transformer Engine adds weight gradients to DDP's buffer, and returns one dummy per kind of linear. PyTorch's are freed one by
    one.
    """
    symbols = {symbol for chunk in chunks for symbol in chunk.symbols}
    sizes: dict[str, int] = {}
    for symbol in symbols:
        sizes.update(gemm_weights(plan.model, plan.blocks[symbol], plan.tp))
    return plan.element * (sum(sizes.values()) if plan.transformer_engine else max(sizes.values()))


def _overlap_buffers(plan: Plan) -> float:
    """Return the bytes of Transformer Engine's user buffers (distributed/tp_comm_overlap.py), outside of PyTorch's memory.

    There are eight buffers that gather, whichever are used, two that a kernel would scatter from, and two that copy engines
    scatter from, with room for the chunk of every other rank.
    """
    if not plan.parallel.tp_comm_overlap:
        return 0.0
    some_in_bf16 = len(plan.fp8_layers) < plan.model.num_layers
    formats = [1 if plan.precision.fp8_recipe else plan.element, *([plan.element] if some_in_bf16 else [])]
    scattering = plan.element * (2 + 2 * (2 * plan.tp - 1) / plan.tp)
    return plan.tokens * plan.model.hidden_size * sum(8 * gathered + scattering for gathered in formats)
