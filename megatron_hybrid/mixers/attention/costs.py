"""Activation memory and work of softmax attention on one rank, for the planner."""

from dataclasses import dataclass, replace

from megatron_hybrid.arch.costs import (
    AttentionWork,
    CollectiveWork,
    Direction,
    Gemm,
    MemoryWork,
    Operation,
    Shard,
    Work,
    attention_flops,
    input_linear,
    output_linear,
)


@dataclass(frozen=True)
class Widths:
    """Channels and heads of the mixer on one rank."""

    q: float
    kv: float
    """Channels of k, and of v."""
    gate: float
    """Channels of the output gate, as many as of q, or 0."""
    heads: float
    """Query heads."""
    gathered_heads: float
    """Heads with which a rank attends under context parallelism, per head it holds: head groups are padded to a multiple of the
    context parallel size."""

    @property
    def qkv(self) -> float:
        return self.q + 2 * self.kv

    @property
    def packed(self) -> float:
        """Outputs of linear_qkv."""
        return self.qkv + self.gate

    @classmethod
    def of(cls, shard: Shard) -> "Widths":
        """Return the widths of `shard`."""
        q, kv, d = shard.width("q_proj.weight"), shard.width("k_proj.weight"), shard.model.attention_head_dim
        held = replace(shard, padded=True).width("k_proj.weight") // d
        exchanged = -(-held // shard.context_parallel_size) * shard.context_parallel_size
        return cls(
            q, kv, q if shard.block.output_gate else 0.0, q / d if not shard.padded else q // d, exchanged / held
        )


def operations(shard: Shard) -> list[Operation]:
    """Return the operations of the mixer, first to last."""
    w, e, exchanges = Widths.of(shard), shard.element, shard.context_parallel_size > 1
    kept = w.gathered_heads * ((w.qkv + w.q) * (1 if shard.fp8_attention else e) + 4 * w.heads)
    sent = w.gathered_heads * e * w.qkv if exchanges else 0.0  # send buffers, next to what is received
    fp32_copies = 0.0 if shard.transformer_engine else 8 * w.heads
    # cuDNN sums dq in fp32
    extra = w.gathered_heads * (4 * w.q + 4 * w.heads) + sent
    # the gate is a slice of linear_qkv's output, which the QK norm saves
    gate = [Operation("output gate", 0.0, 2 * e * w.gate)] if w.gate else []
    return [
        *input_linear(shard, "qkv", w.packed),
        Operation("QK norm, RoPE", e * w.packed + 8, e * w.packed, extra=fp32_copies),
        Operation("attention", kept, e * w.qkv, extra=extra),
        *gate,
        *output_linear(shard, "o_proj", w.q, saved=0.0 if _output_is_shared(shard) else shard.linear_input * w.q),
    ]


def _output_is_shared(shard: Shard) -> bool:
    """True if o_proj saves the tensor that attention saves. It saves a cast under FP8, the gated tensor with an output gate, and
    a copy in another layout elsewhere.
    """
    in_fp8 = shard.fp8 or shard.fp8_attention
    return not shard.block.output_gate and shard.transformer_engine and not in_fp8 and shard.context_parallel_size == 1


def work(shard: Shard, direction: Direction) -> list[Work]:
    """Return the work of one pass through the mixer."""
    w, tokens, model = Widths.of(shard), shard.tokens, shard.model
    window = model.sliding_window if shard.block.sliding_window else None
    width = w.q * w.gathered_heads / shard.context_parallel_size
    length = shard.attended_length or shard.sequence_length
    documents = shard.micro_batch_size * shard.sequence_length / length
    flops = attention_flops(length, documents, width, direction, window)
    norm_bytes = (2 if direction == "forward" else 3) * shard.element * w.qkv
    gate_bytes = (3 if direction == "forward" else 5) * shard.element * w.gate
    return [
        Gemm(tokens, w.packed, shard.hidden, "column"),
        AttentionWork(flops),
        MemoryWork("qk_norm_rope", tokens * norm_bytes),
        *([MemoryWork("sigmoid_gate", tokens * gate_bytes)] if w.gate else []),
        *_collectives(shard, w),
        Gemm(tokens, shard.hidden, w.q, "row"),
    ]


def _collectives(shard: Shard, w: Widths) -> list[CollectiveWork]:
    """Return the exchange of tokens for heads and back, and the sums over heads that the QK norm needs."""
    found: list[CollectiveWork] = []
    if shard.context_parallel_size > 1:  # an all-to-all moves as much as an all-gather of a tensor as large as a rank's
        size = shard.element * w.gathered_heads * shard.tokens
        found += [CollectiveWork("all_gather", "cp", size * width) for width in (w.q, w.kv, w.kv, w.q)]
    if shard.tensor_parallel_size > 1 and shard.block.qk_norm == "projection":  # two fp32 sums per token
        found.append(CollectiveWork("all_reduce", "tp", 8 * shard.tokens))
    return found
