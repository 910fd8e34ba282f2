"""CUDA graphs of training steps (train.cuda_graph_impl): the kernels of a step in one launch of the host.

A graph repeats kernels at the addresses that they had when it was captured. No Python runs: no hook, no branch, no counter. So a
step is divided by what depends on the host.

| part of a step | how it runs |
|---|---|
| forward and backward passes of all micro-batches, sums of their losses | one graph per shape of global batch |
| zeroing of gradients, reduction over data parallel ranks, sums of losses over ranks | host, without waiting |
| losses are read, then the gradient norm; skip or update | host, waits for each |
| clipping, Adam | host |
| copy of the shards of master weights to the model's weights, one kernel per parameter | one graph |
| all-gather of weights | host |

- Inputs are copied to tensors that keep their address: tokens, labels, loss masks, documents, sources, and the scale of the loss
  masks, which depends on the counted tokens of all ranks. Outputs are the sums of losses and DDP's gradient buffers.
- The first `train.cuda_graph_warmup_steps` steps of each shape run without a graph. They are ordinary steps of the run. They compile
  kernels and fill the caches of megatron-core and Transformer Engine. A resumed run warms up again. Each shape of a batch or sequence
  ramp has its own graph. Boundaries of documents are padded to one capacity for all micro-batches of a step, so that few shapes occur.
- Data parallel communication stays outside. Each replica then captures when its own batches require it. NCCL may exchange handles of
  buffers during a capture, so ranks that communicate in a graph must capture it at the same time. Tensor and context parallel ranks
  do, because their batches have the same shapes. config/cuda_graph_checks.py refuses what would put data parallel communication into
  the passes.
- Clipping and Adam stay outside. Their factor, learning rate and bias correction are arguments of kernels, which the host computes.
  Transformer Engine's Adam with `capturable` computes the bias correction in the kernel, which need not round as the host does, so a
  run could have other bits than without graphs. Clipping and Adam are a few kernels for all parameters.
- Warm-up and capture run on megatron-core's capture stream, and DDP is built on it (as in Megatron-LM since its pull request 6021).
  Autograd accumulates a gradient on the stream on which the parameter's accumulator was made, and the default stream cannot be
  captured.
- Recompute of whole layers, Transformer Engine's attention and megatron-core's embedding save and restore random states, although
  nothing here draws random numbers. Reading the state of a generator during a capture is an error. So megatron-core's tracker is
  seeded again in the form that graphs can read, and its states are registered with each graph.
- NCCL does not destroy a communicator while a graph of its collectives exists. So the graphs are released before the groups are
  destroyed, also when an error ends the run. Otherwise the process would wait forever.
- Triton and megatron-core's fused functions compile in the warm-up. The kernels of this project take sizes from shapes. Their tables
  of chunks and segments are arguments or on the device.

megatron-core's FullCudaGraphWrapper (full_cuda_graph.py) does not fit. Its state is a class attribute, so a process has one graph for
all engines and shapes. It copies batches as dictionaries. It captures the reduction of gradients. Its stream and list of random states
are used here.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol
from weakref import WeakSet

import torch
from megatron.core import tensor_parallel
from megatron.core.full_cuda_graph import get_shared_capture_stream
from megatron.core.parallel_state import get_global_memory_buffer
from megatron.core.tensor_parallel.random import get_all_rng_states

from megatron_hybrid.base.errors import ConfigError, UserError
from megatron_hybrid.config.train import TrainConfig
from megatron_hybrid.distributed.device import has_cuda
from megatron_hybrid.distributed.process_groups import release_before_leaving


class Recorder(Protocol):
    """Captures functions that launch kernels. Tests have one for the CPU (testing/op_tape.py)."""

    def side_stream(self) -> AbstractContextManager[None]:
        """Return a context in which kernels are launched on the stream of captures."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run a function without running its kernels, and return a function that runs these kernels."""

    def release(self) -> None:
        """Free what was recorded. Its functions must not be called any more."""


