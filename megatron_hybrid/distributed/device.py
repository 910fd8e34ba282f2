"""The device backend: CUDA over NCCL, or CPU over gloo with the same code.

megatron-core 0.19.2 asks `torch.cuda` directly in many places. On a machine without CUDA, `use_cpu_backend()` answers
those calls for the CPU; with CUDA it is never called and nothing is patched. What megatron-core lets its configuration
decide (CPU initialisation, fusions) is decided there, in model/megatron_config.py.
"""

import contextlib
import functools
import logging
import os
import socket
import sys
import time

import torch

from megatron_hybrid.base.errors import LaunchError

CPU = torch.device("cpu")


def has_cuda() -> bool:
    """Whether this process computes on a GPU. CUDA_VISIBLE_DEVICES= (empty) keeps it off one that is there."""
    return torch.cuda.is_available()


def local_device() -> torch.device:
    """The device this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else CPU


def synchronize() -> None:
    """Wait until this rank's device has done what it was given."""
    if has_cuda():
        torch.cuda.synchronize()


def communication_backend() -> str:
    """torch.distributed's backend for this device."""
    return "nccl" if has_cuda() else "gloo"


def setup_device(local_rank: int) -> str:
    """Choose this process's device and make megatron-core run on it. Returns a line that says what was chosen and why.

    Raises:
        LaunchError: more ranks on this node than GPUs.
    """
    # megatron-core and Transformer Engine overlap communication with matrix products by the order of launches
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda():
        count = torch.cuda.device_count()
        device = device_index(local_rank, count)
        torch.cuda.set_device(device)
        return f"device: CUDA over NCCL ({torch.cuda.get_device_name()}, {count} visible on this node)"
    use_cpu_backend()
    return f"device: CPU over gloo, {torch.get_num_threads()} threads a rank (no CUDA device is visible)"


def device_index(local_rank: int, visible: int) -> int:
    """Return the index of a rank's GPU among the visible ones.

    Where a single one is visible, the launcher has bound it to the rank (srun --gpus-per-task=1, --gpu-bind):
    `check_gpus_are_apart` finds ranks that share it by mistake.

    Raises:
        LaunchError: several GPUs are visible, and fewer than the node has ranks.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        words = f"{visible} visible" + (f" (CUDA_VISIBLE_DEVICES={named})" if named is not None else "")
        raise LaunchError(
            f"local rank {local_rank} has no GPU: {words}; start at most {visible} ranks on this node, or give each a GPU of its "
            "own (srun --gpus-per-task=1)"
        )
    return local_rank


def device_identity() -> str:
    """Return a name of this rank's GPU, which no other GPU and no other MIG instance of the node has."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    mig = named if named.startswith("MIG-") else ""  # instances of one GPU
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid} {mig}"


def node_name() -> str:
    """This node as SLURM names it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def parameter_device(config) -> torch.device | int:
    """The device on which megatron-core's linears make their parameters, too."""
    return torch.device("cpu") if config.use_cpu_initialization else torch.cuda.current_device()


class _Event:
    """torch.cuda.Event where every operation has finished when it returns."""

    def __init__(self, *args, **kwargs):
        self.record()

    def record(self, stream=None):
        self._at = time.perf_counter()

    def elapsed_time(self, other: "_Event") -> float:
        return (other._at - self._at) * 1e3

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """torch.cuda.Stream where every operation has finished when it returns."""

    device, cuda_stream = CPU, 0

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        pass

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)


def _on_cpu(constructor):
    """A tensor constructor that takes device="cuda" and pin_memory=True, and means the CPU."""

    @functools.wraps(constructor)
    def construct(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return constructor(*args, **kwargs)

    return construct


_CONSTRUCTORS = (
    "tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
)
_cpu_backend_in_use = False


def use_cpu_backend() -> None:
    """Answer megatron-core's hard-coded `torch.cuda` calls for the CPU. Once a process; only without CUDA."""
    global _cpu_backend_in_use
    if _cpu_backend_in_use:
        return
    _cpu_backend_in_use = True
    _patch_device_queries()
    _patch_tensor_placement()
    _patch_random_state()
    _patch_fused_optimizers()
    _patch_hybrid_optimizer()
    # megatron-core decorates small functions with torch.compile: on the CPU that costs 30 s of compiling, for nothing
    torch.compiler.set_stance("force_eager")


def _patch_device_queries() -> None:
    # mappings.py, layers.py, param_and_grad_buffer.py:632, p2p_communication.py, rotary_pos_embedding.py, utils.py
    stream, cuda = _Stream(), torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.stream = lambda stream: contextlib.nullcontext()


def _patch_tensor_placement() -> None:
    # device="cuda" in schedules.py, optimizer.py, clip_grads.py, tensor_parallel/data.py; .cuda() in language_module.py:307
    from torch.utils._device import _device_constructors

    _device_constructors()  # fill torch's cache with the originals first: torch.device("meta") goes on working
    for name in _CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self

    # distrib_optimizer.py, optimizer.py and clip_grads.py compare Tensor.type() with 'torch.cuda.FloatTensor'
    original_type = torch.Tensor.type

    def type_(self, dtype=None, non_blocking=False, **kwargs):
        if dtype is not None:
            return original_type(self, dtype, non_blocking, **kwargs)
        name = original_type(self)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        return name.replace("torch.", "torch.cuda.", 1) if asked_by.startswith("megatron.core.optimizer") else name

    torch.Tensor.type = type_


def _patch_random_state() -> None:
    # tensor_parallel/random.py: its setter ends in torch.cuda._lazy_call, which without a GPU queues for ever, silently
    generator, cuda = torch.default_generator, torch.cuda

    def get_state(device=None):
        return generator.get_state()

    def set_state(state, device=None):
        generator.set_state(state)

    def seed(value):
        generator.manual_seed(int(value))

    for module in (cuda, cuda.random):
        module.get_rng_state, module.set_rng_state = get_state, set_state
        module.manual_seed = module.manual_seed_all = seed
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: generator.set_state(state)
    logger = logging.getLogger(megatron_random.__name__)
    logger.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _patch_fused_optimizers() -> None:
    # optimizer/{__init__,optimizer,clip_grads,distrib_optimizer}.py take the CUDA kernels of Transformer Engine or Apex
    # wherever these are installed, whatever the device
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
    # cpu_offloading/hybrid_optimizer.py:_get_sub_optimizer_param_groups asks Tensor.is_cuda what it may copy to the host, and
    # then which of the two a tensor is. Here that is what its own variable says: `cpu_copy`, of the parameter it is at
    from megatron.core.optimizer.cpu_offloading.hybrid_optimizer import HybridDeviceOptimizer

    original = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def divide(self, offload_fraction):
        torch.Tensor.is_cuda = property(lambda tensor: not sys._getframe(1).f_locals.get("cpu_copy", False))
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor
        try:
            return original(self, offload_fraction)
        finally:
            del torch.Tensor.is_cuda, torch.Tensor.pin_memory  # what they hid is of a base class

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = divide
