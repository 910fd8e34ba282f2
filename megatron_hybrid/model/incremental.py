"""A model that continues sequences: every layer's cache, and the layers run on the tokens that are new.

Training never comes here. The layers are those of the trained network; only their mixers are run through caches
(mixers/cache.py), and the residual connections are written out.

Suffixes of tensor names: b sequences, s tokens of a chunk, n tokens of any kind, h hidden size, v vocabulary.
"""

from importlib import import_module
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from megatron_hybrid.arch.packing import round_up
from megatron_hybrid.arch.registry import mixer_spec
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import has_cuda, local_device
from megatron_hybrid.mixers.cache import CHUNK_MULTIPLE, Chunk, MixerCache, Step
from megatron_hybrid.model.hybrid_model import HybridLanguageModel


class IncrementalModel:
    """A batch of sequences in a network on this tensor parallel rank.

    Prompts are given in chunks to `extend`, padded on the right. Then `step` adds one token per sequence at a time.

    Args:
        network: in one stage, without context or sequence parallelism.
        capacity: longest sequence, prompt and continuation together.

    Raises:
        UserError: a mixer that cannot generate text, or a layout that inference does not support.
    """

    def __init__(self, network: HybridLanguageModel, batch_size: int, capacity: int) -> None:
        _check(network)
        self.network, self.batch_size = network, batch_size
        self.capacity = round_up(capacity, CHUNK_MULTIPLE)
        self.layers: list[Any] = list(network.decoder.layers)
        self.caches = [_make_cache(network, layer, batch_size, self.capacity) for layer in self.layers]
        self.angles = network.rotary_angles(self.capacity, None)
        self.start = 0
        self.lengths_b = torch.zeros(batch_size, dtype=torch.long, device=local_device())

    @torch.no_grad()
    def extend(self, tokens_bs: torch.Tensor, lengths_b: torch.Tensor) -> torch.Tensor:
        """Run the next chunk of all prompts and return the last hidden states [s, b, h].

        Args:
            tokens_bs: the number of tokens is a multiple of CHUNK_MULTIPLE. Padding on the right is any token.
            lengths_b: tokens that are not padding. A sequence that ends in a chunk has none in later ones.
        """
        end = self.start + tokens_bs.shape[1]
        assert tokens_bs.shape[1] % CHUNK_MULTIPLE == 0 and end <= self.capacity
        chunk = Chunk(self.start, lengths_b, self._angles(slice(self.start, end)))
        x_sbh = self._embed(tokens_bs)
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x_sbh = x_sbh + cache.extend(layer.input_layernorm(x_sbh), chunk)
            x_sbh = _add_mlp(layer, x_sbh)
        self.start = end
        self.lengths_b += lengths_b
        return self._final_norm(x_sbh)

    @torch.no_grad()
    def step(self, tokens_b: torch.Tensor) -> torch.Tensor:
        """Add a token to every sequence and return the logits [b, v] of the next one."""
        step = Step(self.lengths_b, self._angles(self.lengths_b))
        x_1bh = self._embed(tokens_b[:, None])
        for layer, cache in zip(self.layers, self.caches, strict=True):
            x_1bh = x_1bh + cache.step(layer.input_layernorm(x_1bh), step)
            x_1bh = _add_mlp(layer, x_1bh)
        self.lengths_b += 1
        return self.logits(self._final_norm(x_1bh)[0])

    @torch.no_grad()
    def logits(self, x_nh: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, v] of hidden states, in fp32, on all tensor parallel ranks."""
        network = self.network
        weight = network.shared_embedding_or_output_weight() if network.model.tie_embeddings else None
        part_1nv, _ = network.output_layer(x_nh[None], weight=weight)
        whole_1nv = gather_from_tensor_model_parallel_region(part_1nv, group=network.pg_collection.tp)
        return whole_1nv[0, :, : network.model.vocab_size].float()

    def reset(self) -> None:
        """Forget all sequences."""
        self.start = 0
        self.lengths_b.zero_()
        for cache in self.caches:
            cache.reset()

    @property
    def cache_bytes(self) -> int:
        """Size of all caches on this rank."""
        return sum(cache.nbytes for cache in self.caches)

    def _angles(self, positions: slice | torch.Tensor) -> torch.Tensor | None:
        if self.angles is None:
            return None
        return self.angles[positions] if self.angles.dim() == 4 else self.angles[:, positions]

    def _embed(self, tokens_bs: torch.Tensor) -> torch.Tensor:
        return self.network.embedding(input_ids=tokens_bs, position_ids=None)

    def _final_norm(self, x_sbh: torch.Tensor) -> torch.Tensor:
        return self.network.decoder.final_norm(x_sbh)


def _add_mlp(layer: Any, x_sbh: torch.Tensor) -> torch.Tensor:
    y_sbh, _ = layer.mlp(layer.pre_mlp_layernorm(x_sbh))
    return x_sbh + y_sbh


def _check(network: HybridLanguageModel) -> None:
    config = network.config
    if network.training:
        raise UserError("network: it is in training mode; call eval() first")
    if config.sequence_parallel or not (network.pre_process and network.post_process):
        raise UserError("network: inference needs the whole model in one stage, without sequence parallelism")
    model = network.model
    for symbol, block in model.blocks_by_symbol.items():
        if not mixer_spec(block.mixer).has_cache:
            raise UserError(
                f"{block.title} (layer_pattern's {symbol}) cannot generate text: its folder has no cache.py; add one "
                "and set has_cache in its spec (docs/development/extending.md)"
            )


def _make_cache(network: HybridLanguageModel, layer: Any, batch_size: int, capacity: int) -> MixerCache:
    model = network.model
    spec = mixer_spec(model.known_blocks[model.layers[layer.layer_number - 1]].mixer)
    cache: MixerCache = import_module(spec.cache).make_cache(layer.self_attention, batch_size, capacity)
    return cache


class GraphedStep:
    """`IncrementalModel.step` as one CUDA graph, so that a step takes one launch of the host. It resets the model.

    A graph replays kernels with the addresses that they had when it was captured. Everything that changes between steps is in
    tensors that keep their address: tokens, lengths and caches. Which keys a token sees is computed from the lengths.

    Raises:
        UserError: no CUDA device, or tensor parallelism, whose collectives are not captured.
    """

    def __init__(self, model: IncrementalModel) -> None:
        if not has_cuda() or model.network.pg_collection.tp.size() > 1:
            raise UserError("cuda_graph: it needs a CUDA device and tensor_parallel_size 1; set it to false")
        self.tokens_b = torch.zeros(model.batch_size, dtype=torch.long, device=local_device())
        self.model, self.graph = model, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and workspaces allocated before the capture
                model.step(self.tokens_b)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.logits_bv = model.step(self.tokens_b)
        model.reset()

    def __call__(self, tokens_b: torch.Tensor) -> torch.Tensor:
        """See `IncrementalModel.step`. The next call overwrites the result."""
        self.tokens_b.copy_(tokens_b)
        self.graph.replay()
        return self.logits_bv
