"""Costs that layers of all mixers share: MLP, norms and residual additions."""

from megatron_hybrid.arch.costs import Direction, Gemm, MemoryWork, Operation, Shard, Work, input_linear, output_linear


def mlp_operations(shard: Shard) -> list[Operation]:
    """Return the operations of the MLP with its norm."""
    packed = 2 * shard.element * shard.ffn
    return [
        *input_linear(shard, "fc1", 2 * shard.ffn),
        Operation("SwiGLU", packed, packed, recomputed=True, input=packed),
        *output_linear(shard, "fc2", shard.ffn),
    ]


def mlp_work(shard: Shard, direction: Direction) -> list[Work]:
    """Return the work of one pass through the MLP, without its norm."""
    tokens, moved = shard.tokens, (3 if direction == "forward" else 5) * shard.element * shard.ffn
    return [
        Gemm(tokens, 2 * shard.ffn, shard.hidden, "column"),
        MemoryWork("swiglu", tokens * moved),
        Gemm(tokens, shard.hidden, shard.ffn, "row"),
    ]


def norm_work(shard: Shard, direction: Direction) -> MemoryWork:
    """Return the work of one RMSNorm over the residual stream."""
    moved = (2 if direction == "forward" else 3) * shard.element * shard.hidden
    return MemoryWork("norm", _stream_tokens(shard) * moved)


def stream_gradient_work(shard: Shard) -> MemoryWork:
    """Return the work that the stream's gradient adds to a pre-norm's backward pass, in place of an addition (`PreNorm`)."""
    return MemoryWork("norm", _stream_tokens(shard) * (shard.element * shard.hidden))


def residual_work(shard: Shard) -> MemoryWork:
    """Return the work of one addition to the residual stream."""
    return MemoryWork("residual", _stream_tokens(shard) * (3 * shard.element * shard.hidden))


def _stream_tokens(shard: Shard) -> float:
    return shard.tokens / shard.tensor_parallel_size if shard.sequence_parallel else shard.tokens
