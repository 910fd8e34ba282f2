"""Seconds of a layer, the embedding and the head, by part, for one micro-batch: forward and backward."""

from collections import Counter

from megatron_hybrid.arch.model import LayerKind
from megatron_hybrid.planner import network
from megatron_hybrid.planner.activations import LOGITS_CHUNK_BYTES
from megatron_hybrid.planner.hardware import Hardware, Rate
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.work import attention_flops, glue_bytes, linear_bytes, linear_flops

Parts = Counter[str]
LIGHT_SCAN = {"forward": 0.75, "backward": 0.3}
"""What a slice's first pass takes of the delta rule's time, as 15 heads in two segments do: 192 us of 255 forward and of 647
backward (hybrid_kernels/NOTES.md)."""
HIDDEN = ("TP communication, hidden", "DP communication, hidden")


def scaled(parts: Parts, count: float) -> Parts:
    """Every part times `count`."""
    return Counter({name: seconds * count for name, seconds in parts.items()})


class Layers:
    """Times of everything a plan's chunks are made of. Plans that differ in pipeline and replicas alone share one."""

    def __init__(self, plan: Plan, hardware: Hardware) -> None:
        self.plan, self.hardware, self.w = plan, hardware, plan.widths
        groups = network.groups(plan, hardware.gpus_per_node)
        self.group, self.context = groups["tp"], groups["cp"]
        self.compute, self.talk = hardware.factor("compute"), hardware.factor("communication")
        self._layers: dict[tuple[LayerKind, str, bool], Parts] = {}
        self.chunks: dict[tuple, Parts] = {}
        """What a Clock has put together of these."""

    def host(self, way: str) -> float:
        """Seconds that Python needs for one layer."""
        again = (
            {"none": 0.0, "selective": 0.5, "full": 1.0}[self.plan.parallel.recompute_granularity]
            if way == "backward"
            else 0.0
        )
        collectives = self._waits(way)
        if way == "backward" and self.plan.parallel.recompute_granularity == "full":
            collectives += self._waits("forward")
        seconds = self.hardware.host_layer * (1 + again) + self.hardware.host_collective * collectives
        return seconds * self.hardware.factor("host")

    def _waits(self, way: str) -> int:
        """Collectives of a layer among tensor parallel ranks. With parallel.tp_comm_overlap its exchanges are part of its products,
        and FP8's scales of what is exchanged are left."""
        plan = self.plan
        if plan.tp == 1:
            return 0
        scales = plan.precision.recipe.amax_all_reduces if plan.precision.recipe else 0
        if plan.parallel.tp_comm_overlap:
            return scales
        if not plan.parallel.sequence_parallel_on:
            return 2 + scales
        return {"forward": 4, "backward": 6}[way] + scales

    def layer(self, kind: LayerKind, way: str, fp8: bool = True) -> Parts:
        """One layer. `fp8`: whether it is among those that run in the plan's FP8 format, if there is one."""
        key = kind, way, fp8
        if key not in self._layers:
            self._layers[key] = self._layer(kind, way, fp8)
        return self._layers[key]

    def _layer(self, kind: LayerKind, way: str, fp8: bool) -> Parts:
        total: Parts = Counter()
        total.update(self._mixer(kind, way))
        total.update(self._around(kind, way, fp8))
        recompute = self.plan.parallel.recompute_granularity
        if way == "backward" and recompute == "full":
            total.update(self._layer(kind, "forward", fp8))
        elif way == "backward" and recompute == "selective":
            total.update(self._again(kind))
        return total

    def _again(self, kind: LayerKind) -> Parts:
        """Selective recompute: what lies between the linears, and a copy of each result to where its linear looks for it."""
        w, e = self.w, self.plan.element
        total = Counter({"glue": self._glue("swiglu", "forward") + self._move(2 * e * w.ffn * self.plan.tokens)})
        if kind == "G":
            total.update(self._mixer(kind, "forward"))
            total["glue"] += self._move(2 * e * w.gdn_value * self.plan.tokens)
        return total

    def _mixer(self, kind: LayerKind, way: str) -> Parts:
        """Between the projections."""
        plan, w, parts = self.plan, self.w, Counter()
        assert plan.model.gdn is not None or kind != "G"
        if kind == "G":
            gdn = plan.model.gdn
            state = gdn.key_head_dim * gdn.value_head_dim  # type: ignore[union-attr]
            rows = w.gdn_heads * plan.micro_batch_size
            seconds = self.hardware.delta_rule_seconds(way, plan.slice_length, rows, state)
            parts["delta rule"] = seconds * self.compute
            if plan.cp > 1:
                parts["delta rule"] *= 1 + LIGHT_SCAN[way]
                ends = 4 * rows * gdn.key_head_dim * (gdn.value_head_dim + gdn.key_head_dim)  # type: ignore[union-attr]
                parts["CP communication"] = self._exchange("all_gather", plan.cp * ends)
            parts["glue"] = self._glue("conv_gates", way) + self._glue("gated_norm", way)
            return parts
        window = plan.model.sliding_window if kind == "W" else None
        flops = attention_flops(plan.sequence_length, plan.micro_batch_size, w.q * plan.dummies / plan.cp, way, window)
        rate = self.hardware.attention["fp8" if plan.precision.fp8_attention else "bf16"][way]
        parts["attention"] = rate.seconds(flops) * self.compute
        parts["glue"] = self._glue("qk_norm_rope", way)
        if plan.cp > 1:  # q, k, v and the output to other ranks or back
            size = plan.element * plan.dummies * plan.tokens
            parts["CP communication"] = sum(self._exchange("all_gather", size * n) for n in (w.q, w.kv, w.kv, w.q))
        if plan.tp > 1:  # two sums a token, each way
            parts["TP communication"] = self._talk("all_reduce", 8 * plan.tokens)
        return parts

    def _around(self, kind: LayerKind, way: str, fp8: bool) -> Parts:
        """Projections, MLP, norms and residual additions, and the collectives around the linears."""
        w, h, parts = self.w, self.w.hidden, Counter()
        packed, inner = (w.gdn_packed, w.gdn_value) if kind == "G" else (w.q + 2 * w.kv, w.q)
        for first, last in (((packed, h), (h, inner)), ((2 * w.ffn, h), (h, w.ffn))):
            column, row = self._linear(*first, way, fp8), self._linear(*last, way, fp8)
            parts["products"] += column + row
            self._collectives(way, column, parts)
        parts["glue"] += self._glue("swiglu", way)
        parts["glue"] += 2 * (self._glue("norm", way) + self._glue("residual", way))
        return parts

    def _linear(self, n: float, k: float, way: str, fp8: bool) -> float:
        precision, m = self.plan.precision.fp8_recipe if fp8 else None, self.plan.tokens
        rate: Rate = self.hardware.linear[precision or "bf16"][way]
        return rate.seconds(linear_flops(m, n, k, way), linear_bytes(m, n, k, way)) * self.compute

    def _collectives(self, way: str, column: float, parts: Parts) -> None:
        """Of one pair of column- and row-parallel linears."""
        plan = self.plan
        if plan.tp == 1:
            return
        size = plan.element * plan.tokens * self.w.hidden
        visible, behind = "TP communication", "TP communication, hidden"
        if not plan.parallel.sequence_parallel_on:
            reduce = self._talk("all_reduce", size)
            hides = column / 2 if way == "backward" else 0.0  # behind the weight's gradient
            parts[visible] += max(0.0, reduce - hides)
            parts[behind] += min(reduce, hides)
            return
        gather, scatter = self._talk("all_gather", size), self._talk("reduce_scatter", size)
        if way == "forward":
            parts[visible] += gather + scatter
            return
        # the row-parallel linear waits for its gradient; the column-parallel one gathers its input behind the input's
        # gradient, and scatters that behind the weight's
        parts[visible] += gather + max(0.0, gather - column / 2) + max(0.0, scatter - column / 2)
        parts[behind] += min(gather, column / 2) + min(scatter, column / 2)

    def _glue(self, op: str, way: str) -> float:
        tokens = self.plan.tokens
        if op in ("norm", "residual") and self.plan.parallel.sequence_parallel_on:
            tokens /= self.plan.tp
        share = self.hardware.efficiency.get(op, self.hardware.efficiency["other"])
        size = tokens * glue_bytes(op, self.w, way, self.plan.element)
        return size / (self.hardware.copy * share) * self.compute

    def _talk(self, op: str, size: float) -> float:
        return network.seconds(op, size, self.group, self.hardware) * self.talk

    def _exchange(self, op: str, size: float) -> float:
        return network.seconds(op, size, self.context, self.hardware) * self.talk

    def _move(self, size: float) -> float:
        """Seconds to read and write `size` bytes."""
        return size / (self.hardware.copy * self.hardware.efficiency["other"]) * self.compute

    def embedding(self, way: str) -> Parts:
        """A look-up, and its gradient: whole, then added to the fp32 buffer."""
        plan, w = self.plan, self.w
        size, table = plan.element * plan.tokens * w.hidden, w.vocab * w.hidden
        moved = 2 * size if way == "forward" else 2 * size + table * (3 * plan.element + 8)
        return Counter({"glue": self._move(moved), "TP communication": self._talk("all_reduce", size) / 2})

    def head(self, way: str) -> Parts:
        """Final norm, output layer and losses: all three products are in the forward pass, chunk by chunk."""
        plan, w, parts = self.plan, self.w, Counter()
        m, table = plan.tokens, w.vocab * w.hidden
        if way == "backward":  # the gradients, scaled by the loss's own
            parts["glue"] = self._move(table * (16 + plan.element) + 3 * plan.element * m * w.hidden)
            parts["TP communication"] = self._talk("reduce_scatter", plan.element * m * w.hidden)
            return parts
        chunks = -(-plan.element * m * w.vocab // LOGITS_CHUNK_BYTES)
        forward, backward = (self.hardware.linear["bf16"][direction] for direction in ("forward", "backward"))
        flops = 2.0 * m * w.vocab * w.hidden
        parts["products"] = (forward.seconds(flops) + backward.seconds(2 * flops)) * self.compute
        parts["glue"] = self._move(3 * plan.element * m * w.vocab + chunks * 8 * table)
        parts["TP communication"] = self._talk("all_gather", plan.element * m * w.hidden)
        parts["TP communication"] += chunks * self._talk("all_gather", 12 * m * plan.tp / chunks)
        return parts
