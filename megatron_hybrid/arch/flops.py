"""Parameters and training FLOPs by part of the model: the one count that trainer and planner use.

True sizes: dummy heads and vocabulary padding, which a layout may add, are not counted.
"""

from functools import lru_cache

from megatron_hybrid.arch.layer import BEFORE_LAYERS, layer_parameters, outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.registry import mixer_spec

TRAINING_PER_FORWARD = 3
"""For each GEMM of the forward pass, the backward pass computes two: the gradients of input and weight."""


FP8_LAYER_SPEEDUP = 1.5
"""How much faster a layer is with FP8 linears, on H200s. The output layer stays in bf16."""


def layer_size(model: ModelConfig, symbol: str) -> int:
    """Return the parameters of one layer of a block that the model has: mixer, MLP and norms."""
    return sum(parameter.numel for parameter in layer_parameters(model, model.known_blocks[symbol]))


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Return the parameters of each part: `embedding`, `embedding_norm` if there is one, symbols of blocks, `final_norm`, `output`.

    Tied embeddings are counted once, as the embedding.
    """
    outer = {name: parameter.numel for name, parameter in outer_parameters(model).items()}
    layers = {symbol: model.layers.count(symbol) * layer_size(model, symbol) for symbol in model.blocks_by_symbol}
    return {
        **{name: count for name, count in outer.items() if name in BEFORE_LAYERS},
        **layers,
        "final_norm": outer["final_norm"],
        "output": outer.get("output", 0),
    }


def count_parameters(model: ModelConfig) -> int:
    """Return all parameters: 7,430,870,688 for OLMo Hybrid 7B."""
    return sum(parameters_by_part(model).values())


def layer_training_flops(model: ModelConfig, symbol: str, sequence_length: int) -> int:
    """Return the FLOPs per token of training one layer, forward and backward.

    They are its GEMMs and what its mixer adds: attention over the tokens seen (causal: half the sequence on average), or the
    recurrence. Norms, convolutions, gates and recomputation are not counted, as is usual for MFU.

    Args:
        sequence_length: tokens of a sequence, or the attended length of documents (arch/documents.py).
    """
    block = model.known_blocks[symbol]
    gemms = 2 * sum(parameter.numel for parameter in layer_parameters(model, block) if parameter.is_gemm)
    return TRAINING_PER_FORWARD * (gemms + mixer_spec(block.mixer).flops(model, block, sequence_length))


def training_flops_by_part(model: ModelConfig, sequence_length: int) -> dict[str, int]:
    """Return the FLOPs per token of training each part. Those of the embedding and of norms are not counted."""
    layers = {
        symbol: model.layers.count(symbol) * layer_training_flops(model, symbol, sequence_length)
        for symbol in model.blocks_by_symbol
    }
    return {**layers, "output": TRAINING_PER_FORWARD * 2 * model.vocab_size * model.hidden_size}


def training_flops_per_token(model: ModelConfig, sequence_length: int) -> int:
    """Return the FLOPs of training on one token: 44.1e9 for OLMo Hybrid 7B at 8192."""
    return sum(training_flops_by_part(model, sequence_length).values())


@lru_cache(maxsize=64)
def output_in_layers(model: ModelConfig, fp8: bool) -> float:
    """Return the time of output layer and loss in units of a layer's, estimated from the sizes of their GEMMs.

    1.8 for OLMo Hybrid 7B in bf16 and 2.8 in FP8. Measured on H200s: 1.6 and 2.4.
    """
    parameters = [
        parameter for symbol in model.layers for parameter in layer_parameters(model, model.known_blocks[symbol])
    ]
    layer = sum(parameter.numel for parameter in parameters if parameter.is_gemm) / model.num_layers
    return model.vocab_size * model.hidden_size / layer * (FP8_LAYER_SPEEDUP if fp8 else 1.0)
