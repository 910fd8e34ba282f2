"""The most memory that a rank's CUDA tensors take, by part. Its states are exact; its activations follow the table."""

from dataclasses import dataclass, field

from megatron_hybrid.arch.model import LAYER_KINDS, LayerKind
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.planner.activations import Setting, head_bytes, layer_bytes
from megatron_hybrid.planner.parameters import MATRICES, dummy_head_parameters, layer_parameters, rank_state
from megatron_hybrid.planner.plan import Chunk, Plan, Widths
from megatron_hybrid.planner.schedule import chunks_in_flight

GB = 1e9
FIXED_BYTES = 0.15e9
"""cuBLAS and Transformer Engine workspaces, rotary angles, batches."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part of one rank, at the worst time of a step."""

    weights: float
    gradients: float
    optimizer: float
    fp8_weights: float
    """FP8 copies of the weights."""
    activations: dict[LayerKind, float]
    """Kept by each kind of layer, over all micro-batches in flight."""
    ends: float
    """Kept by the embedding's and the head's part."""
    logits: float
    """A chunk of the logits, and the output weight's gradient."""
    transient: float
    """What a backward pass needs beyond all this, and workspaces."""
    padding: float = field(compare=False, default=0.0)
    """How much of all these only dummy heads and padded widths take."""
    pipeline_rank: int = 0
    host: float = 0.0
    """Of the host, for the optimizer's state that train.optimizer.offload_fraction puts there."""

    @property
    def total(self) -> float:
        """What torch.cuda.max_memory_allocated is to show."""
        parts = (self.weights, self.gradients, self.optimizer, self.fp8_weights, self.ends, self.logits, self.transient)
        return sum(parts) + sum(self.activations.values())

    def parts(self) -> dict[str, float]:
        """Name -> bytes of what is there, largest groups first as a person would ask for them."""
        named = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer}
        named["FP8 weights"] = self.fp8_weights
        named |= {f"activations: {LAYER_KINDS[kind]}": size for kind, size in self.activations.items()}
        named |= {"activations: ends": self.ends, "logits": self.logits, "backward and workspaces": self.transient}
        return {name: size for name, size in named.items() if size}

    def line(self) -> str:
        """`expected memory: 57.8 GB a GPU at most (weights 14.9, gradients 29.7, ...)`, for a run's start."""
        short = {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer + self.fp8_weights}
        short["activations"] = sum(self.activations.values()) + self.ends
        short["logits and backward"] = self.logits + self.transient
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in short.items())
        host = f", and at least {self.host / GB:.1f} GB of host memory a GPU" if self.host else ""
        return f"expected memory: {self.total / GB:.1f} GB of tensors a GPU at most ({parts}){host}"


def expected(config: RunConfig, world_size: int) -> Memory:
    """Of the run's fullest rank; `config.check_world(world_size)` has passed."""
    return fullest(Plan.of(config, world_size))


def fullest(plan: Plan) -> Memory:
    """Of the pipeline rank that needs most. Of ranks with the same layers, the first has most in flight: it alone is looked at."""
    like: dict[object, int] = {}
    for rank in range(plan.pp):
        like.setdefault(tuple((c.kinds, c.embedding, c.head) for c in plan.chunks_of(rank)), rank)
    return max((rank_memory(plan, rank) for rank in like.values()), key=lambda memory: memory.total)


def rank_memory(plan: Plan, pipeline_rank: int) -> Memory:
    """Of one pipeline rank (data parallel rank 0, which holds no less than the others)."""
    state = rank_state(plan, pipeline_rank)
    chunks, of = plan.chunks_of(pipeline_rank), Setting.of(plan)
    flying = chunks_in_flight(plan.pp, plan.vpp, plan.microbatches, pipeline_rank)
    activations: dict[LayerKind, float] = {}
    padding, ends, logits, transient = _state_padding(plan, pipeline_rank), 0.0, 0.0, 0.0
    for chunk, count in zip(chunks, flying, strict=True):
        for kind in dict.fromkeys(chunk.kinds):
            size, true = (_saved(plan, kind, widths, of) for widths in (plan.widths, plan.true_widths))
            layers = chunk.kinds.count(kind) * count * plan.tokens
            activations[kind] = activations.get(kind, 0.0) + layers * size
            padding += layers * (size - true)
        ends += _ends(plan, chunk, count, of)
        during = _backward(plan, chunk, of)
        if chunk.head:
            head = head_bytes(plan)
            ends += head.saved - 4 * plan.widths.vocab * plan.widths.hidden
            logits = 4 * plan.widths.vocab * plan.widths.hidden + head.logits
            during = max(0.0, during - logits)  # never at the same time
        transient = max(transient, during)
    return Memory(
        weights=state.weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        fp8_weights=_fp8_weights(plan, chunks, flying),
        activations=activations,
        ends=ends,
        logits=logits,
        transient=transient + FIXED_BYTES + _dummy_weight_gradients(plan, chunks) + _exchange_buffers(plan),
        padding=padding,
        pipeline_rank=pipeline_rank,
        host=state.host,
    )


