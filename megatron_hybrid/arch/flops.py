"""Parameters and training FLOPs, by layer kind: the one count that trainer and planner use.

True sizes (`tensors.py`): dummy heads and vocabulary padding, which a layout may add, are not counted.
"""

from collections.abc import Iterable
from typing import Literal

from megatron_hybrid.arch.model import LayerKind, ModelConfig
from megatron_hybrid.arch.tensors import TensorSpec, layer_tensors

Part = Literal["embedding", "G", "A", "W", "final_norm", "output"]
"""A part of the model: what is outside the layers, or all layers of a kind."""

TRAINING_PER_FORWARD = 3
"""The backward pass computes two products for each of the forward's: by the input and by the weight."""


def layer_parameters(model: ModelConfig, kind: LayerKind) -> int:
    """Of one layer of a kind that the model has: mixer, MLP and two norms."""
    return _size(_tensors(model, kind))


def parameters_by_part(model: ModelConfig) -> dict[Part, int]:
    """Parameters of each part that the model has. Tied embeddings are counted once, as the embedding."""
    table = model.vocab_size * model.hidden_size
    parts: dict[Part, int] = {"embedding": table}
    for kind in _kinds(model):
        parts[kind] = model.layers.count(kind) * layer_parameters(model, kind)
    return {**parts, "final_norm": model.hidden_size, "output": 0 if model.tie_embeddings else table}


def count_parameters(model: ModelConfig) -> int:
    """All parameters: 7,430,870,688 for OLMo Hybrid 7B."""
    return sum(parameters_by_part(model).values())


def layer_training_flops(model: ModelConfig, kind: LayerKind, sequence_length: int) -> int:
    """FLOPs a token that training one layer of a kind takes, forward and backward.

    Matrix products, attention over the tokens seen (causal: half the sequence on average) and the delta rule in its
    recurrent form (8 a state entry: decay, read, write, read out). Norms, convolutions, gates and recomputation are not
    counted, as is usual for MFU.
    """
    matrices = 2 * _size(tensor for tensor in _tensors(model, kind) if tensor.kind == "matrix")
    if kind == "G":
        assert model.gdn is not None, "validated: a model with G layers has gdn"
        mixer = 8 * model.gdn.num_value_heads * model.gdn.key_head_dim * model.gdn.value_head_dim
    else:
        window = model.sliding_window if kind == "W" else None
        mixer = _attention_flops(model, sequence_length, min(window or sequence_length, sequence_length))
    return TRAINING_PER_FORWARD * (matrices + mixer)


def training_flops_by_part(model: ModelConfig, sequence_length: int) -> dict[Part, int]:
    """FLOPs a token that training each part takes; the embedding and the norms take none that count."""
    parts: dict[Part, int] = {}
    for kind in _kinds(model):
        parts[kind] = model.layers.count(kind) * layer_training_flops(model, kind, sequence_length)
    return {**parts, "output": TRAINING_PER_FORWARD * 2 * model.vocab_size * model.hidden_size}


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """FLOPs that training on one token takes: 44.1e9 for OLMo Hybrid 7B at 8192."""
    return sum(training_flops_by_part(model, sequence_length).values())


def _kinds(model: ModelConfig) -> list[LayerKind]:
    """The kinds of layers there are, in the order of their first one."""
    return list(dict.fromkeys(model.layers))


def _tensors(model: ModelConfig, kind: LayerKind) -> Iterable[TensorSpec]:
    return layer_tensors(model, model.layers.index(kind))


def _size(tensors: Iterable[TensorSpec]) -> int:
    return sum(tensor.numel for tensor in tensors)


def _attention_flops(model: ModelConfig, sequence: int, window: int) -> int:
    """Scores and weighted values: 4 a channel of q and token seen. A window of the causal sequence shows
    window - window^2 / (2 sequence) tokens on average, half the sequence where the window is all of it."""
    q = model.num_attention_heads * model.attention_head_dim
    return 2 * q * window * (2 * sequence - window) // sequence
