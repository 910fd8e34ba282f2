"""Run examples/megatron_lm/pretrain.py on CPU ranks. megatron.training asks for CUDA before it does anything: what it asks, and what
it only measures or warms up, is answered here, and nothing of how it builds, trains or saves the model.
"""

import functools
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = ROOT / "examples" / "megatron_lm"
sys.path[:0] = [str(EXAMPLE), str(ROOT), str(ROOT / "kernels")]

from megatron_hybrid.base.permanent_imports import permanent_imports  # noqa: E402

with permanent_imports():
    from megatron_hybrid.spec import enable_cpu_backend


def main() -> None:
    enable_cpu_backend()
    torch.cuda.device_count = lambda: 1
    torch.cuda.is_available = lambda: False  # else, with PYTORCH_NVML_BASED_CUDA_CHECK, it is asked of the line above
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0, name="none")
    torch.cuda.set_device = lambda device: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.memory_stats = lambda device=None: defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda device=None: 0)
    with permanent_imports():
        from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    training.set_jit_fusion_options = lambda **_: None
    training.report_memory = lambda *_, **__: None
    runpy.run_path(str(EXAMPLE / "pretrain.py"), run_name="__main__")


if __name__ == "__main__":
    main()
