"""Training jobs with tapes in place of CUDA graphs (testing/op_tape.py), on the ranks of tests (testing/ranks.py)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.distributed.process_groups import leave_groups
from megatron_hybrid.train.engines import megatron as engines
from testing import jobs
from testing.op_tape import TapeRecorder

GRAPHS = dict(cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=2)


@contextmanager
def tapes() -> Iterator[list[TapeRecorder]]:
    """Let engines whose configuration asks for graphs record on tapes. Yields their recorders."""
    recorders: list[TapeRecorder] = []

    def make(train: TrainConfig) -> TapeRecorder | None:
        if train.cuda_graph_impl == "none":
            return None
        recorders.append(TapeRecorder())
        return recorders[-1]

    with mock.patch.object(engines, "make_recorder", make):
        yield recorders


def curve(**arguments: Any) -> dict:
    """Run `jobs.curve`. Adds the numbers of tapes, of their replays, and of recorders that were not released."""
    with tapes() as recorders:
        return jobs.curve(**arguments) | _counts(recorders)


def both_curves(train: dict, **arguments: Any) -> list[dict]:
    """Run `curve` without graphs, then with them."""
    plain = curve(train=train, **arguments)
    leave_groups()
    return [plain, curve(train=train | GRAPHS, **arguments)]


def pretrain_run(config: dict) -> dict:
    """Run `jobs.pretrain_run`. Adds the numbers of tapes, of their replays, and of recorders that were not released."""
    with tapes() as recorders:
        return jobs.pretrain_run(config) | _counts(recorders)


def curve_with_evaluations(model: dict, train: dict, steps: int) -> dict:
    """Train, with an evaluation of other shapes and the attribution of a step between all steps. Return losses and norms."""
    from megatron_hybrid.train.nonfinite import attribute

    losses, norms, evaluated = [], [], []
    with tapes() as recorders:
        engine: Any = jobs.make_engine(model, {}, train)
        for step in range(steps):
            batches = _batches(engine, model, step, train["micro_batch_size"])
            losses.append(engine.forward_backward(batches)().loss)
            norms.append(engine.gradient_norm())
            attribute(engine, batches)
            engine.forward_backward(batches)
            engine.update(1e-2, engine.gradient_norm())
            evaluated.append(engine.evaluate(_batches(engine, model, 99, 1)).loss)
    return {"losses": losses, "norms": norms, "evaluated": evaluated} | _counts(recorders)


def _batches(engine: Any, model: dict, step: int, size: int) -> list:
    return jobs.batches_of(engine, jobs.samples_of_step(step, 4, model["vocab_size"]), size)


def _counts(recorders: list[TapeRecorder]) -> dict[str, int]:
    return {
        "tapes": sum(len(one.tapes) for one in recorders),
        "replays": sum(one.replays for one in recorders),
        "kept": sum(not one.released for one in recorders),
    }
