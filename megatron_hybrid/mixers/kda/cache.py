"""Inference with Kimi Delta Attention: the recurrent state and the last inputs of the convolution."""

import torch

from hybrid_kernels.gated_delta_step import gated_delta_step
from hybrid_kernels.gated_rmsnorm import gated_rmsnorm
from hybrid_kernels.kda_rule import kda_rule, log_decay
from megatron_hybrid.mixers.cache import Chunk, MixerCache, Step, keep_tail
from megatron_hybrid.mixers.kda.module import KimiDeltaAttention


def make_cache(mixer: KimiDeltaAttention, batch_size: int, capacity: int) -> "KimiDeltaAttentionCache":
    """Return an empty cache. Its size does not depend on the capacity."""
    return KimiDeltaAttentionCache(mixer, batch_size)


class KimiDeltaAttentionCache(MixerCache):
    """State and convolution inputs of one layer's sequences, on this rank's heads.

    Suffixes of tensor names: t tokens that the convolution looks back on, w width of in_proj's output, k and v channels.
    """

    def __init__(self, mixer: KimiDeltaAttention, batch_size: int) -> None:
        kda, weight = mixer.kda, mixer.conv_weight
        self.mixer = mixer
        self.tail_tbw = weight.new_zeros(weight.shape[1] - 1, batch_size, mixer.packed_width)
        state_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shape = (batch_size, mixer.heads, kda.key_head_dim, kda.value_head_dim)
        self.state_bhkv = torch.zeros(shape, device=weight.device, dtype=state_dtype)

    def extend(self, x_sbh: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        packed_sbw, _ = self.mixer.in_proj(x_sbh)
        q, k, v, beta, low = self.mixer.convolve(packed_sbw, self.tail_tbw)
        g, gate = self._log_decay_and_gate(low)
        token = torch.arange(len(x_sbh), device=x_sbh.device)
        is_token = (token < chunk.lengths_b[:, None])[..., None]
        g, beta = g * is_token[..., None], beta * is_token  # no decay and no write: padding leaves the state as it is
        o, state = kda_rule(q, k, v, g, beta, initial_state=self.state_bhkv, output_final_state=True)
        assert state is not None
        self.state_bhkv.copy_(state)
        keep_tail(self.tail_tbw, packed_sbw, chunk.lengths_b)
        return self._project(o, gate)

    def step(self, x_1bh: torch.Tensor, step: Step) -> torch.Tensor:
        packed_1bw, _ = self.mixer.in_proj(x_1bh)
        seen = torch.cat((self.tail_tbw, packed_1bw))
        self.tail_tbw.copy_(seen[1:])
        *inputs, low = self.mixer.convolve(seen, None)
        q, k, v, beta = (x[:, -1] for x in inputs)
        g, gate = self._log_decay_and_gate(low[-1:])
        o = gated_delta_step(q, k, v, g[:, 0], beta, self.state_bhkv)
        return self._project(o[:, None], gate)

    def _log_decay_and_gate(self, low_sbl: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raw, gate = self.mixer.decay_and_gate(low_sbl)
        return log_decay(raw, **self.mixer.gate_arguments()), gate

    def _project(self, o_bshd: torch.Tensor, gate_sbw: torch.Tensor) -> torch.Tensor:
        mixer = self.mixer
        y_sbw = gated_rmsnorm(o_bshd, gate_sbw, mixer.o_norm_weight, mixer.kda.norm_eps, activation="sigmoid")
        y_sbh: torch.Tensor = mixer.out_proj(y_sbw)[0]
        return y_sbh

    def reset(self) -> None:
        self.tail_tbw.zero_()
        self.state_bhkv.zero_()

    @property
    def nbytes(self) -> int:
        return self.tail_tbw.nbytes + self.state_bhkv.nbytes
