"""Chooses the callbacks that section `debug` asks for."""

from megatron_hybrid.config.run import RunConfig
from megatron_hybrid.train.callbacks.base import Callback
from megatron_hybrid.train.callbacks.garbage_collection import GarbageCollection
from megatron_hybrid.train.callbacks.memory_snapshot import MemorySnapshot
from megatron_hybrid.train.callbacks.nonfinite_attribution import NonfiniteAttribution
from megatron_hybrid.train.callbacks.nvtx_ranges import NvtxRanges
from megatron_hybrid.train.callbacks.slowest_rank import SlowestRank
from megatron_hybrid.train.callbacks.torch_profiler import TorchProfiler


def debugging_callbacks(config: RunConfig) -> list[Callback]:
    """Return the callbacks of section `debug`."""
    debug, callbacks = config.debug, list[Callback]()
    if debug.profile_step_start is not None:
        end = debug.profile_step_end or debug.profile_step_start
        callbacks.append(TorchProfiler(debug.profile_step_start, end, debug.profile_ranks))
    if debug.record_memory_history:
        callbacks.append(MemorySnapshot())
    if debug.nvtx_ranges:
        callbacks.append(NvtxRanges())
    if debug.manual_gc_interval is not None:
        callbacks.append(GarbageCollection(debug.manual_gc_interval))
    if debug.straggler_interval is not None:
        callbacks.append(SlowestRank(debug.straggler_interval))
    if debug.attribute_nonfinite and config.train.engine == "megatron":
        callbacks.append(NonfiniteAttribution())
    return callbacks
