"""The model's true tensors by name, before any layout splits, packs or pads them.

Initial weights, checkpoints, converters and parameter counts use these names.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_hybrid.arch.layer import BEFORE_LAYERS, layer_parameters, outer_parameters
from megatron_hybrid.arch.model import ModelConfig
from megatron_hybrid.arch.packing import PackedParameter, TensorSpec

__all__ = ["TensorSpec", "layer_tensors", "model_parameters", "model_tensors"]


def layer_tensors(model: ModelConfig, index: int) -> Iterator[TensorSpec]:
    """Yield the tensors of layer `index` (from 0): mixer, MLP, and a norm for each."""
    for parameter in layer_parameters(model, model.block(index)):
        for tensor in parameter.tensors:
            yield replace(tensor, name=f"layers.{index}.{tensor.name}")


def model_parameters(model: ModelConfig) -> Iterator[PackedParameter]:
    """Yield the parameters of the whole model, those outside the layers first. Names of tensors are those of `model_tensors`."""
    yield from outer_parameters(model).values()
    for index in range(model.num_layers):
        for parameter in layer_parameters(model, model.block(index)):
            yield parameter.placed(f"decoder.layers.{index}", f"layers.{index}")


def model_tensors(model: ModelConfig) -> dict[str, TensorSpec]:
    """Return every tensor of the model by name, first layer to last. Tied embeddings have no `output.weight`."""
    outer = {name: parameter.tensors for name, parameter in outer_parameters(model).items()}
    first = (tensor for name, tensors in outer.items() if name in BEFORE_LAYERS for tensor in tensors)
    layers = (tensor for index in range(model.num_layers) for tensor in layer_tensors(model, index))
    last = (tensor for name, tensors in outer.items() if name not in BEFORE_LAYERS for tensor in tensors)
    return {tensor.name: tensor for tensor in (*first, *layers, *last)}
