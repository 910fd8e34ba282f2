"""Steps that are timed: on CPU the ones that are asked for, on a GPU behind enough steps of load."""

import time

import torch.distributed as dist

from megatron_hybrid.profiling import engine_steps


class Engine:
    """Counts steps. Those before the timed ones take longer."""

    def __init__(self, slow: int) -> None:
        self.steps, self.slow = 0, slow

    def forward_backward(self, batches):
        time.sleep(0.3 if self.steps < self.slow else 0.01)
        return lambda: None

    def gradient_norm(self) -> float:
        return 1.0

    def update(self, lr: float, norm: float) -> None:
        self.steps += 1


def test_all_ranks_train_the_same_steps_of_load(ranks):
    assert ranks.run(steps_of_load, 2) == [3, 3], "as long as the slower rank needs for 1.5 s"


def steps_of_load() -> int:
    return engine_steps.steps_of_load(0.6 if dist.get_rank() else 0.1)


def test_steps_on_a_gpu_are_timed_behind_a_load(ranks):
    ((on_cpu, on_gpu, seconds),) = ranks.run(steps_and_seconds, 1)
    assert on_cpu == 2 + 3
    assert 2 + 5 + 3 >= on_gpu > 2 + 3, "1.5 s of steps of 0.3 s, or longer on a busy machine"
    assert seconds < 0.3


def steps_and_seconds() -> tuple[int, int, float]:
    counts = []
    for has_cuda in (False, True):
        engine = Engine(slow=2 + 1)
        engine_steps.has_cuda = lambda here=has_cuda: here
        engine_steps.LOAD_SECONDS, engine_steps._take_peak, engine_steps._outside = 1.5, lambda: 0, lambda: 0
        found = engine_steps.measure_engine(engine, [], steps=3, warmup=2)
        counts.append(engine.steps)
    return *counts, found.seconds
