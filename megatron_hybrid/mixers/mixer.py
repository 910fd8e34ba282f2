"""Base class of mixers as modules of any megatron-core model: parameters, initial values, sharded state, and refusals."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar, Self

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)

from hybrid_kernels.dispatch import Choice
from megatron_hybrid.arch.packing import PackedParameter, PackedSlice
from megatron_hybrid.base.errors import UserError
from megatron_hybrid.distributed.device import parameter_device
from megatron_hybrid.mixers.documents import Documents, from_packed_seq_params
from megatron_hybrid.mixers.formats import FormatQuery, full_reason
from megatron_hybrid.mixers.initial_values import draw
from megatron_hybrid.mixers.sharded_state import true_tensors
from megatron_hybrid.precision.fp8_parameters import is_fp8_param


class Mixer(MegatronModule):
    """A mixer whose parameters pack true tensors (arch/packing.py).

    A subclass builds its linears and, by `new_parameter`, its own parameters. Then it calls `finish`.

    Args:
        packing: the parameters that its spec declares.
    """

    uses_rotary_embedding: bool = False
    """Rotary embedding applies to this mixer. Other mixers ignore it: the model passes it to every layer."""
    obeys_documents: ClassVar[bool] = False
    """`mix` takes documents and keeps them apart. Its spec supports "documents" as well."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None,
        packing: Iterable[PackedParameter],
    ) -> None:
        super().__init__(config)
        if config.context_parallel_size > 1:  # this package's own trainer leaves it at 1: its slices are contiguous
            raise UserError(
                f"context_parallel_size: {config.context_parallel_size} is not supported by {type(self).__name__}: megatron-core "
                "splits each sequence into two slices per rank, and this mixer needs one contiguous slice; set it to 1"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.tp_group, self.cp_group, self.layer_number = groups.tp, groups.cp, layer_number
        self.packing = {parameter.name: parameter for parameter in packing}

    def new_parameter(self, name: str) -> torch.nn.Parameter:
        """Return the parameter called `name` in the packing, filled with zeros."""
        packed = self.packing[name]
        dtype = torch.float32 if self._is_fp32(packed) else self.config.params_dtype
        values = torch.zeros(packed.rank_shape(self.tp_group.size()), device=parameter_device(self.config), dtype=dtype)
        parameter = torch.nn.Parameter(values)
        if packed.split != "replicated":  # rows of other heads are on other tensor parallel ranks
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    @staticmethod
    def _is_fp32(packed: PackedParameter) -> bool:
        return any(tensor.always_fp32 for tensor in packed.tensors)

    @property
    def fp32_parameters(self) -> list[str]:
        """Names of parameters that stay fp32 in a model of any dtype."""
        return [name for name, packed in self.packing.items() if self._is_fp32(packed)]

    def finish(self) -> None:
        """Initialise the parameters. A post-norm's linear is inside a wrapper, which changes the name of its weight."""
        names = dict(self.named_parameters())
        wrapped = {name: name.replace(".weight", ".linear.weight") for name in self.packing if name not in names}
        self.packing = {wrapped.get(name, name): packed for name, packed in self.packing.items()}
        self.reset_parameters()

    def slices(self, name: str, rank: int | None = None) -> tuple[PackedSlice, ...]:
        """Return what this rank, or another, holds in the parameter called `name`."""
        return self.packing[name].slices(self.tp_group.rank() if rank is None else rank, self.tp_group.size())

    # ---- initial values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw this module's own parameters, and zero the padding that the linears have drawn with their weights.

        As megatron-core does: from the CPU's generator with `use_cpu_initialization`, whole tensors of which each rank takes its
        slice, and else from the tensor parallel rank's own generator. Nothing with `perform_initialization` off.
        """
        if not self.config.perform_initialization:
            return
        with nullcontext() if self.config.use_cpu_initialization else get_cuda_rng_tracker().fork():
            for name in self.packing:
                parameter = self.get_parameter(name)
                if "." in name:
                    self._zero_padding(name, parameter)
                else:
                    self._draw(name, parameter)

    def _draw(self, name: str, parameter: torch.nn.Parameter) -> None:
        for part in self.slices(name):
            whole = torch.empty(part.tensor.shape, dtype=torch.float32, device=parameter.device)
            drawn = draw(whole, part.tensor.init, self.config.init_method_std)
            part.target.narrow(parameter.data).copy_(part.source.narrow(drawn))

    def _zero_padding(self, name: str, parameter: torch.nn.Parameter) -> None:
        if is_fp8_param(parameter):
            if self.has_dummy_heads:
                raise UserError(
                    f"fp8_param: {name} would hold dummy heads in FP8; set it to False, or choose a tensor_model_parallel_size "
                    "that divides the heads"
                )
            return  # what is left are rows that nothing reads
        values = parameter.clone()
        parameter.zero_()
        for part in self.slices(name):
            part.target.narrow(parameter.data).copy_(part.target.narrow(values))

    @property
    def has_dummy_heads(self) -> bool:
        """True if tensor parallelism adds heads that the model does not have, on any rank."""
        ranks = self.tp_group.size()
        return any(p.split != "replicated" and p.padded_groups(ranks) != p.groups for p in self.packing.values())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Convert the module, as `bfloat16()` and `to()` do, except for parameters that stay fp32.

        megatron-core's Float16Module converts whole models. Half precision would move decay rates (Megatron-LM issue 3634).
        """
        kept = {name: self._parameters[name] for name in self.fp32_parameters if name in self._parameters}
        before = {name: parameter.data for name, parameter in kept.items()}
        super()._apply(fn, recurse)
        for name, values in before.items():
            parameter = self._parameters[name]
            if parameter.dtype != values.dtype:
                parameter.data = values.to(parameter.device)
        return self

    # ---- checkpoints of megatron-core

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> dict[str, Any]:
        """Describe the true tensors to megatron-core: one entry per tensor, without padding, whatever the degree.

        A checkpoint that is saved at one tensor parallel size loads at any other.
        """
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        groups = dict(tp_group=tp_group or self.tp_group, dp_cp_group=metadata["dp_cp_group"])
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        rows = {name: 0 for name in own if name in self.packing and self.packing[name].split != "replicated"}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, rows, sharded_offsets, **groups)
        for name, module in self.named_children():
            options = dict(metadata=metadata, tp_group=groups["tp_group"])
            state.update(sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, **options))
        for name, packed in self.packing.items():
            if packed.split != "replicated":
                key, first = f"{prefix}{name}", self.slices(name, rank=0)
                state[key] = true_tensors(state[key], self.slices(name), first, tuple(sharded_offsets))
        return state

    # ---- what a run reports

    def backends(self, sequence_length: int, batch_size: int, documents: bool = False) -> list[Choice]:
        """Return which backend each kernel uses for a micro-batch of this rank's tokens, with or without documents, and why."""
        return []

    def formats(self, query: FormatQuery) -> list[tuple[str, str, str, str]]:
        """Return (part, format, backend, reason) of everything between its linears."""
        tokens = query.sequence_length // self.cp_group.size()
        choices = self.backends(tokens, query.batch_size, query.documents)
        return [(c.op, query.dtype, c.backend, full_reason(c)) for c in choices]

    # ---- what TransformerLayer and schedules call

    def backward_dw(self) -> None:
        """Compute the weight gradients that `delay_wgrad_compute` put off."""
        for module in self.children():
            module.backward_dw()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: object = None,
        rotary_pos_emb: torch.Tensor | None = None,
        rotary_pos_cos: torch.Tensor | None = None,
        rotary_pos_sin: torch.Tensor | None = None,
        rotary_pos_cos_sin: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Documents | PackedSeqParams | None = None,
        sequence_len_offset: object = None,
        *,
        inference_params: object = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix hidden_states [s, b, h]: this rank's tokens under sequence and context parallelism.

        The arguments are those with which TransformerLayer calls its attention.

        Args:
            rotary_pos_emb: angles of this rank's tokens, or with PackedSeqParams of the positions in a document; None: no rotary
                embedding.
            packed_seq_params: documents in the sequences, which do not see each other; None: each sequence is one.

        Returns:
            ([s, b, h], None)

        Raises:
            UserError: another mask than the causal one, or an input that this mixer would have to ignore.
        """
        self.check_mask(attention_mask)
        self.refuse(
            inference_context=inference_context,
            inference_params=inference_params,
            attention_bias=attention_bias,
            sequence_len_offset=sequence_len_offset,
        )
        if not self.obeys_documents:
            self.refuse(packed_seq_params=packed_seq_params)
        if self.uses_rotary_embedding:
            self.refuse(
                rotary_pos_cos=rotary_pos_cos, rotary_pos_sin=rotary_pos_sin, rotary_pos_cos_sin=rotary_pos_cos_sin
            )
        else:
            rotary_pos_emb = None
        if packed_seq_params is None or isinstance(packed_seq_params, Documents):
            return self.mix(hidden_states, rotary_pos_emb, packed_seq_params)
        length, rows, _ = hidden_states.shape
        tokens = length * self.tp_group.size() if self.config.sequence_parallel else length
        documents = from_packed_seq_params(packed_seq_params, tokens, rows, self.cp_group)
        if rotary_pos_emb is not None:
            rotary_pos_emb = documents.rotary_angles(rotary_pos_emb)
        return self.mix(hidden_states, rotary_pos_emb, documents)

    def mix(
        self, hidden_states: torch.Tensor, rotary_pos_emb: torch.Tensor | None, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ([s, b, h], None) for hidden_states [s, b, h]. A subclass implements it.

        Args:
            rotary_pos_emb: angles of this rank's tokens [s, 1 or b, 1, d], or [2, ...]: plain and scaled.
            documents: None unless `obeys_documents`, or if each sequence is one.
        """
        raise NotImplementedError

    def refuse(self, **inputs: object) -> None:
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
    "packed_seq_params": "documents packed into a sequence would leak into each other",
    "inference_context": "it keeps no state between calls",
    "inference_params": "it keeps no state between calls",
    "attention_bias": "there are no attention scores to add it to, or they cannot take it",
    "sequence_len_offset": "it keeps no state between calls",
    **{f"rotary_pos_{part}": "it takes angles, in rotary_pos_emb" for part in ("cos", "sin", "cos_sin")},
}


def _is_causal(mask: torch.Tensor) -> bool:
    """Return whether a mask [..., s, s] hides just the future. It is checked once: all layers are passed the same tensor."""
    version = None if mask.is_inference() else mask._version  # inference tensors do not count their changes
    known_version, known = getattr(mask, "_hides_just_the_future", (None, False))
    if version is None or version != known_version:
        s = mask.shape[-1]
        future = torch.ones(s, s, dtype=torch.bool, device=mask.device).triu_(1)
        known = mask.dtype == torch.bool and mask.shape[-2:] == (s, s) and bool((mask == future).all())
        mask._hides_just_the_future = version, known  # type: ignore[attr-defined]
    return bool(known)
