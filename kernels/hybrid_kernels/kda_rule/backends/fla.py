"""flash-linear-attention 0.6's chunk_kda behind this op's signature."""

from importlib import metadata

import torch

from hybrid_kernels.dispatch import has_module

OLDEST = (0, 6, 0)
"""Earlier releases swallow options that they do not know."""
LARGEST_KEY_DIM = 256


def unsupported_reason(v: torch.Tensor, key_head_dim: int, documents: str | None) -> str | None:
    """Return why fla cannot run a call, or None.

    Args:
        documents: why the documents of this call cannot be passed to fla, or None.
    """
    if documents is not None:
        return documents
    if not v.is_cuda:
        return "tensors are not on a CUDA device"
    if v.dtype not in (torch.bfloat16, torch.float16):
        return f"fla's chunked kernel takes bf16 or fp16, not {v.dtype}"
    if key_head_dim > LARGEST_KEY_DIM:
        return f"key_head_dim {key_head_dim} is above {LARGEST_KEY_DIM}"
    return _missing_package()


def _missing_package() -> str | None:
    if not has_module("fla"):
        return "the package flash-linear-attention (fla) is not installed"
    version = _release()
    if tuple(int(part) for part in version.split(".")[:3] if part.isdigit()) < OLDEST:
        return f"fla {version or 'of an unknown release'} is not {'.'.join(map(str, OLDEST))} or later"
    return None


def _release() -> str:
    """Return fla's release. Its kernels are a package of their own since 0.4."""
    for package in ("fla-core", "flash-linear-attention"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


def kda_rule_fla(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *,
    A_log: torch.Tensor | None, dt_bias: torch.Tensor | None, lower_bound: float | None, scale: float | None,
    initial_state: torch.Tensor | None, output_final_state: bool, cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """See `kda_rule`. Needs the package flash-linear-attention and a CUDA device.

    fla keys a cache of chunk indices by the tensor `cu_seqlens`. Pass the same tensor in all layers: fla then synchronizes host
    and device once per micro-batch.

    Args:
        cu_seqlens: bounds of sequences in all rows, one row after the other. With several rows there are no states.
    """
    from fla.ops.kda import chunk_kda

    rows = v.shape[:2]
    if cu_seqlens is not None and rows[0] > 1:
        q, k, v, g, beta = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v, g, beta))
    o, state = chunk_kda(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
        use_gate_in_kernel=A_log is not None, A_log=A_log, dt_bias=dt_bias, safe_gate=lower_bound is not None,
        lower_bound=lower_bound, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return o.view(*rows, *o.shape[2:]), state
