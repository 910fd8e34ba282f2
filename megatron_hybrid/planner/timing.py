"""Time of a step by part: the work of every layer at the hardware's rates, through the pipeline."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_hybrid.arch.costs import Direction
from megatron_hybrid.arch.flops import training_flops_per_token
from megatron_hybrid.planner import network
from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.layer_time import LayerTimes
from megatron_hybrid.planner.optimizer_time import optimizer_seconds
from megatron_hybrid.planner.parameters import rank_parameters
from megatron_hybrid.planner.parts import BUBBLE, DP, DP_HIDDEN, HIDDEN, LAUNCHES, OPTIMIZER, PP, Parts
from megatron_hybrid.planner.plan import Chunk, Plan
from megatron_hybrid.planner.schedule import StageTimes, analytic_seconds, simulate
from megatron_hybrid.planner.state import GRADIENT_BYTES, rank_state

LARGEST_HIDDEN_SHARE = 0.95
"""Share of a data parallel collective that overlap can hide. The first bucket is always waited for."""
OVERLAPPED_SHARE = 0.9
"""Share of a pass behind which data parallel collectives can hide."""
DIRECTIONS: tuple[Direction, Direction] = ("forward", "backward")


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by part, as the busiest pipeline rank spends them."""

    parts: Mapping[str, float]
    """GEMMs, attention, recurrences, memory-bound operations, kernel launches, exposed communication by group, bubble, optimizer."""
    hidden: Mapping[str, float]
    """Communication hidden behind computation, which takes no time of the step."""
    tokens: int
    """Tokens per step, over all GPUs."""
    gpus: int
    flops: float
    """FLOPs of the model per step."""
    peak: float
    """Peak FLOP/s of a GPU."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_gpu(self) -> float:
        """Tokens/s per GPU."""
        return self.tokens / self.seconds / self.gpus

    @property
    def mfu(self) -> float:
        """Share of peak FLOP/s, 0 to 1. Recomputation is not counted."""
        return self.flops / self.seconds / self.gpus / self.peak


class StepPredictor:
    """Predicts step times on one kind of hardware, and caches layers, which thousands of plans share."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self._layers: dict[tuple[object, ...], LayerTimes] = {}
        self._flops: dict[tuple[object, ...], float] = {}

    def step(self, plan: Plan, simulated: bool = False) -> StepTime:
        """Predict one optimizer step.

        Args:
            simulated: play the pipeline schedule event by event. False: use its closed form.
        """
        layers = self._layer_times(plan)
        passes = [[self._chunk(plan, chunk, layers, direction) for direction in DIRECTIONS] for chunk in plan.chunks]
        forward, backward = ([parts.exposed for parts in direction] for direction in zip(*passes))
        times = StageTimes(forward, backward)
        m, pp = plan.microbatches, plan.pp
        pipeline = simulate(times, pp, m).seconds if simulated else analytic_seconds(times, pp, m)
        busiest = max(range(pp), key=lambda rank: sum(times.forward[rank::pp]) + sum(times.backward[rank::pp]))
        total = Parts()
        for chunk in passes[busiest::pp]:
            for parts in chunk:
                total.add(parts.scaled(m))
        total[BUBBLE] = max(0.0, pipeline - total.exposed)
        self._add_data_parallel(plan, busiest, times, total)
        total[OPTIMIZER] = self._optimizer_seconds(plan, busiest)
        tokens = plan.global_batch_size * plan.sequence_length
        return StepTime(
            {part: s for part, s in total.items() if part not in HIDDEN and s > 1e-9},
            {part: s for part, s in total.items() if part in HIDDEN and s > 1e-9},
            tokens,
            plan.world_size,
            self._model_flops(plan) * tokens,
            self.hardware.peak_flops,
        )

    def _optimizer_seconds(self, plan: Plan, rank: int) -> float:
        update = optimizer_seconds(plan, rank, self.hardware)
        return (update + self.hardware.host_seconds_per_step) * self.hardware.factor("optimizer")

    def _layer_times(self, plan: Plan) -> LayerTimes:
        key = (plan.tp, plan.cp, plan.parallel.sequence_parallel_on, plan.parallel.tp_comm_overlap, plan.micro_batch_size,
               plan.parallel.recompute_granularity, plan.parallel.keep_delta_rule_states, plan.precision, plan.dtype,
               plan.sequence_length, plan.attended_length, plan.model)  # fmt: skip
        if key not in self._layers:
            self._layers[key] = LayerTimes(plan, self.hardware)
        return self._layers[key]

    def _model_flops(self, plan: Plan) -> float:
        length = plan.attended_length or plan.sequence_length
        key = (plan.model, length)
        if key not in self._flops:
            self._flops[key] = training_flops_per_token(plan.model, length)
        return self._flops[key]

    def _chunk(self, plan: Plan, chunk: Chunk, layers: LayerTimes, direction: Direction) -> Parts:
        """Return the time of one micro-batch through a virtual stage, with its transfers."""
        fp8 = tuple(map(plan.fp8_layers.__contains__, range(chunk.first_layer, chunk.first_layer + len(chunk.symbols))))
        spans_nodes = plan.world_size > self.hardware.gpus_per_node
        key = chunk.symbols, fp8, chunk.embedding, chunk.head, direction, plan.pp > 1, spans_nodes
        if key not in layers.chunks:
            layers.chunks[key] = self._new_chunk(plan, chunk, layers, direction, fp8)
        return layers.chunks[key]

    def _new_chunk(
        self, plan: Plan, chunk: Chunk, layers: LayerTimes, direction: Direction, fp8: Sequence[bool]
    ) -> Parts:
        total = Parts()
        for (symbol, in_fp8), count in Counter(zip(chunk.symbols, fp8)).items():
            total.add(layers.layer(symbol, direction, in_fp8).scaled(count))
        total[LAUNCHES] = max(0.0, len(chunk.symbols) * layers.host(direction) - total.exposed)
        if chunk.embedding:
            total.add(layers.embedding(direction))
        if chunk.head:
            total.add(layers.head(direction))
        if plan.pp > 1:
            group = network.groups(plan, self.hardware.gpus_per_node)["pp"]
            whole = plan.tokens * plan.model.hidden_size * plan.element
            size = whole / plan.tp if plan.parallel.sequence_parallel_on else whole
            one = network.seconds("p2p", size, group, self.hardware)
            total[PP] = one * self.hardware.factor("communication")
        return total

    def _add_data_parallel(self, plan: Plan, rank: int, times: StageTimes, total: Parts) -> None:
        """Add the reduction of gradients and the gathering of parameters, once per step."""
        if plan.dp_cp == 1:
            return
        hardware, parallel = self.hardware, plan.parallel
        group = network.groups(plan, hardware.gpus_per_node)["dp"]
        gradients = GRADIENT_BYTES * rank_parameters(plan, rank)
        if not parallel.distributed_optimizer:
            reduce, gather = network.seconds("all_reduce", gradients, group, hardware), 0.0
        else:
            reduce = network.seconds("reduce_scatter", gradients, group, hardware)
            gather = network.seconds("all_gather", rank_state(plan, rank).weights, group, hardware)
        factor = hardware.factor("communication")
        # The last micro-batch's backward pass hides the reduction, the first one's forward pass the gathering.
        for cost, overlapped, passes in (
            (reduce * factor, parallel.overlap_grad_reduce, times.backward),
            (gather * factor, parallel.overlap_param_gather, times.forward),
        ):
            room = OVERLAPPED_SHARE * sum(passes[rank :: plan.pp]) if overlapped else 0.0
            hidden = min(cost * LARGEST_HIDDEN_SHARE, room)
            total[DP] += cost - hidden
            total[DP_HIDDEN] += hidden
