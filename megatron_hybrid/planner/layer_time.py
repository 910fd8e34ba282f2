"""Seconds of a layer, the embedding and the head, by part, for one micro-batch forward or backward."""

from collections.abc import Iterable, Sequence

from megatron_hybrid.arch.costs import (
    FP32_BYTES,
    AttentionWork,
    CollectiveWork,
    Direction,
    Gemm,
    MemoryWork,
    RecurrenceWork,
    Shard,
    Work,
)
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.planner import network
from megatron_hybrid.planner.activations import LOGITS_CHUNK_BYTES
from megatron_hybrid.planner.block_costs import mlp_work, norm_work, residual_work, stream_gradient_work
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.parts import GEMMS, MEMORY_BOUND, TP, TP_HIDDEN, Parts
from megatron_hybrid.planner.plan import Plan

RECOMPUTED_SHARE = {"none": 0.0, "selective": 0.5, "full": 1.0}
"""Share of a layer's forward kernels that the backward pass launches again."""


class LayerTimes:
    """Times of everything that a plan's chunks consist of. Plans that differ only in pipeline and replicas share one."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        self.plan, self.hardware = plan, hardware
        self.groups = network.groups(plan, hardware.gpus_per_node)
        self.compute, self.communication = hardware.factor("compute"), hardware.factor("communication")
        self._layers: dict[tuple[str, Direction, bool], Parts] = {}
        self.chunks: dict[tuple[object, ...], Parts] = {}
        """Times of chunks, which StepPredictor keeps here."""

    def host(self, direction: Direction) -> float:
        """Return the time in which Python launches one layer."""
        recompute = self.plan.parallel.recompute_granularity
        share = RECOMPUTED_SHARE[recompute] if direction == "backward" else 0.0
        collectives = self._host_collectives(direction)
        if direction == "backward" and recompute == "full":
            collectives += self._host_collectives("forward")
        hardware = self.hardware
        seconds = hardware.host_seconds_per_layer * (1 + share) + hardware.host_seconds_per_collective * collectives
        return seconds * hardware.factor("host")

    def _host_collectives(self, direction: Direction) -> int:
        """Return how many collectives of a layer among tensor parallel ranks the host launches.

        With parallel.tp_comm_overlap the exchanges of activations are part of the GEMMs.
        """
        plan = self.plan
        if plan.tp == 1:
            return 0
        scales = plan.precision.recipe.amax_all_reduces if plan.precision.recipe else 0
        if plan.parallel.tp_comm_overlap:
            return scales
        if not plan.parallel.sequence_parallel_on:
            return 2 + scales
        return {"forward": 4, "backward": 6}[direction] + scales

    def layer(self, symbol: str, direction: Direction, fp8: bool = True) -> Parts:
        """Return the time of one layer.

        Args:
            fp8: its linears use the plan's FP8 recipe, if there is one.
        """
        key = symbol, direction, fp8
        if key not in self._layers:
            self._layers[key] = self._layer(self.plan.shards[symbol], direction, fp8)
        return self._layers[key]

    def _layer(self, shard: Shard, direction: Direction, fp8: bool) -> Parts:
        mixer, mlp = mixer_spec(shard.block.mixer).work(shard, direction), mlp_work(shard, direction)
        total = Parts()
        total.add(self._between_linears(mixer, direction))
        total.add(self._around(shard, (mixer, mlp), direction, fp8))
        recompute = self.plan.parallel.recompute_granularity
        if direction == "backward" and recompute == "full":
            total.add(self._layer(shard, "forward", fp8))
        elif direction == "backward" and recompute == "selective":
            total.add(self._recomputed(shard))
        return total

    def _between_linears(self, work: Iterable[Work], direction: Direction) -> Parts:
        seconds: dict[str, list[float]] = {}
        for one in work:
            if not isinstance(one, Gemm) or one.parallel is None:
                seconds.setdefault(one.part, []).append(self.seconds(one, direction))
        return Parts({part: sum(times) for part, times in seconds.items()})

    def _around(self, shard: Shard, sublayers: tuple[Sequence[Work], ...], direction: Direction, fp8: bool) -> Parts:
        """Return the time of linears with their collectives, of the MLP, norms and residual additions."""
        parts = Parts()
        for work in sublayers:
            linears = [
                (one, self.seconds(one, direction, fp8)) for one in work if isinstance(one, Gemm) and one.parallel
            ]
            parts[GEMMS] += sum(seconds for _, seconds in linears)
            self._add_collectives(direction, sum(s for one, s in linears if one.parallel == "column"), parts)
        _, mlp = sublayers
        parts.add(self._between_linears(mlp, direction))
        norms = 2 if shard.block.norm == "peri" else 1
        in_norm = direction == "backward" and shard.block.norm != "post" and not self.plan.precision.norm_casts
        addition = stream_gradient_work(shard) if in_norm else residual_work(shard)
        norm, added = (self.seconds(one, direction) for one in (norm_work(shard, direction), addition))
        parts[MEMORY_BOUND] += len(sublayers) * (norms * norm + added)
        return parts

    def _recomputed(self, shard: Shard) -> Parts:
        """Return the time of selective recompute: a copy puts each result where its linear looks for it."""
        spec, total = mixer_spec(shard.block.mixer), Parts()
        sublayers = [mlp_work(shard, "forward")]
        if any(operation.recomputed for operation in spec.operations(shard)):
            sublayers.append(spec.work(shard, "forward"))
        for work in sublayers:
            total.add(self._between_linears(work, "forward"))
            for one in work:
                if isinstance(one, Gemm) and one.parallel == "row":
                    total[MEMORY_BOUND] += self._move("other", 2 * shard.element * one.k * one.m)
        return total

    def seconds(self, work: Work, direction: Direction, fp8: bool = False) -> float:
        """Return the time of one piece of work at the hardware's rates."""
        hardware = self.hardware
        match work:
            case Gemm():
                rate = hardware.linear[self.plan.gemm_format if fp8 else "bf16"][direction]
                return rate.seconds(work.flops(direction), work.bytes(direction)) * self.compute
            case AttentionWork():
                rate = hardware.attention[self.plan.attention_format][direction]
                return rate.seconds(work.flops) * self.compute
            case RecurrenceWork():
                seconds = hardware.recurrence_seconds(direction, work.tokens, work.rows, work.state)
                return seconds * self.compute * work.factor
            case MemoryWork():
                return self._move(work.operation, work.bytes)
            case CollectiveWork():
                return self._collective(work.operation, work.bytes, work.group)

    def _collective(self, operation: str, size: float, group: str = "tp") -> float:
        return network.seconds(operation, size, self.groups[group], self.hardware) * self.communication

    def _move(self, operation: str, size: float) -> float:
        """Return the time in which a memory-bound operation reads and writes `size` bytes."""
        return self.hardware.copy_seconds(operation, size) * self.compute

    def _add_collectives(self, direction: Direction, column: float, parts: Parts) -> None:
        """Add the collectives of a sublayer, whose column-parallel linears take `column` seconds."""
        plan = self.plan
        if plan.tp == 1:
            return
        size = plan.element * plan.tokens * plan.model.hidden_size
        if not plan.parallel.sequence_parallel_on:
            reduce = self._collective("all_reduce", size)
            hides = column / 2 if direction == "backward" else 0.0  # behind the weight gradient
            parts[TP] += max(0.0, reduce - hides)
            parts[TP_HIDDEN] += min(reduce, hides)
            return
        gather, scatter = self._collective("all_gather", size), self._collective("reduce_scatter", size)
        if direction == "forward":
            parts[TP] += gather + scatter
            return
        # The row-parallel linear waits for its gradient. The column-parallel one gathers its input while it computes the input's
        # gradient, which it scatters while it computes the weight's.
        parts[TP] += gather + max(0.0, gather - column / 2) + max(0.0, scatter - column / 2)
        parts[TP_HIDDEN] += min(gather, column / 2) + min(scatter, column / 2)

    def embedding(self, direction: Direction) -> Parts:
        """Return the time of the look-up, or of its gradient (whole, then added to the fp32 buffer), with scale and norm."""
        plan, h = self.plan, self.plan.model.hidden_size
        size, table = plan.element * plan.tokens * h, plan.vocab * h
        moved = 2 * size if direction == "forward" else 2 * size + table * (3 * plan.element + 8)
        parts = Parts({MEMORY_BOUND: self._move("embedding", moved), TP: self._collective("all_reduce", size) / 2})
        shard = plan.shards[plan.model.layers[0]]
        if plan.model.embed_scale != 1:
            parts[MEMORY_BOUND] += self._move("other", 2 * size * shard.stream_share)
        if plan.model.embedding_norm:
            parts[MEMORY_BOUND] += self.seconds(norm_work(shard, direction), direction)
        return parts

    def head(self, direction: Direction) -> Parts:
        """Return the time of final norm, output layer and losses. All three GEMMs are in the forward pass, chunk by chunk."""
        plan, h = self.plan, self.plan.model.hidden_size
        m, vocab, e = plan.tokens, plan.vocab, plan.element
        norm = self.seconds(norm_work(plan.shards[plan.model.layers[-1]], direction), direction)
        if direction == "backward":  # scales the gradients by the loss's own, and adds the weight's to its fp32 buffer
            scaled = self._move("linear_cross_entropy", 3 * FP32_BYTES * vocab * h + 2 * e * m * h)
            return Parts({MEMORY_BOUND: norm + scaled, TP: self._collective("reduce_scatter", e * m * h)})
        chunks = -(-e * m * vocab // LOGITS_CHUNK_BYTES)
        forward, backward = (self.hardware.linear["bf16"][way] for way in ("forward", "backward"))
        flops = 2.0 * m * vocab * h
        return Parts({
            GEMMS: (forward.seconds(flops) + backward.seconds(2 * flops)) * self.compute,
            MEMORY_BOUND: norm + self._move("linear_cross_entropy", 3 * e * m * vocab),
            TP: self._collective("all_gather", e * m * h) + chunks * self._collective("all_gather", 12 * m * plan.tp / chunks),
        })  # fmt: skip
