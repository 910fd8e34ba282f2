"""Inference with the leaky average: its state is one value per channel."""

import torch
import torch.nn.functional as F

from megatron_hybrid.mixers.cache import MixerCache


def make_cache(mixer, batch_size, capacity):
    return LeakyCache(mixer, batch_size)


class LeakyCache(MixerCache):
    """State of one layer's sequences, on this rank's heads."""

    def __init__(self, mixer, batch_size):
        self.mixer = mixer
        self.decay = torch.sigmoid(mixer.decay.detach()).repeat_interleave(mixer.head_dim)
        self.state = torch.zeros(batch_size, len(self.decay))

    def extend(self, x_sbh, chunk):
        x, gate = self.mixer.in_proj(x_sbh)[0].chunk(2, dim=-1)
        outputs = []
        for position, token in enumerate(x):
            new = self.decay * self.state + (1 - self.decay) * token
            self.state = torch.where((position < chunk.lengths_b)[:, None], new, self.state)
            outputs.append(self.state)
        return self.mixer.out_proj(torch.stack(outputs) * F.silu(gate))[0]

    def step(self, x_1bh, step):
        x, gate = self.mixer.in_proj(x_1bh)[0].chunk(2, dim=-1)
        self.state = self.decay * self.state + (1 - self.decay) * x[0]
        return self.mixer.out_proj(self.state[None] * F.silu(gate))[0]

    def reset(self):
        self.state.zero_()

    @property
    def nbytes(self):
        return self.state.nbytes
