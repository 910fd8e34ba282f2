"""Inference with attention: keys and values of all earlier tokens, or of a sliding window."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.bias import causal_lower_right

from megatron_hybrid.mixers.attention.module import SelfAttention
from megatron_hybrid.mixers.cache import Chunk, MixerCache, Step


def make_cache(mixer: SelfAttention, batch_size: int, capacity: int) -> "KeyValueCache":
    """Return an empty cache for sequences of up to `capacity` tokens. With a window it holds that many tokens at most."""
    config = mixer.config
    windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, mixer.layer_number)
    if windowed and config.window_size[0] + 1 < capacity:
        return WindowCache(mixer, batch_size, config.window_size[0] + 1)
    return KeyValueCache(mixer, batch_size, capacity)


class KeyValueCache(MixerCache):
    """Keys and values of one layer's sequences, on this rank's heads.

    The token at position p is in slot p % slots. A sequence at position p may see exactly the slots up to p: either there are no
    others yet, or every slot holds one of the last `slots` tokens.

    Suffixes of tensor names: n heads of keys or queries, d channels of a head.
    """

    def __init__(self, mixer: SelfAttention, batch_size: int, slots: int) -> None:
        self.mixer, self.slots = mixer, slots
        shape, device = (batch_size, mixer.groups, slots, mixer.head_dim), mixer.k_norm_weight.device
        self.k_bnsd, self.v_bnsd = (
            torch.zeros(shape, device=device, dtype=mixer.config.params_dtype) for _ in range(2)
        )

    def extend(self, x_sbh: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        packed_sbw, _ = self.mixer.linear_qkv(x_sbh)
        *parts, gate_sbw = self.mixer.split(packed_sbw, chunk.angles)
        q, k, v = (t.permute(1, 2, 0, 3) for t in parts)
        keys, values = self._with_past(k, v, chunk)
        o_bnsd = attend_chunk(q, keys, values, self._mask(k.shape[2], keys.shape[2], q.device), self._scale)
        return self.mixer.project(o_bnsd.permute(2, 0, 1, 3).flatten(2), gate_sbw)

    def _with_past(self, k: torch.Tensor, v: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the keys and values of a chunk, and return them behind those of earlier tokens that it may see."""
        end = chunk.start + k.shape[2]
        for cache, new in ((self.k_bnsd, k), (self.v_bnsd, v)):
            cache[:, :, chunk.start : end] = new  # padding is overwritten before any token may see it
        return self.k_bnsd[:, :, :end], self.v_bnsd[:, :, :end]

    def _mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """Return which keys each query may see; None: the causal ones, with the last key at the last query."""
        return None

    def step(self, x_1bh: torch.Tensor, step: Step) -> torch.Tensor:
        packed_1bw, _ = self.mixer.linear_qkv(x_1bh)
        # one token per sequence: norm and rotary embedding take sequences for tokens, each with its own angles
        *parts, gate_b1w = self.mixer.split(packed_1bw.transpose(0, 1), step.angles)
        q, k, v = (t.squeeze(1) for t in parts)
        row, slot = torch.arange(len(q), device=q.device), step.positions_b % self.slots
        self.k_bnsd[row, :, slot], self.v_bnsd[row, :, slot] = k, v
        visible = torch.arange(self.slots, device=q.device) <= step.positions_b[:, None]
        o_bnsd = _attention(q[:, :, None], self.k_bnsd, self.v_bnsd, visible[:, None, None], self._scale)
        gate_1bw = None if gate_b1w is None else gate_b1w.transpose(0, 1)
        return self.mixer.project(o_bnsd.permute(2, 0, 1, 3).flatten(2), gate_1bw)

    @property
    def _scale(self) -> float:
        scale: float = self.mixer.core_arguments["softmax_scale"]
        return scale

    def reset(self) -> None:
        """Nothing to do: a token sees no slot that its own sequence has not filled."""

    @property
    def nbytes(self) -> int:
        return self.k_bnsd.nbytes + self.v_bnsd.nbytes


class WindowCache(KeyValueCache):
    """Keys and values of the last `slots` tokens, the window."""

    def _with_past(self, k: torch.Tensor, v: torch.Tensor, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        past = torch.arange(max(0, chunk.start - self.slots + 1), chunk.start, device=k.device) % self.slots
        ends_b = chunk.start + chunk.lengths_b
        slot = torch.arange(self.slots, device=k.device)
        # position of the newest token of each sequence that belongs into a slot
        newest_bs = ends_b[:, None] - 1 - (ends_b[:, None] - 1 - slot) % self.slots
        at_bs = newest_bs - chunk.start
        results = []
        for cache, new in ((self.k_bnsd, k), (self.v_bnsd, v)):
            results.append(torch.cat((cache[:, :, past], new), 2))
            index = at_bs.clamp(min=0)[:, None, :, None].expand_as(cache)
            cache.copy_(torch.where((at_bs >= 0)[:, None, :, None], new.gather(2, index), cache))
        return results[0], results[1]

    def _mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
        return (behind >= 0) & (behind < self.slots)


def attend_chunk(
    q_bnsd: torch.Tensor, k_bnsd: torch.Tensor, v_bnsd: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attend to earlier tokens and to the chunk. None as the mask: causal."""
    if mask is not None:
        return _attention(q_bnsd, k_bnsd, v_bnsd, mask, scale)
    groups = q_bnsd.shape[1] // k_bnsd.shape[1]
    if groups > 1:  # torch's lower-right causal attention knows no groups
        k_bnsd, v_bnsd = (t.repeat_interleave(groups, 1) for t in (k_bnsd, v_bnsd))
    causal = causal_lower_right(q_bnsd.shape[2], k_bnsd.shape[2])
    return F.scaled_dot_product_attention(q_bnsd, k_bnsd, v_bnsd, attn_mask=causal, scale=scale)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
