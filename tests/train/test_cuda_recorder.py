"""Captures of CUDA graphs, with stand-ins for CUDA: order of calls, and what keeps a graph's memory alive."""

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed import process_groups
from megatron_hybrid.train import cuda_graph
from megatron_hybrid.train.cuda_graph import CudaRecorder, GraphedCall


class Stream:
    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: "Stream") -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, calls: list) -> None:
        self.calls = calls

    def register_generator_state(self, state: str) -> None:
        self.calls.append(f"registers {state}")

    def replay(self) -> None:
        self.calls.append("replays")

    def reset(self) -> None:
        self.calls.append("is destroyed")


@pytest.fixture
def cuda(monkeypatch) -> SimpleNamespace:
    """Stand-ins that write down what they are called for."""
    calls: list[str] = []
    default, capture = Stream("default", calls), Stream("capture", calls)
    buffers = {"mpu": object()}

    @contextlib.contextmanager
    def graph(graph: Graph, pool: str, stream: Stream, capture_error_mode: str) -> Any:
        calls.append(f"captures on {stream.name} in {pool}, {capture_error_mode}")
        try:
            yield
        finally:
            calls.append("ends")

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        calls.append(f"on {stream.name}")
        yield

    def seed(number: int, **options: Any) -> None:
        calls.append(f"seeds {number} {options}")

    stand_ins = dict(
        CUDAGraph=lambda: Graph(calls),
        graph=graph,
        graph_pool_handle=lambda: "pool",
        synchronize=lambda: calls.append("synchronizes"),
        current_stream=lambda: default,
        stream=on,
    )
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graph, "get_shared_capture_stream", lambda: capture)
    monkeypatch.setattr(cuda_graph, "get_all_rng_states", lambda: {"data": "state 1", "model": "state 2"})
    monkeypatch.setattr(cuda_graph, "get_global_memory_buffer", lambda: SimpleNamespace(buffer=buffers))
    monkeypatch.setattr(cuda_graph.tensor_parallel, "model_parallel_cuda_manual_seed", seed)
    return SimpleNamespace(calls=calls, buffers=buffers)


def test_a_call_warms_up_and_is_captured_on_the_stream_of_captures(cuda):
    recorder = CudaRecorder(seed=7)
    assert cuda.calls == ["seeds 7 {'use_cudagraphable_rng': True, 'force_reset_rng': True}"]
    call = GraphedCall(lambda: cuda.calls.append("launches"), 1, recorder)
    cuda.calls.clear()
    call()
    warmup = ["capture waits for default", "on capture", "launches", "default waits for capture"]
    assert cuda.calls == warmup
    cuda.calls.clear()
    call()
    call()
    assert cuda.calls == [
        *("registers state 1", "registers state 2", "synchronizes", "captures on capture in pool, thread_local"),
        *("launches", "ends", "synchronizes", "replays", "replays"),
    ]


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_during_a_capture(cuda, enabled):
    seen, before = [], gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        CudaRecorder(seed=7).record(lambda: seen.append(gc.isenabled()))
        assert seen == [False] and gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_graph_keeps_the_buffers_it_reads(cuda):
    replay: Any = CudaRecorder(seed=7).record(lambda: None)
    held = cuda.buffers.pop("mpu")
    assert replay.buffers == [held]


@pytest.mark.parametrize("leave", [process_groups.leave_groups, process_groups.stop_distributed])
def test_graphs_are_destroyed_before_the_groups_whose_communicators_they_use(cuda, monkeypatch, leave):
    recorder = CudaRecorder(seed=7)
    replays = [recorder.record(lambda: None) for _ in range(2)]
    del replays[0]  # of a shape that was forgotten
    gc.collect()
    cuda.calls.clear()
    groups = SimpleNamespace(
        is_initialized=lambda: True,
        destroy_process_group=lambda *group: cuda.calls.append("destroys a group"),
        distributed_c10d=SimpleNamespace(_world=SimpleNamespace(pg_map=["tp"])),
        group=SimpleNamespace(WORLD="all"),
    )
    monkeypatch.setattr(process_groups, "dist", groups)
    monkeypatch.setattr(process_groups.parallel_state, "destroy_model_parallel", lambda: None)
    leave()
    assert cuda.calls == ["is destroyed", "destroys a group"]
    assert not replays[0].buffers


def test_what_cannot_be_captured_is_an_error_that_names_the_field(cuda):
    def read() -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(
        UserError, match=r"^train.cuda_graph_impl: .*\(operation not permitted .* capturing\); set it to none$"
    ):
        CudaRecorder(seed=7).record(read)

    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaRecorder(seed=7).record(full)
