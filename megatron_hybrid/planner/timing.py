"""A step's time by part: what every layer has to do (work.py), at the rates of the hardware, through the pipeline."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.arch.model import LayerKind
from megatron_hybrid.planner import network
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.layer_time import HIDDEN, Layers, Parts, scaled
from megatron_hybrid.planner.parameters import rank_parameters, rank_state
from megatron_hybrid.planner.plan import Chunk, Plan
from megatron_hybrid.planner.schedule import StageTimes, analytic_seconds, simulate

OPTIMIZER_BYTES = 46
"""A parameter of the shard: norm 4, clip 8, Adam 28 of gradient, master weight and moments, weight 6."""
GRADIENT_BYTES = 12
"""A parameter of the rank: set to zero 4, scaled by the number of replicas 8."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, as the busiest pipeline rank spends them."""

    parts: Mapping[str, float]
    """products, attention, delta rule, glue, launches; TP, CP, PP and DP communication that is waited for; bubble; optimizer."""
    hidden: Mapping[str, float]
    """Communication behind computation: no part of the step's time."""
    tokens: int
    """Of a step, over all GPUs."""
    gpus: int
    flops: float
    """The model's, of a step."""
    peak: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_gpu(self) -> float:
        """A second."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Share of the peak, 0 to 1; recomputation counts for nothing."""
        return self.flops / self.seconds / self.gpus / self.peak


class Clock:
    """Predicts step times on one kind of hardware. Remembers layers: thousands of plans share them."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._layers: dict[tuple, Layers] = {}
        self._flops: dict[tuple, float] = {}

    def step(self, plan: Plan, played: bool = False) -> StepTime:
        """Of one optimizer step. `played`: by the schedule event by event, else by its closed form."""
        hardware, layers = self.hardware, self._of(plan)
        ways = [[self._chunk(plan, chunk, layers, way) for way in ("forward", "backward")] for chunk in plan.chunks]
        times = StageTimes(*([_visible(parts) for parts in way] for way in zip(*ways)))
        m, pp = plan.microbatches, plan.pp
        pipeline = simulate(times, pp, m).seconds if played else analytic_seconds(times, pp, m)
        busiest = max(range(pp), key=lambda rank: sum(times.forward[rank::pp]) + sum(times.backward[rank::pp]))
        total: Parts = Counter()
        for parts in ways[busiest::pp]:
            for part in parts:
                total.update(scaled(part, m))
        total["bubble"] = max(0.0, pipeline - _visible(total))
        self._data_parallel(plan, busiest, times, total)
        shard = rank_parameters(plan, busiest)
        own = shard / plan.sharing if plan.parallel.distributed_optimizer else shard
        optimizer = (own * OPTIMIZER_BYTES + shard * GRADIENT_BYTES) / (hardware.copy * hardware.efficiency["other"])
        total["optimizer"] = (optimizer + hardware.host_step) * hardware.factor("optimizer")
        tokens = plan.global_batch_size * plan.sequence_length
        return StepTime(
            {part: s for part, s in total.items() if part not in HIDDEN and s > 1e-9},
            {part: s for part, s in total.items() if part in HIDDEN and s > 1e-9},
            tokens,
            plan.world_size,
            self._model_flops(plan) * tokens,
            hardware.peak_flops,
        )

    def _of(self, plan: Plan) -> Layers:
        key = (plan.tp, plan.cp, plan.parallel.sequence_parallel_on, plan.parallel.tp_comm_overlap, plan.micro_batch_size,
               plan.parallel.recompute_granularity, plan.precision, plan.dtype, plan.sequence_length, plan.model.layer_pattern,
               plan.model.hidden_size)  # fmt: skip
        if key not in self._layers:
            self._layers[key] = Layers(plan, self.hardware)
        return self._layers[key]

    def _model_flops(self, plan: Plan) -> float:
        key = (plan.model.layer_pattern, plan.model.hidden_size, plan.sequence_length)
        if key not in self._flops:
            self._flops[key] = training_flops_per_token(plan.model, plan.sequence_length)
        return self._flops[key]

    def _chunk(self, plan: Plan, chunk: Chunk, layers: Layers, way: str) -> Parts:
        """Of one micro-batch through a virtual stage, its transfers included."""
        key = chunk.kinds, chunk.embedding, chunk.head, way, plan.pp > 1, plan.world_size > self.hardware.gpus_per_node
        if plan.precision.num_layers_at_start_in_bf16 or plan.precision.num_layers_at_end_in_bf16:
            key += (chunk.first_layer,)
        if key not in layers.chunks:
            layers.chunks[key] = self._new_chunk(plan, chunk, layers, way)
        return layers.chunks[key]

    def _new_chunk(self, plan: Plan, chunk: Chunk, layers: Layers, way: str) -> Parts:
        total: Parts = Counter()
        precise = (
            plan.precision.num_layers_at_start_in_bf16,
            plan.model.num_layers - plan.precision.num_layers_at_end_in_bf16,
        )
        counts: Counter[tuple[LayerKind, bool]] = Counter(
            (kind, precise[0] <= i < precise[1]) for i, kind in enumerate(chunk.kinds, chunk.first_layer)
        )
        for (kind, fp8), count in counts.items():
            total.update(scaled(layers.layer(kind, way, fp8), count))
        total["launches"] = max(0.0, len(chunk.kinds) * layers.host(way) - _visible(total))
        if chunk.embedding:
            total.update(layers.embedding(way))
        if chunk.head:
            total.update(layers.head(way))
        if plan.pp > 1:
            group = network.groups(plan, self.hardware.gpus_per_node)["pp"]
            size = plan.tokens * plan.model.hidden_size * plan.element
            size /= plan.tp if plan.parallel.sequence_parallel_on else 1
            one = network.seconds("p2p", size, group, self.hardware)
            total["PP communication"] = one * self.hardware.factor("communication")
        return total

    def _data_parallel(self, plan: Plan, rank: int, times: StageTimes, total: Parts) -> None:
        """Reduction of gradients and gathering of weights, once a step."""
        if plan.sharing == 1:
            return
        hardware, parallel = self.hardware, plan.parallel
        group = network.groups(plan, hardware.gpus_per_node)["dp"]
        count = rank_parameters(plan, rank)
        if not parallel.distributed_optimizer:
            reduce, gather = network.seconds("all_reduce", 4 * count, group, hardware), 0.0
        else:
            reduce = network.seconds("reduce_scatter", 4 * count, group, hardware)
            gather = network.seconds("all_gather", rank_state(plan, rank).weights, group, hardware)
        factor = hardware.factor("communication")
        for cost, overlapped, passes in (
            (reduce * factor, parallel.overlap_grad_reduce, times.backward),
            (gather * factor, parallel.overlap_param_gather, times.forward),
        ):
            # the last micro-batch's backward pass hides the reduction, the first one's forward pass the gathering; the first
            # bucket's part is always waited for
            room = 0.9 * sum(passes[rank :: plan.pp]) if overlapped else 0.0
            hidden = min(cost * 0.95, room)
            total["DP communication"] += cost - hidden
            total["DP communication, hidden"] += hidden


def _visible(parts: Parts) -> float:
    return sum(seconds for part, seconds in parts.items() if part not in HIDDEN)
