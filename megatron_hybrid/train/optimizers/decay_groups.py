"""Parameters that `train.optimizer.no_decay` exempts from weight decay."""

from collections.abc import Sequence

import torch

from megatron_hybrid.model.param_layout import ParamLayout


def exempt_from_decay(
    layout: ParamLayout, chunks: Sequence[torch.nn.Module], no_decay: set[str]
) -> set[torch.nn.Parameter]:
    """Return the parameters of the groups `no_decay`, the same on every tensor parallel rank."""
    # on other ranks a parameter may consist of padding only, without pieces
    first = ParamLayout(layout.model, 0, layout.ranks)
    return {parameter for _, parameter, slices in first.parameters(chunks) if slices[0].tensor.decay_group in no_decay}
