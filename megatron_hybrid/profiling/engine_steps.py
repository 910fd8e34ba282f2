"""Time and memory of steps of the trainer's engine on random tokens, to compare with the planner's predictions.

Steps are timed once a GPU has been under load for as long as its clocks take to settle (distributed/timing.py).

python -m megatron_hybrid.profiling.engine_steps CONFIG.yaml [--steps 10]     (torchrun for several ranks; writes one JSON line)
"""

import gc
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_hybrid.base.errors import no_traceback
from megatron_hybrid.base.numbers import positive
from megatron_hybrid.config.command_line import RunCommandLine
from megatron_hybrid.config.load import load_run
from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.device import has_cuda, synchronize
from megatron_hybrid.distributed.process_groups import ProcessGroupCollection, stop_distributed
from megatron_hybrid.distributed.timing import LOAD_SECONDS
from megatron_hybrid.launch.environment import Launch
from megatron_hybrid.launch.start import start_distributed
from megatron_hybrid.precision.fp8_parameters import initial_values
from megatron_hybrid.train.engines.base import Engine
from megatron_hybrid.train.engines.build import build_engine
from megatron_hybrid.train.engines.losses import GlobalBatch


@dataclass(frozen=True)
class Measured:
    """Measurements of a rank. Bytes are those of CUDA tensors (torch.cuda.memory_allocated), and 0 on CPU."""

    seconds: float
    """Median of the timed steps."""
    peak_bytes: int
    """Peak memory of a step, which the planner predicts."""
    resting_bytes: int
    """Memory between steps: weights, gradients, optimizer state."""
    update_peak_bytes: int
    """Peak memory of the optimizer's update."""
    reserved_bytes: int = 0
    """Device memory reserved by PyTorch: the peak allocation and fragmentation."""
    outside_bytes: int = 0
    """Used device memory outside of PyTorch: CUDA's context, communicators, workspaces, and other processes."""
    saved_by_layer: tuple[int, ...] = ()
    """Bytes that the forward pass of one micro-batch keeps: before the first layer, in each layer, after the last. Only without
    pipeline parallelism."""


def fill_at_random(chunks: Sequence[torch.nn.Module], layout: object, seed: int) -> None:
    """Fill the weights with random values of about the right size on the device. Zeros would draw less power and run faster."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
                values.normal_(0.0, 0.02) if parameter.dim() > 1 else values.fill_(1.0)
                initial_values(parameter).copy_(values)


def random_batches(count: int, micro_batch_size: int, sequence_length: int, vocab_size: int, seed: int) -> list[Batch]:
    """Return `count` micro-batches of random tokens, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    shape = (micro_batch_size, sequence_length + 1)
    return [Batch.of_samples(torch.randint(0, vocab_size, shape, generator=generator)) for _ in range(count)]


def train_one_step(engine: Engine, batches: list[Batch], lr: float) -> None:
    """Train one step as the trainer does."""
    read_losses = engine.forward_backward(batches)
    norm = engine.gradient_norm()
    read_losses()
    engine.update(lr, norm)


def measure(
    config: RunConfig, groups: ProcessGroupCollection, steps: int = 10, warmup: int = 2, layers: bool = False
) -> Measured:
    """Build the run's engine, train steps on random tokens, and close the engine.

    Args:
        groups: process groups of config.parallel (`start_distributed`).
        steps: timed steps.
        warmup: steps before those, at least 1. On GPUs there are more, until the load has lasted for LOAD_SECONDS.
        layers: also measure the bytes that each layer keeps for the backward pass.
    """
    train, cuda = config.train, has_cuda()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    engine = build_engine(config, groups, fill_at_random)
    dp, b = groups.dp, train.micro_batch_size
    count = train.global_batch_size // (b * dp.size())
    batches = random_batches(count, b, config.data.sequence_length, config.model.vocab_size, seed=dp.rank())
    try:
        return measure_engine(engine, batches, steps, warmup, train.optimizer.lr, layers and cuda)
    finally:  # free the memory for the next layout, also after out-of-memory
        engine.close()
        del engine
        gc.collect()


