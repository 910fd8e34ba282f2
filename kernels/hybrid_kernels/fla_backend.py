"""hybrid_kernels as a backend of fla 0.6's chunk_gated_delta_rule. Importing this module registers it; nothing else does.

    import hybrid_kernels.fla_backend

From then on, fla and every model built on it run these kernels in bf16 and fp16, among others at head dims 96 and 192 with negative
eigenvalues. Other head dims are padded with zeros, which is exact. Other calls are refused with a reason, which fla logs, and go to
fla's own kernels. FLA_HYBRID_KERNELS=0 switches it off.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fla.backends import BaseBackend, register

from hybrid_kernels.gated_delta_rule import explain, gated_delta_rule

FAST = ("cuda", "triton")
L2_EPS = 1e-6
"""Added inside the square root, as in fla."""
KEY_DIMS, VALUE_UNIT = (16, 32, 64, 96, 128, 192, 256), 64
"""Head dims of keys that the kernels take, and the unit of those of values. Others are padded."""
UNSUPPORTED = {
    "cp_context": "does not take fla's context parallelism",
    "transpose_state_layout": "does not take the deprecated transpose_state_layout",
}


class HybridKernelsBackend(BaseBackend):  # type: ignore[misc]
    """Backend of `gated_delta_rule` in fla's registry."""

    backend_type = "hybrid_kernels"
    env_var = "FLA_HYBRID_KERNELS"
    priority = 2  # in front of FlashQLA's 3: a user who imports this module asks for it

    def chunk_gated_delta_rule_verifier(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[bool, str | None]:
        """Return whether these kernels run a call, and the reason if they do not. The arguments are fla's."""
        if found := [text for name, text in UNSUPPORTED.items() if options.get(name)]:
            return False, f"hybrid_kernels {found[0]}"
        if g is None or beta is None:
            return False, "hybrid_kernels needs g and beta"
        if options.get("chunk_size", 64) != 64:
            return False, f"hybrid_kernels has chunks of 64 tokens, not {options['chunk_size']}"
        if not q.dtype == k.dtype == v.dtype:
            return False, f"hybrid_kernels needs q, k and v of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        if k.shape[-1] > KEY_DIMS[-1]:
            return False, f"hybrid_kernels takes key head dims up to {KEY_DIMS[-1]}, not {k.shape[-1]}"
        dim_k, dim_v = padded_dims(k.shape[-1], v.shape[-1])
        padded = _of_width(q, dim_k), _of_width(k, dim_k), _of_width(v, dim_v)
        choice = explain(*padded, g, beta, cu_seqlens=options.get("cu_seqlens"))
        if choice.backend in FAST:
            return True, None
        return False, "; ".join(f"hybrid_kernels' {name}: {choice.rejected[name]}" for name in FAST)

    def chunk_gated_delta_rule(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        scale: float | None = None,
        initial_state: torch.Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        state_v_first: bool = False,
        cu_seqlens: torch.Tensor | None = None,
        cu_seqlens_cpu: torch.Tensor | None = None,
        use_gate_in_kernel: bool = False,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        **checked: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run a call that the verifier accepted. What fla fuses in front of the rule runs in torch.

        Args:
            cu_seqlens_cpu: unused: the kernels read `cu_seqlens` on the device.
            checked: options that the verifier found absent or at their only value.
        """
        dims = k.shape[-1], v.shape[-1]
        dim_k, dim_v = padded_dims(*dims)
        if use_gate_in_kernel:
            assert A_log is not None, "fla checks it"
            g = _gate(g, A_log, dt_bias)
        if use_qk_l2norm_in_kernel:
            q, k = (_l2_normalise(x) for x in (q, k))
        if use_beta_sigmoid_in_kernel:
            beta = beta.float().sigmoid() * (2.0 if allow_neg_eigval else 1.0)
        state = initial_state
        if state is not None:
            state = (state.transpose(-1, -2) if state_v_first else state).float()
            state = F.pad(state, (0, dim_v - dims[1], 0, dim_k - dims[0])).contiguous()
        q, k, padded_v = (F.pad(x, (0, dim - x.shape[-1])) for x, dim in ((q, dim_k), (k, dim_k), (v, dim_v)))
        o, final = gated_delta_rule(
            q, k, padded_v, g.float(), beta.float(), scale=dims[0] ** -0.5 if scale is None else scale,
            initial_state=state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        if final is not None:
            final = final[..., : dims[0], : dims[1]]
            final = (final.transpose(-1, -2) if state_v_first else final).contiguous()
        return o[..., : dims[1]], final


def padded_dims(dim_k: int, dim_v: int) -> tuple[int, int]:
    """Return the smallest head dims of keys and values that the kernels take and that hold the given ones."""
    return next(dim for dim in KEY_DIMS if dim >= dim_k), -(-dim_v // VALUE_UNIT) * VALUE_UNIT


def _of_width(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return a tensor of another width, of any values, without memory of its own."""
    return x[..., :1].expand(*x.shape[:-1], width)


def _gate(g: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor | None) -> torch.Tensor:
    """Return the log decay, as fla's `naive_gdn_gate` does."""
    raw = g.float() if dt_bias is None else g.float() + dt_bias.float()
    return -A_log.float().exp() * F.softplus(raw)


def _l2_normalise(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)


register("gated_delta_rule")(HybridKernelsBackend)
