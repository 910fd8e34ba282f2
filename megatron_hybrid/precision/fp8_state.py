"""The scales and histories that delayed scaling carries from step to step, as plain tensors for checkpoints.

The data and tensor parallel ranks of a stage take the largest values together, so all of them hold the same: the state
belongs to a layer, not to a layout.
"""

from collections.abc import Callable, Iterator

import torch

_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_VALUES = ("scale", "amax_history")
_FORWARD_TENSORS = 3
"""Of a matrix product: input, weight, output."""


class Fp8State:
    """FP8 state of a rank's model chunks. Empty where no part is scaled from past steps.

    Tensor names are `fp8/layers.LAYER.MODULE/DIRECTION.VALUE`.
    """

    def __init__(self, chunks):
        self.chunks = chunks

    def _modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        for chunk in self.chunks:
            for layer in chunk.decoder.layers:
                for name, module in layer.named_modules():
                    if hasattr(module, "fp8_meta"):
                        yield f"fp8/layers.{layer.layer_number - 1}.{name}", module

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every state tensor by name, live. Empty before the first step."""
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
        """Take over what was saved, before the first step.

        Args:
            saved: a tensor by name; None where the checkpoint has none (its run had another format): scales start anew.
        """
        for name, module in self._modules():
            recipe = getattr(module, "recipe", None) or self._linear_recipe()
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

    def _linear_recipe(self):
        config = self.chunks[0].config
        if config.fp8_recipe != "delayed" or not config.fp8:
            return None
        from megatron.core.fp8_utils import get_fp8_recipe

        return get_fp8_recipe(config)