def _saved(plan: Plan, kind: LayerKind, widths: Widths, of: Setting) -> float:
    return layer_bytes(kind, widths, of, plan.parallel.recompute_granularity).saved


def _ends(plan: Plan, chunk: Chunk, in_flight: int, of: Setting) -> float:
    """A chunk's tokens and labels; the last stage's outputs are freed once sent."""
    return 24.0 * plan.tokens * in_flight if chunk.embedding or chunk.head else 0.0


def _backward(plan: Plan, chunk: Chunk, of: Setting) -> float:
    """The most that a chunk's backward pass needs beyond all that is kept: later layers have freed theirs by then."""
    most, freed = 0.0, 0.0
    for kind in reversed(chunk.kinds):
        layer = layer_bytes(kind, plan.widths, of, plan.parallel.recompute_granularity)
        most = max(most, layer.transient * plan.tokens - freed)
        freed += layer.saved * plan.tokens
    if chunk.embedding:  # its gradient comes whole, in the weight's dtype
        most = max(most, plan.widths.vocab * plan.widths.hidden * plan.element - freed)
    return most


def _matrices(plan: Plan, kind: LayerKind) -> dict[str, float]:
    """Elements of a layer's matrices that Transformer Engine multiplies."""
    return {name: size for name, size, _ in layer_parameters(plan.model, kind, plan.widths) if name in MATRICES}


def _fp8_weights(plan: Plan, chunks: tuple[Chunk, ...], in_flight: tuple[int, ...]) -> float:
    """A cast of each matrix and its transpose; beside weights that are held in FP8, their transposes alone. Kept over the
    micro-batches of a step, or else made by each micro-batch's forward pass and kept for its backward pass."""
    if plan.precision.fp8_recipe is None:
        return 0.0
    low, high = (
        plan.precision.num_layers_at_start_in_bf16,
        plan.model.num_layers - plan.precision.num_layers_at_end_in_bf16,
    )
    copies = 1 if plan.precision.fp8_param_gather else 2
    layers = [
        (copies * sum(_matrices(plan, kind).values()), count)
        for chunk, count in zip(chunks, in_flight, strict=True)
        for index, kind in enumerate(chunk.kinds, chunk.first_layer)
        if low <= index < high
    ]
    if plan.precision.cache_fp8_weights:
        return sum(size for size, _ in layers)
    if plan.parallel.recompute_granularity == "full":
        return max((size for size, _ in layers), default=0.0)
    return sum(size * count for size, count in layers)


def _dummy_weight_gradients(plan: Plan, chunks: tuple[Chunk, ...]) -> float:
    """Transformer Engine adds weight gradients to DDP's buffer and hands autograd a dummy, one for each shape."""
    if not plan.transformer_engine:
        return plan.element * max(max(_matrices(plan, kind).values()) for chunk in chunks for kind in chunk.kinds)
    shapes = {
        (name if name in ("fc1", "fc2") else f"{name} {kind == 'G'}"): size
        for chunk in chunks
        for kind in dict.fromkeys(chunk.kinds)
        for name, size in _matrices(plan, kind).items()
    }
    return plan.element * sum(shapes.values())


def _exchange_buffers(plan: Plan) -> float:
    """Return the bytes of Transformer Engine's user buffers (distributed/tp_comm_overlap.py), outside of PyTorch's memory.

    There are eight buffers that gather, whichever are used, two that a kernel would scatter from, and two that copy
    engines scatter from, with room for the chunk of every other rank.
    """
    if not plan.parallel.tp_comm_overlap:
        return 0.0
    some_in_bf16 = plan.precision.num_layers_at_start_in_bf16 + plan.precision.num_layers_at_end_in_bf16 > 0
    formats = [1 if plan.precision.fp8_recipe else plan.element, *([plan.element] if some_in_bf16 else [])]
    scattering = plan.element * (2 + 2 * (2 * plan.tp - 1) / plan.tp)
    return plan.tokens * plan.widths.hidden * sum(8 * gathered + scattering for gathered in formats)


def _state_padding(plan: Plan, pipeline_rank: int) -> float:
    sharded = plan.parallel.distributed_optimizer
    state = (12 if plan.element == 2 else 8) * (1 - plan.offload_fraction)
    per_parameter = plan.element + 4 + state / (plan.sharing if sharded else 1)
    return dummy_head_parameters(plan, pipeline_rank) * per_parameter
