"""Names of Kimi Delta Attention's tensors in Hugging Face's `kimi_linear`, both ways, bit for bit.

Kimi Linear as a whole has MLA and a mixture of experts, which this project lacks, so there is no architecture in convert/hf. Names
are relative to the mixer: `self_attn.` theirs, `kda.` ours. Checkpoints and exports use CHECKPOINT's names. transformers renames
some tensors and joins the convolutions while it loads them (transformers 5.23, conversion_mapping.py); both forms are read.
"""

from collections.abc import Mapping

import torch

_EQUAL = (*(f"{name}_proj.weight" for name in ("q", "k", "v", "f_a", "f_b", "g_a", "g_b", "b", "o")), "o_norm.weight")
CHECKPOINT = {
    **{name: name for name in (*_EQUAL, "A_log", "dt_bias")},
    **{f"{name}_conv.weight": f"{name}_conv1d.weight" for name in "qkv"},
}
"""Our name -> their name."""
_FORGET_GATE = "forget_gate."
_JOINED = "conv1d.weight"


def to_hugging_face(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one mixer's true tensors under their names and in their shapes."""
    return {theirs: _their_shape(ours, tensors[ours]) for ours, theirs in CHECKPOINT.items()}


def from_hugging_face(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one mixer's true tensors under our names, from a checkpoint's or from those of a model of transformers."""
    given = {name.removeprefix(_FORGET_GATE): tensor for name, tensor in tensors.items()}
    if _JOINED in given:
        rows = [len(given[f"{name}_proj.weight"]) for name in "qkv"]
        parts = given.pop(_JOINED).split(rows)
        given |= {f"{name}_conv1d.weight": part for name, part in zip("qkv", parts, strict=True)}
    return {ours: _our_shape(ours, given[theirs]) for ours, theirs in CHECKPOINT.items()}


def _their_shape(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    if ours.endswith("_conv.weight"):
        return tensor.unsqueeze(1)
    return tensor.view(1, 1, -1, 1) if ours == "A_log" else tensor


def _our_shape(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    if ours.endswith("_conv.weight"):
        return tensor.squeeze(1)
    return tensor.flatten() if ours == "A_log" else tensor
