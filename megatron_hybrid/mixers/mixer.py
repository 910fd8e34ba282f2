"""What both mixers share as modules of any megatron-core model: parameters, initial values, sharded state, and refusals."""

from contextlib import nullcontext

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from megatron_hybrid.arch.model import GatedDeltaNetConfig
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import parameter_device
from megatron_hybrid.mixers.initial_values import draw
from megatron_hybrid.mixers.sharded_state import true_tensors
from megatron_hybrid.mixers.tensor_slices import Piece, Pieces
from megatron_hybrid.precision.fp8_parameters import is_fp8_param


class Mixer(MegatronModule):
    """A mixer whose parameters hold slices of true tensors (mixers/tensor_slices.py).

    A subclass sets `pieces` (this rank's) and `pieces_of_first_rank`, then calls `reset_parameters`.
    """

    pieces: Pieces
    pieces_of_first_rank: Pieces

    def __init__(self, config, layer_number: int, pg_collection: ProcessGroupCollection | None):
        super().__init__(config)
        if config.context_parallel_size > 1:  # this package's own trainer leaves it at 1: its slices are contiguous
            raise UserError(
                f"context_parallel_size: {config.context_parallel_size} is not supported by {type(self).__name__}: megatron-core "
                "splits each sequence into two slices per rank, and this mixer needs one contiguous slice; set it to 1"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.cp_group, self.layer_number = groups.tp, groups.cp, layer_number

    def new_parameter(self, *shape: int, dtype: torch.dtype | None = None, sharded: bool = True) -> torch.nn.Parameter:
        """Return a parameter of zeros; `sharded`: rows of other heads are on other tensor parallel ranks."""
        device, dtype = parameter_device(self.config), dtype or self.config.params_dtype
        parameter = torch.nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))
        if sharded:
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    # ---- initial values

    @torch.no_grad()
    def reset_parameters(self, gdn: GatedDeltaNetConfig | None = None) -> None:
        """Draw this module's own parameters, and zero the padding that the linears have drawn with their weights.

        As megatron-core does: from the CPU's generator with `use_cpu_initialization`, whole tensors of which each rank takes its
        slice, and else from the tensor parallel rank's own generator. Nothing with `perform_initialization` off.
        """
        if not self.config.perform_initialization:
            return
        on_cpu = self.config.use_cpu_initialization
        with nullcontext() if on_cpu else get_cuda_rng_tracker().fork():
            for name, pieces in self.pieces.items():
                parameter = self.get_parameter(name)
                if "." in name:
                    self._zero_padding(name, parameter, pieces)
                    continue
                for piece in pieces:
                    whole = torch.empty(piece.tensor.shape, dtype=torch.float32, device=parameter.device)
                    drawn = draw(whole, piece.tensor.kind, self.config.init_method_std, gdn)
                    piece.view(parameter).copy_(piece.of_true(drawn))

    def _zero_padding(self, name: str, parameter: torch.nn.Parameter, pieces: list[Piece]) -> None:
        if is_fp8_param(parameter):
            if self.has_dummy_heads:
                raise UserError(
                    f"fp8_param: {name} would hold dummy heads in FP8; set it to False, or choose a tensor_model_parallel_size "
                    "that divides the heads"
                )
            return  # what is left are rows that nothing reads
        values = parameter.clone()
        parameter.zero_()
        for piece in pieces:
            piece.view(parameter).copy_(piece.view(values))

    @property
    def has_dummy_heads(self) -> bool:
        """Whether tensor parallelism adds heads that the model does not have, on any rank."""
        raise NotImplementedError

    # ---- checkpoints of megatron-core

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None, tp_group=None):
        """Describe the true tensors to megatron-core: one entry per tensor, without padding, whatever the degree.

        A checkpoint that is saved at one tensor parallel size loads at any other.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = dict(tp_group=tp_group or self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        own: dict = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        rows = {name: 0 for name in own if not self._replicated(name)}
        state = make_sharded_tensors_for_checkpoint(own, prefix, rows, sharded_offsets, **groups)
        for name, module in self.named_children():
            options = dict(metadata=metadata, tp_group=groups["tp_group"])
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, **options))
        for name, pieces in self.pieces.items():
            if not self._replicated(name):
                key, first = f"{prefix}{name}", self.pieces_of_first_rank[name]
                state[key] = true_tensors(state[key], pieces, first, tuple(sharded_offsets))
        return state

    def _replicated(self, name: str) -> bool:
        return self.pieces_of_first_rank[name][0].replicated

    # ---- what TransformerLayer and schedules call

    def backward_dw(self) -> None:
        """Compute the weight gradients that `delay_wgrad_compute` put off."""
        for module in self.children():
            module.backward_dw()

    def refuse(self, **inputs) -> None:
        """Raise UserError, naming the input, if one that this mixer would have to ignore is there."""
        for name, value in inputs.items():
            if value is not None:
                raise UserError(f"{name}: {type(self).__name__} does not support it ({_REASONS[name]}); pass None")

    def check_mask(self, attention_mask: torch.Tensor | None) -> None:
        """Accept no mask, or the causal one.

        Raises:
            UserError: any other mask: this mixer would not obey it.
        """
        if attention_mask is not None and not _is_causal(attention_mask):
            raise UserError(
                f"attention_mask: {type(self).__name__} is causal and obeys no other mask, such as one of padding or of "
                "documents; pass None, or the causal mask (True above the diagonal)"
            )


_REASONS = {
    "packed_seq_params": "documents packed into one sequence would leak into each other",
    "inference_context": "it keeps no state between calls",
    "inference_params": "it keeps no state between calls",
    "attention_bias": "there are no attention scores to add it to, or they cannot take it",
    "sequence_len_offset": "it keeps no state between calls",
    **{f"rotary_pos_{part}": "it takes angles, in rotary_pos_emb" for part in ("cos", "sin", "cos_sin")},
}


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask [..., s, s] hides just the future. Looked at once: all layers are passed the same tensor."""
    known = getattr(mask, "_hides_just_the_future", None)
    if known is None:
        s = mask.shape[-1]
        future = torch.ones(s, s, dtype=torch.bool, device=mask.device).triu_(1)
        known = mask.dtype == torch.bool and mask.shape[-2:] == (s, s) and bool((mask == future).all())
        mask._hides_just_the_future = known
    return known
