"""The pieces of every parameter of this rank's model chunks, by the names that the chunks give them."""

from collections.abc import Iterator

import torch

from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.padding import PaddedSizes
from megatron_hybrid.arch.tensors import model_tensors
from megatron_hybrid.mixers.tensor_slices import Piece, TensorSlices, attention_pieces, gdn_pieces

__all__ = ["ParamLayout", "Piece"]


class ParamLayout:
    """Pieces of every parameter of this rank's model chunks.

    Args:
        model: the true sizes.
        rank, ranks: of this rank in the tensor parallel group, and the group's size.
    """

    def __init__(self, model: ModelConfig, rank: int, ranks: int):
        self.model, self.rank, self.ranks = model, rank, ranks
        self.tensors = model_tensors(model)
        self.sizes, self.slices = PaddedSizes.of(model, ranks), TensorSlices(self.tensors, rank, ranks)

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

    # Each method below is a table: the parameter's name, and the tensors that it packs.

    def _outside_layers(self, name: str) -> list[Piece]:
        vocab = self.sizes.vocab_size
        output = "embedding.weight" if self.model.tie_embeddings else "output.weight"
        table = {
            "embedding.word_embeddings.weight": lambda: self.slices.stacked(("embedding.weight", vocab)),
            "output_layer.weight": lambda: self.slices.stacked((output, vocab)),
            "decoder.final_norm.weight": lambda: self.slices.replicated("final_norm.weight"),
        }
        return table[name]()

    def _mlp(self, prefix: str, rest: str) -> list[Piece]:
        ffn, mlp = self.model.ffn_hidden_size, f"{prefix}.mlp"
        table = {
            "mlp.linear_fc1.weight": lambda: self.slices.stacked(
                (f"{mlp}.gate_proj.weight", ffn), (f"{mlp}.up_proj.weight", ffn)
            ),
            "mlp.linear_fc1.layer_norm_weight": lambda: self.slices.replicated(f"{prefix}.mlp_norm.weight"),
            "mlp.linear_fc2.weight": lambda: self.slices.columns(f"{mlp}.down_proj.weight", ffn),
            "mlp.linear_fc2.linear.weight": lambda: self.slices.columns(f"{mlp}.down_proj.weight", ffn),
            "mlp.linear_fc2.norm.weight": lambda: self.slices.replicated(f"{prefix}.mlp_norm.weight"),
        }
        return table[rest]()

    def _gdn(self, prefix: str, rest: str) -> list[Piece]:
        mixer = gdn_pieces(self.slices, self.model.gdn, f"{prefix}.gdn")
        table = {f"self_attention.{name}": pieces for name, pieces in mixer.items()} | {
            "self_attention.in_proj.layer_norm_weight": self.slices.replicated(f"{prefix}.mixer_norm.weight"),
            "input_layernorm.weight": self.slices.replicated(f"{prefix}.mixer_norm.weight"),
            "pre_mlp_layernorm.weight": self.slices.replicated(f"{prefix}.mlp_norm.weight"),
        }
        return table[rest]

    def _attention(self, prefix: str, rest: str) -> list[Piece]:
        model = self.model
        sizes = (model.num_attention_heads, model.kv_heads, model.attention_head_dim)
        mixer = attention_pieces(self.slices, *sizes, f"{prefix}.attention")
        table = {f"self_attention.{name}": pieces for name, pieces in mixer.items()} | {
            "self_attention.linear_proj.norm.weight": self.slices.replicated(f"{prefix}.mixer_norm.weight")
        }
        return table[rest]