class CudaRecorder:
    """Captures CUDA graphs in one memory pool. They are replayed one at a time, and their results are read before the next replay.

    They are released before process groups are destroyed.
    """

    def __init__(self, seed: int) -> None:
        self.stream, self.pool = get_shared_capture_stream(), torch.cuda.graph_pool_handle()
        self._replays: WeakSet[_Replay] = WeakSet()
        release_before_leaving(self)
        # as distributed/process_groups.py does, with states that graphs can read
        tensor_parallel.model_parallel_cuda_manual_seed(seed, use_cudagraphable_rng=True, force_reset_rng=True)
        torch.manual_seed(seed)

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Launch on the stream of captures, after and before everything on the current stream."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Capture a function.

        Raises:
            UserError: it does what a graph cannot repeat, such as reading a value on the host.
        """
        graph = torch.cuda.CUDAGraph()
        for state in get_all_rng_states().values():
            graph.register_generator_state(state)
        torch.cuda.synchronize()
        # thread_local: NCCL's watchdog and the loader's threads, which pin memory, call CUDA at any time
        capture = torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with _without_garbage_collection(), capture:
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]  # ending a capture that failed is an error as well
            raise UserError(f"train.cuda_graph_impl: a step cannot be captured ({reason}); set it to none") from error
        torch.cuda.synchronize()
        replay = _Replay(graph, list(get_global_memory_buffer().buffer.values()))
        self._replays.add(replay)
        return replay

    def release(self) -> None:
        """Destroy the graphs that still exist. A graph that nothing refers to any more is destroyed by itself."""
        for replay in list(self._replays):
            replay.release()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Collect garbage first: graphs and events that are destroyed during a capture could invalidate it."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Replay:
    """A graph, with the buffers that megatron-core's linears gather into. A larger step replaces them, and they would be freed."""

    def __init__(self, graph: torch.cuda.CUDAGraph, buffers: list[torch.Tensor]) -> None:
        self.graph, self.buffers = graph, buffers

    def __call__(self) -> None:
        self.graph.replay()

    def release(self) -> None:
        self.graph.reset()
        self.buffers.clear()


def make_recorder(train: TrainConfig) -> Recorder | None:
    """Return the recorder of a run, or None if it runs without graphs. Call it after the groups are formed, before the model is built.

    Raises:
        ConfigError: graphs are requested, and there is no GPU.
    """
    if train.cuda_graph_impl == "none":
        return None
    if has_cuda():
        return CudaRecorder(train.seed)
    if train.cuda_graph_impl == "auto":
        return None
    raise ConfigError.at(
        "train.cuda_graph_impl",
        f"{train.cuda_graph_impl} needs a GPU, and there is none; set it to none, or to auto, which uses graphs on GPUs only",
    )


def describe(train: TrainConfig, recorder: Recorder | None) -> tuple[str, str] | None:
    """Return how steps are launched, and why, for the table of what a run uses; None if graphs are not requested."""
    if train.cuda_graph_impl == "none":
        return None
    why = f"train.cuda_graph_impl = {train.cuda_graph_impl}"
    if recorder is None:
        return "no CUDA graphs", f"{why}, and there is no GPU"
    return f"CUDA graphs, after {train.cuda_graph_warmup_steps} steps of each shape", why


def side_stream(recorder: Recorder | None) -> AbstractContextManager[None]:
    """Return the recorder's stream as a context; without a recorder, a context that does nothing."""
    return nullcontext() if recorder is None else recorder.side_stream()


class GraphedCall:
    """A function that launches the same kernels on the same tensors at every call, from some call on as a graph.

    Its effects in Python, if it has any, happen in the first `warmup` calls and in the capture only.
    """

    def __init__(self, function: Callable[[], None], warmup: int, recorder: Recorder) -> None:
        self.function, self.recorder = function, recorder
        self.warmup_left = warmup
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None and self.warmup_left:
            self.warmup_left -= 1
            with self.recorder.side_stream():
                self.function()
            return
        if self.replay is None:
            self.replay = self.recorder.record(self.function)
        self.replay()