def measure_engine(
    engine: Any, batches: list[Batch], steps: int, warmup: int = 2, lr: float = 1e-5, layers: bool = False
) -> Measured:
    """Measure an engine as `measure` does, and leave it open. Bytes are those since the last reset of the peak."""

    def train(count: int) -> list[_Step]:
        return [_timed_step(engine, batches, lr) for _ in range(count)]

    untimed = train(warmup)
    untimed += train(steps_of_load(untimed[-1].seconds) if has_cuda() else 0)
    timed = train(steps)
    peak, update_peak = (max(peaks) for peaks in zip(*((s.peak, s.update_peak) for s in untimed + timed), strict=True))
    return Measured(
        seconds=sorted(step.seconds for step in timed)[steps // 2],
        peak_bytes=max(peak, update_peak),
        resting_bytes=torch.cuda.memory_allocated() if has_cuda() else 0,
        update_peak_bytes=update_peak,
        reserved_bytes=torch.cuda.memory_reserved() if has_cuda() else 0,
        outside_bytes=_outside() if has_cuda() else 0,
        saved_by_layer=_saved_by_layer(engine, batches[0]) if layers else (),
    )


class _Step(NamedTuple):
    seconds: float
    peak: int
    """Bytes of the forward and backward pass."""
    update_peak: int


def _timed_step(engine: Any, batches: list[Batch], lr: float) -> _Step:
    synchronize()
    start = time.perf_counter()
    read_losses = engine.forward_backward(batches)
    norm = engine.gradient_norm()
    read_losses()
    peak = _take_peak()
    engine.update(lr, norm)
    synchronize()
    return _Step(time.perf_counter() - start, peak, _take_peak())


def steps_of_load(seconds: float) -> int:
    """Return how many steps last for LOAD_SECONDS on the slowest rank, the same number on all ranks.

    Args:
        seconds: of a step on this rank.
    """
    everyone = [0.0] * dist.get_world_size()
    dist.all_gather_object(everyone, seconds)
    return math.ceil(LOAD_SECONDS / max(everyone))


def _saved_by_layer(engine: Any, batch: Batch) -> tuple[int, ...]:
    """Return the bytes that stay allocated after each part of a forward pass: embedding, layers, head."""
    (chunk,) = engine.wrapped
    layers = list(engine.chunks[0].decoder.layers)
    marks = [torch.cuda.memory_allocated()]

    def mark(*_: object) -> None:
        marks.append(torch.cuda.memory_allocated())

    hooks = [layers[0].register_forward_pre_hook(mark)] + [layer.register_forward_hook(mark) for layer in layers]
    sums = GlobalBatch([batch], engine.groups).sums
    output, _ = engine.run.forward_step(sums, iter([engine.run.local(batch)]), chunk)
    mark()
    for hook in hooks:
        hook.remove()
    del output
    return tuple(after - before for before, after in zip(marks, marks[1:]))


def _outside() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def _take_peak() -> int:
    """Return the peak allocation since the last call."""
    if not has_cuda():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def gather(found: Measured) -> dict[str, Any]:
    """Combine the measurements of all ranks: time of the slowest rank, memory of the fullest."""
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, asdict(found))
    fullest = max(everyone, key=lambda one: one["peak_bytes"])
    return fullest | {
        "seconds": max(one["seconds"] for one in everyone),
        "peak_by_rank": [one["peak_bytes"] for one in everyone],
    }


def main() -> None:
    parser = RunCommandLine(__doc__)
    parser.add_argument("--steps", type=positive, default=10)
    arguments = parser.parse()
    with no_traceback():
        launch = Launch.from_environment()
        config = load_run(arguments.config, arguments.overrides)
        config.check_world(launch.world_size)
        groups = start_distributed(launch, config.parallel, config.train.seed, quiet=True)
        found = gather(measure(config, groups, arguments.steps))
        if launch.rank == 0:
            device = torch.cuda.get_device_name() if has_cuda() else "cpu"
            print(json.dumps(found | {"device": device}), flush=True)
        stop_distributed()


if __name__ == "__main__":
    main()
