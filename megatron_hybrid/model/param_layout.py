"""How a rank's parameters relate to the model's true tensors (config/tensors.py).

A parameter on a rank may pack several tensors (`[q | k | v | gate | b | a]`), hold a slice of each, and carry padding
that belongs to none. Its pieces say so; initial weights, checkpoints and converters read nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_hybrid.config.model import ModelConfig
from megatron_hybrid.config.padding import PaddedSizes, true_part
from megatron_hybrid.config.tensors import TensorSpec, model_tensors


@dataclass(frozen=True)
class Piece:
    """A box of a true tensor and where it lies in a parameter of this rank. All in elements, one entry a dimension."""

    tensor: TensorSpec
    offset: tuple[int, ...]
    """Of the box in the true tensor."""
    shape: tuple[int, ...]
    local_offset: tuple[int, ...]
    """Of the box in the parameter."""
    replicated: bool = False
    """Every tensor parallel rank holds this whole tensor."""

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """The box as a view of the parameter, or of anything of its shape."""
        for dim, (start, length) in enumerate(zip(self.local_offset, self.shape, strict=True)):
            parameter = parameter.narrow(dim, start, length)
        return parameter


class ParamLayout:
    """Pieces of every parameter of this rank's model chunks.

    Args:
        model: the true sizes.
        rank, ranks: of this rank in the tensor parallel group, and the group's size.
    """

    def __init__(self, model: ModelConfig, rank: int, ranks: int):
        self.model, self.rank, self.ranks = model, rank, ranks
        self.tensors = model_tensors(model)
        self.sizes = PaddedSizes.of(model, ranks)

    def parameters(self, chunks) -> Iterator[tuple[str, torch.nn.Parameter, list[Piece]]]:
        """(name, parameter, pieces) of every parameter; name is unique over the chunks and the same under every layout
        of pipeline stages. A tied output projection on the last stage has the embedding's pieces."""
        for chunk in chunks:
            offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
            for name, parameter in chunk.named_parameters():
                yield self._global_name(name, offset), parameter, self.pieces(name, offset)

    @staticmethod
    def _global_name(name: str, layer_offset: int) -> str:
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(int(parts[2]) + layer_offset)
        return ".".join(parts)

    def pieces(self, name: str, layer_offset: int) -> list[Piece]:
        """Pieces of the parameter `name` of a chunk whose first layer is `layer_offset`."""
        parts = name.split(".")
        if parts[:2] != ["decoder", "layers"]:
            return self._outside_layers(name)
        prefix, rest = f"layers.{int(parts[2]) + layer_offset}", ".".join(parts[3:])
        kind = self.model.layers[int(parts[2]) + layer_offset]
        if rest.startswith("mlp.linear_fc"):
            return self._mlp(prefix, rest)
        return self._gdn(prefix, rest) if kind == "G" else self._attention(prefix, rest)

    # Each method below is a table: the parameter's name, and the tensors it packs with their padded sizes.

    def _outside_layers(self, name: str) -> list[Piece]:
        vocab = self.sizes.vocab_size
        output = "embedding.weight" if self.model.tie_embeddings else "output.weight"
        table = {
            "embedding.word_embeddings.weight": lambda: self._stacked(("embedding.weight", vocab)),
            "output_layer.weight": lambda: self._stacked((output, vocab)),
            "decoder.final_norm.weight": lambda: self._replicated("final_norm.weight"),
        }
        return table[name]()

    def _mlp(self, prefix: str, rest: str) -> list[Piece]:
        ffn, mlp = self.model.ffn_hidden_size, f"{prefix}.mlp"
        table = {
            "mlp.linear_fc1.weight": lambda: self._stacked(
                (f"{mlp}.gate_proj.weight", ffn), (f"{mlp}.up_proj.weight", ffn)
            ),
            "mlp.linear_fc1.layer_norm_weight": lambda: self._replicated(f"{prefix}.mlp_norm.weight"),
            "mlp.linear_fc2.weight": lambda: self._columns(f"{mlp}.down_proj.weight", ffn),
            "mlp.linear_fc2.linear.weight": lambda: self._columns(f"{mlp}.down_proj.weight", ffn),
            "mlp.linear_fc2.norm.weight": lambda: self._replicated(f"{prefix}.mlp_norm.weight"),
        }
        return table[rest]()

    def _gdn(self, prefix: str, rest: str) -> list[Piece]:
        gdn, sizes, mixer = self.model.gdn, self.sizes, f"{prefix}.gdn"
        heads = sizes.gdn_value_heads
        key, value = sizes.gdn_key_heads * gdn.key_head_dim, heads * gdn.value_head_dim
        packed = (("q", key), ("k", key), ("v", value), ("gate", value), ("b", heads), ("a", heads))
        table = {
            "self_attention.in_proj.layer_norm_weight": lambda: self._replicated(f"{prefix}.mixer_norm.weight"),
            "self_attention.in_proj.weight": lambda: self._stacked(
                *((f"{mixer}.{n}_proj.weight", w) for n, w in packed)
            ),
            "self_attention.conv_weight": lambda: self._stacked(
                *((f"{mixer}.{n}_conv.weight", w) for n, w in packed[:3])
            ),
            "self_attention.A_log": lambda: self._stacked((f"{mixer}.A_log", heads)),
            "self_attention.dt_bias": lambda: self._stacked((f"{mixer}.dt_bias", heads)),
            "self_attention.o_norm_weight": lambda: self._replicated(f"{mixer}.o_norm.weight"),
            "self_attention.out_proj.weight": lambda: self._columns(f"{mixer}.o_proj.weight", value),
            "input_layernorm.weight": lambda: self._replicated(f"{prefix}.mixer_norm.weight"),
            "pre_mlp_layernorm.weight": lambda: self._replicated(f"{prefix}.mlp_norm.weight"),
        }
        return table[rest]()

    def _attention(self, prefix: str, rest: str) -> list[Piece]:
        d, mixer = self.model.attention_head_dim, f"{prefix}.attention"
        q, kv = self.sizes.num_attention_heads * d, self.sizes.num_key_value_heads * d
        packed = (("q", q), ("k", kv), ("v", kv))
        table = {
            "self_attention.linear_qkv.weight": lambda: self._stacked(
                *((f"{mixer}.{n}_proj.weight", w) for n, w in packed)
            ),
            "self_attention.q_norm_weight": lambda: self._stacked((f"{mixer}.q_norm.weight", q)),
            "self_attention.k_norm_weight": lambda: self._stacked((f"{mixer}.k_norm.weight", kv)),
            "self_attention.linear_proj.linear.weight": lambda: self._columns(f"{mixer}.o_proj.weight", q),
            "self_attention.linear_proj.norm.weight": lambda: self._replicated(f"{prefix}.mixer_norm.weight"),
        }
        return table[rest]()

    def _replicated(self, tensor: str) -> list[Piece]:
        """Every rank holds the whole tensor."""
        spec = self.tensors[tensor]
        zeros = (0,) * len(spec.shape)
        return [Piece(spec, zeros, spec.shape, zeros, replicated=True)]

    def _stacked(self, *tensors: tuple[str, int]) -> list[Piece]:
        """Tensors (name, padded rows) split by rows over the ranks, a rank's parts one after the other."""
        pieces, at = [], 0
        for tensor, padded in tensors:
            spec = self.tensors[tensor]
            start, length = true_part(spec.shape[0], padded, self.rank, self.ranks)
            zeros = (0,) * (len(spec.shape) - 1)
            if length:
                pieces.append(Piece(spec, (start, *zeros), (length, *spec.shape[1:]), (at, *zeros)))
            at += padded // self.ranks
        return pieces

    def _columns(self, tensor: str, padded: int) -> list[Piece]:
        """A matrix split by columns over the ranks."""
        spec = self.tensors[tensor]
        start, length = true_part(spec.shape[1], padded, self.rank, self.ranks)
        return [Piece(spec, (0, start), (spec.shape[0], length), (0, 0))] if length else []
