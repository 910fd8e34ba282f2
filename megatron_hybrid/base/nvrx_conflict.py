"""Makes megatron-core importable next to a version of NVIDIA's Resiliency Extension (NVRx) that it refuses.

megatron-core 0.19.2 fails when it is imported and NVRx is older than 0.6.0: it reads `__version__`, which 0.4.1 lacks, and asserts
0.6.0 (dist_checkpointing/strategies/nvrx.py, lines 45 and 85). It does so only if NVRx's asynchronous checkpoints can be
imported. This project does not use them, so an old version's are hidden. Its launcher and heartbeats work.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

_REQUIRED = (0, 6)
_ASYNC_CHECKPOINTS = "nvidia_resiliency_ext.checkpointing.async_ckpt.core"


def hide_old_async_checkpoints() -> None:
    """Make NVRx's asynchronous checkpoints unavailable if megatron-core refuses them. Call it before megatron-core is imported."""
    if find_spec("nvidia_resiliency_ext") is not None and _installed() < _REQUIRED:
        sys.modules.setdefault(_ASYNC_CHECKPOINTS, None)  # type: ignore[arg-type] # importing it raises ImportError


def _installed() -> tuple[int, ...]:
    """Return major and minor version of NVRx; (0,) if it is not known."""
    try:
        return tuple(int(part) for part in version("nvidia-resiliency-ext").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return (0,)
