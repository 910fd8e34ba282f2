"""Scales and amax histories of delayed scaling, as plain tensors for checkpoints.

All data and tensor parallel ranks of a stage reduce their amax values together, so they hold the same state. It belongs to
a layer, not to a layout.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_hybrid.arch.fp8_recipes import FP8_RECIPES

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_VALUES = ("scale", "amax_history")
_FORWARD_TENSORS = 3
"""Tensors of a GEMM in the forward pass: input, weight, output."""


class Fp8State:
    """FP8 state of a rank's model chunks. Empty if no part uses delayed scaling.

    Tensor names are `fp8/layers.LAYER.MODULE/DIRECTION.VALUE`.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self.chunks = chunks

    def _modules(self) -> Iterator[tuple[str, Any]]:
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                for name, module in layer.named_modules():
                    if hasattr(module, "fp8_meta"):
                        yield f"fp8/layers.{layer.layer_number - 1}.{name}", module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return every state tensor by name, not copied. Empty before the first step."""
        state = {}
        for name, module in self._modules():
            for direction in _DIRECTIONS:
                holder = module.fp8_meta.get(direction)
                for value in _VALUES:
                    if hasattr(holder, "amax_history"):
                        state[f"{name}/{direction}.{value}"] = getattr(holder, value)
        return state

    @torch.no_grad()
    def restore(self, saved: Callable[[str], torch.Tensor | None]) -> None:
        """Restore saved state before the first step.

        Args:
            saved: returns a tensor by name; None if the checkpoint does not have it, because its run used another recipe.
                The scales of that module then start from their initial values.
        """
        for name, module in self._modules():
            recipe = getattr(module, "recipe", None) or self._gemm_recipe()
            scale = saved(f"{name}/{_DIRECTIONS[0]}.scale")
            if recipe is None or scale is None:
                continue
            module.fp8_meta["num_gemms"] = scale.numel() // _FORWARD_TENSORS
            module.fp8_meta["recipe"] = recipe
            module.init_fp8_meta_tensors(recipe)
            for direction in _DIRECTIONS:
                for value in _VALUES:
                    target = getattr(module.fp8_meta[direction], value)
                    source = saved(f"{name}/{direction}.{value}")
                    if source is None or source.shape != target.shape:  # precision.fp8_amax_history_len has changed
                        continue
                    target.copy_(source)

    def _gemm_recipe(self) -> Any:
        config = self.chunks[0].config
        if not config.fp8 or not FP8_RECIPES[config.fp8_recipe].scales_from_past_steps:
            return None
        from megatron.core.fp8_utils import get_fp8_recipe

        return get_fp8_recipe(config)
