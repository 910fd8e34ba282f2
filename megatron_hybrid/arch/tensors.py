"""The model's true tensors: every weight by name, shape and kind, before any layout splits, packs or pads it.

Initial weights, checkpoints, converters and parameter counts all speak of these names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from megatron_hybrid.arch.model import GatedDeltaNetConfig, ModelConfig

TensorKind = Literal["embedding", "output", "matrix", "conv", "norm", "A_log", "dt_bias"]


@dataclass(frozen=True)
class TensorSpec:
    """One weight. `shape` is [out, in] for matrices, [channels, taps] for convolutions."""

    name: str
    shape: tuple[int, ...]
    kind: TensorKind

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def always_fp32(self) -> bool:
        """A_log and dt_bias: half precision would move the decay rates (Megatron-LM issue 3634)."""
        return self.kind in ("A_log", "dt_bias")


def gdn_tensors(gdn: GatedDeltaNetConfig, h: int, prefix: str) -> Iterator[TensorSpec]:
    """The weights of one Gated DeltaNet mixer in a model of hidden size `h`."""
    key, value, heads = gdn.key_dim, gdn.value_dim, gdn.num_value_heads
    for name, width in (("q", key), ("k", key), ("v", value), ("gate", value), ("b", heads), ("a", heads)):
        yield TensorSpec(f"{prefix}.{name}_proj.weight", (width, h), "matrix")
    for name, width in (("q", key), ("k", key), ("v", value)):
        yield TensorSpec(f"{prefix}.{name}_conv.weight", (width, gdn.conv_kernel_size), "conv")
    yield TensorSpec(f"{prefix}.A_log", (heads,), "A_log")
    yield TensorSpec(f"{prefix}.dt_bias", (heads,), "dt_bias")
    yield TensorSpec(f"{prefix}.o_norm.weight", (gdn.value_head_dim,), "norm")
    yield TensorSpec(f"{prefix}.o_proj.weight", (h, value), "matrix")


def attention_tensors(heads: int, groups: int, d: int, h: int, prefix: str) -> Iterator[TensorSpec]:
    """The weights of one attention mixer of `heads` query heads and `groups` key/value heads, `d` wide, at hidden size `h`."""
    q, kv = heads * d, groups * d
    for name, width in (("q", q), ("k", kv), ("v", kv)):
        yield TensorSpec(f"{prefix}.{name}_proj.weight", (width, h), "matrix")
    yield TensorSpec(f"{prefix}.q_norm.weight", (q,), "norm")
    yield TensorSpec(f"{prefix}.k_norm.weight", (kv,), "norm")
    yield TensorSpec(f"{prefix}.o_proj.weight", (h, q), "matrix")


def layer_tensors(model: ModelConfig, index: int) -> Iterator[TensorSpec]:
    """The weights of layer `index` (from 0): mixer, MLP, and a norm for each."""
    h, f, prefix = model.hidden_size, model.ffn_hidden_size, f"layers.{index}"
    if model.layers[index] == "G":
        assert model.gdn is not None
        yield from gdn_tensors(model.gdn, h, f"{prefix}.gdn")
    else:
        d, prefix_of_mixer = model.attention_head_dim, f"{prefix}.attention"
        yield from attention_tensors(model.num_attention_heads, model.kv_heads, d, h, prefix_of_mixer)
    yield TensorSpec(f"{prefix}.mixer_norm.weight", (h,), "norm")
    yield TensorSpec(f"{prefix}.mlp.gate_proj.weight", (f, h), "matrix")
    yield TensorSpec(f"{prefix}.mlp.up_proj.weight", (f, h), "matrix")
    yield TensorSpec(f"{prefix}.mlp.down_proj.weight", (h, f), "matrix")
    yield TensorSpec(f"{prefix}.mlp_norm.weight", (h,), "norm")


def model_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """Every weight of the model by name, first layer to last. Tied embeddings have no `output.weight`."""
    h, vocab = model.hidden_size, model.vocab_size
    tensors = [TensorSpec("embedding.weight", (vocab, h), "embedding")]
    for index in range(model.num_layers):
        tensors += layer_tensors(model, index)
    tensors.append(TensorSpec("final_norm.weight", (h,), "norm"))
    if not model.tie_embeddings:
        tensors.append(TensorSpec("output.weight", (vocab, h), "output"))
    return {t.name: t for t in tensors}
