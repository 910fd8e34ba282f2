"""Inference with Gated DeltaNet: the recurrent state and the last inputs of the convolution."""

from typing import Any

import torch

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.gated_delta_step import gated_delta_step
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from megatron_hybrid.mixers.cache import Chunk, MixerCache, Step, keep_tail
from megatron_hybrid.mixers.gated_delta_net.module import GatedDeltaNet


def make_cache(mixer: GatedDeltaNet, batch_size: int, capacity: int) -> "GatedDeltaNetCache":
    """Return an empty cache. Its size does not depend on the capacity."""
    return GatedDeltaNetCache(mixer, batch_size)


class GatedDeltaNetCache(MixerCache):
    """State and convolution inputs of one layer's sequences, on this rank's heads.

    Suffixes of tensor names: t tokens that the convolution looks back on, w width of in_proj's output, k and v channels.
    """

    def __init__(self, mixer: GatedDeltaNet, batch_size: int) -> None:
        gdn, weight = mixer.gdn, mixer.conv_weight
        self.mixer = mixer
        self.tail_tbw = weight.new_zeros(weight.shape[1] - 1, batch_size, mixer.packed_width)
        state_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch_size, mixer.heads, gdn.key_head_dim, gdn.value_head_dim)
        self.state_bhkv = torch.zeros(shape, device=weight.device, dtype=state_dtype)

    def extend(self, x_sbh: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        packed_sbw, _ = self.mixer.in_proj(x_sbh)
        q, k, v, g, beta, gate = self._conv_gates(packed_sbw, self.tail_tbw)
        token = torch.arange(len(x_sbh), device=x_sbh.device)
        is_token = (token < chunk.lengths_b[:, None])[..., None]
        g, beta = g * is_token, beta * is_token  # no decay and no write: padding leaves the state as it is
        o, state = gated_delta_rule(q, k, v, g, beta, initial_state=self.state_bhkv, output_final_state=True)
        assert state is not None
        self.state_bhkv.copy_(state)
        keep_tail(self.tail_tbw, packed_sbw, chunk.lengths_b)
        return self._project(o, gate)

    def step(self, x_1bh: torch.Tensor, step: Step) -> torch.Tensor:
        packed_1bw, _ = self.mixer.in_proj(x_1bh)
        seen = torch.cat((self.tail_tbw, packed_1bw))
        self.tail_tbw.copy_(seen[1:])
        *inputs, gate = self._conv_gates(seen, None)
        q, k, v, g, beta = (x[:, -1] for x in inputs)
        o = gated_delta_step(q, k, v, g, beta, self.state_bhkv)
        return self._project(o[:, None], gate[-1:])

    def _conv_gates(self, packed_sbw: torch.Tensor, halo_sbw: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        mixer = self.mixer
        sizes: dict[str, Any] = mixer.kernel_sizes()
        weights = (mixer.conv_weight, mixer.A_log, mixer.dt_bias)
        sizes["allow_negative_eigenvalues"] = mixer.gdn.allow_negative_eigenvalues
        return conv_gates(packed_sbw, *weights, **sizes, halo_sbw=halo_sbw, return_gate=True)

    def _project(self, o_bshd: torch.Tensor, gate_sbw: torch.Tensor) -> torch.Tensor:
        y_sbw = gated_rmsnorm(o_bshd, gate_sbw, self.mixer.o_norm_weight, self.mixer.gdn.norm_eps)
        y_sbh: torch.Tensor = self.mixer.out_proj(y_sbw)[0]
        return y_sbh

    def reset(self) -> None:
        self.tail_tbw.zero_()
        self.state_bhkv.zero_()

    @property
    def nbytes(self) -> int:
        return self.tail_tbw.nbytes + self.state_bhkv.nbytes
