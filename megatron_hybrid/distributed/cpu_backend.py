"""CPU backend for megatron-core: replacements of the `torch.cuda` calls that megatron-core 0.19.2 hard-codes.

`use_cpu_backend` installs them once per process. It is called only if CUDA is not available; with CUDA, nothing is patched. What
megatron-core lets its configuration decide (CPU initialization, fusions) is decided there, in model/megatron_config.py.

Paths and lines in comments are those of megatron-core 0.19.2, below `megatron/core/`.
"""

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_hybrid.distributed.deferred_compilation import disable_compilation

CPU = torch.device("cpu")
_CONSTRUCTORS = (
    *("tensor", "empty", "zeros", "ones", "full", "arange"),
    *("empty_like", "zeros_like", "ones_like", "full_like"),
)
_installed = False


class _Event:
    """torch.cuda.Event on the CPU, where every operation has finished when it returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.record()

    def record(self, stream: object = None) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return (other._at - self._at) * 1e3

    def wait(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """torch.cuda.Stream on the CPU, where every operation has finished when it returns."""

    device, cuda_stream = CPU, 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)


def use_cpu_backend() -> None:
    """Replace megatron-core's hard-coded `torch.cuda` calls in this process. A second call has no effect."""
    global _installed
    if _installed:
        return
    _installed = True
    _patch_device_queries()
    _patch_tensor_constructors()
    _patch_tensor_types()
    _patch_random_state()
    _patch_fused_optimizers()
    _patch_hybrid_optimizer()
    # megatron-core decorates small functions with torch.compile, which compiles for 30 s on the CPU without a gain
    disable_compilation()


def _patch_device_queries() -> None:
    # current_device: tensor_parallel/mappings.py:95, tensor_parallel/layers.py:305, pipeline_parallel/p2p_communication.py:211,
    #     distributed/param_and_grad_buffer.py:1162, models/common/embeddings/rotary_pos_embedding.py:162, utils.py:715
    # synchronize: pipeline_parallel/p2p_communication.py:263, utils.py:1721
    # streams and events: distributed/param_and_grad_buffer.py:632, 686, 691 and 814
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()


def _patch_tensor_constructors() -> None:
    # device="cuda": pipeline_parallel/schedules.py:749, 1121 and 2292, tensor_parallel/data.py:37,
    #     optimizer/optimizer.py:315, 690, 698, 702 and 1249, optimizer/clip_grads.py:96, 108, 112, 180 and 231
    # Tensor.cuda(): models/common/language_module/language_module.py:307, tensor_parallel/data.py:84
    from torch.utils._device import _device_constructors

    _device_constructors()  # cache the original constructors, which torch.device("meta") as a context compares with
    for name in _CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a tensor constructor that takes `device="cuda"` and `pin_memory=True` for the CPU."""

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return construct


def _patch_tensor_types() -> None:
    # Tensor.type() is compared with 'torch.cuda.FloatTensor' and the like:
    #     optimizer/optimizer.py:1009 and 1028, optimizer/distrib_optimizer.py:401, 466 and 758, optimizer/clip_grads.py:174
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any) -> Any:
        if dtype is not None:
            return original_type(self, dtype, non_blocking, **kwargs)
        name = original_type(self)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if caller.startswith("megatron.core.optimizer") else name

    tensor: Any = torch.Tensor
    tensor.type = type_


def _patch_random_state() -> None:
    # tensor_parallel/random.py:174: the setter ends in torch.cuda._lazy_call, which queues calls forever without a GPU
    generator = torch.default_generator

    def get_state(device: object = None) -> torch.Tensor:
        return generator.get_state()

    def set_state(state: torch.Tensor, device: object = None, graph_safe: bool = False) -> None:
        generator.set_state(state)

    def seed(value: int) -> None:
        generator.manual_seed(int(value))

    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state, module.set_rng_state = get_state, set_state
        module.manual_seed = module.manual_seed_all = seed
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = set_state
    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_fused_optimizers() -> None:
    # The CUDA kernels of Transformer Engine or Apex are chosen if they are installed, whatever the device:
    #     optimizer/__init__.py, optimizer/optimizer.py:18, optimizer/clip_grads.py:12, optimizer/distrib_optimizer.py:20
    import megatron.core.optimizer as package
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    package.Adam, package.SGD, package.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None


def _patch_hybrid_optimizer() -> None:
    # optimizer/cpu_offloading/hybrid_optimizer.py:256, 273 and 285: Tensor.is_cuda decides which parameters may be copied to the
    # host, and tells copies from originals. Here the function's own variable `cpu_copy` of the current parameter does.
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    original = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide(self: Any, offload_fraction: float) -> Any:
        tensor: Any = torch.Tensor
        tensor.is_cuda = property(lambda _: not sys._getframe(1).f_locals.get("cpu_copy", False))
        tensor.pin_memory = lambda self, device=None: self
        try:
            return original(self, offload_fraction)
        finally:
            del tensor.is_cuda, tensor.pin_memory  # uncovers those of the base class

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide
