"""Parameters that `train.optimizer.no_decay` exempts from weight decay."""

from collections.abc import Sequence

import torch

from megatron_hybrid.model.param_layout import ParamLayout

_DECAY_GROUPS = {"embedding": "embedding", "norm": "norm", "A_log": "gdn_scalars", "dt_bias": "gdn_scalars"}


def exempt_from_decay(
    layout: ParamLayout, chunks: Sequence[torch.nn.Module], no_decay: set[str]
) -> set[torch.nn.Parameter]:
    """Return the parameters of the groups `no_decay`, the same on every tensor parallel rank."""
    first = ParamLayout(
        layout.model, 0, layout.ranks
    )  # on another rank a parameter may be padding only, without pieces
    return {
        parameter
        for _, parameter, pieces in first.parameters(chunks)
        if _DECAY_GROUPS.get(pieces[0].tensor.kind) in no_decay
    }
