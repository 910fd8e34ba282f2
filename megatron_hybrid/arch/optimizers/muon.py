"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982): momentum, orthogonalized by a Newton-Schulz iteration.

Muon updates the weights of linears in the layers. AdamW, with `betas` and `eps`, updates all other parameters: embedding, output
layer, norms, convolutions, A_log and dt_bias. Both use the same learning rate, schedule and weight decay.

**A packed weight is orthogonalized per projection.** `in_proj` of Gated DeltaNet packs q, k, v, gate, b and a; `linear_qkv` of
attention packs q, k, v and its gate; `linear_fc1` of the MLP packs gate and up. Each is a matrix of its own, over all heads and all
tensor parallel ranks, without padding. Reasons:
- Each projection is a linear map with its own scale. Orthogonalized together, the singular values of q would depend on those of v.
- The result depends on neither packing, padding nor layout. It is what Muon computes on the true, unpacked tensors.
- megatron-core's `muon_split_qkv` also separates q, k and v, each over all heads. A matrix per head would change the algorithm of
  the published results, and multiply the number of small GEMMs by the number of heads.

megatron-core 0.19.2 packs gate and up of an MLP into one matrix, and knows no Gated DeltaNet, so its updates of these differ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_hybrid.arch.optimizers import adamw
from megatron_hybrid.arch.optimizers.spec import FP32_BYTES, OptimizerSpec, Settings
from megatron_hybrid.arch.packing import PackedParameter, TensorSpec
from megatron_hybrid.base.section import Section


class MuonFields(Section):
    """Fields of train.optimizer for muon, by the names of megatron-core's OptimizerConfig."""

    muon_momentum: float = Field(0.95, ge=0, lt=1)
    """Decay rate of Muon's momentum, a moving average of gradients."""
    muon_nesterov: bool = False
    """Nesterov momentum: orthogonalize a weighted mean of gradient and momentum."""
    muon_num_ns_steps: PositiveInt = 5
    """Steps of the Newton-Schulz iteration."""
    muon_coefficient_type: Literal["simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"] = "quintic"
    """Coefficients of the Newton-Schulz iteration. simple: Keller Jordan's and torch.optim.Muon's."""
    muon_scale_mode: Literal["spectral", "shape_scaling", "unit_rms_norm"] = "spectral"
    """Factor of the update of an [m, n] projection. spectral: sqrt(max(m, n)), so that the root mean square of all updates is about 1;
    shape_scaling: sqrt(max(1, m / n)); unit_rms_norm: sqrt(m / n)."""
    muon_extra_scale_factor: PositiveFloat = 1.0
    """Another factor of the update. With muon_scale_mode spectral, 0.2 matches AdamW's updates, so that AdamW's learning rate and
    weight decay can stay."""
    muon_tp_mode: Literal["duplicated", "distributed", "blockwise"] = "duplicated"
    """duplicated: every tensor parallel rank gathers and orthogonalizes whole projections; distributed: the ranks share the GEMMs and
    all-reduce in every step; blockwise: each rank orthogonalizes its own rows or columns, so that the result depends on the layout."""
    muon_fp32_matmul_prec: Literal["highest", "high", "medium"] = "medium"
    """Precision of the Newton-Schulz GEMMs. medium: bf16; high: TF32; highest: fp32."""


@dataclass(frozen=True)
class Muon(OptimizerSpec):
    """Declaration of Muon for matrices, with another optimizer for the rest."""

    config_class = MuonFields

    def of(self, parameter: PackedParameter) -> OptimizerSpec:
        matrix = all(len(one.shape) == 2 and one.decay_group == "matrix" for one in parameter.tensors)
        return self if matrix else adamw.SPEC

    def torch_arguments(self, settings: Settings) -> dict[str, Any]:
        own = _own(settings)
        return {"momentum": own.muon_momentum, "nesterov": own.muon_nesterov, "ns_steps": own.muon_num_ns_steps}

    def megatron_fields(self, settings: Settings) -> dict[str, Any]:
        own = {name: getattr(settings, name) for name in MuonFields.model_fields}
        return adamw.SPEC.megatron_fields(settings) | own | {"optimizer": MEGATRON_NAME}

    def update_flops(self, parameter: PackedParameter, ranks: int, settings: Settings) -> float:
        """Count 4 s^2 l + 2 s^3 per step and projection, where s is the side of the Gram matrix and l the other one."""
        own = _own(settings)
        sides = [_sides(parameter, tensor, ranks, own.muon_tp_mode) for tensor in parameter.tensors]
        flops = sum(4 * side**2 * other + 2 * side**3 for side, other in sides)
        return own.muon_num_ns_steps * flops * _TIMES_BF16[own.muon_fp32_matmul_prec]

    def update_collectives(
        self, parameter: PackedParameter, ranks: int, settings: Settings
    ) -> Iterable[tuple[str, float]]:
        own = _own(settings)
        if ranks == 1 or parameter.split == "replicated" or own.muon_tp_mode == "blockwise":
            return
        if own.muon_tp_mode == "duplicated":
            yield "all_gather", FP32_BYTES * float(parameter.rank_numel(ranks) * ranks)
            return
        size = 2 if own.muon_fp32_matmul_prec == "medium" else FP32_BYTES
        for tensor in parameter.tensors:
            side, _ = _sides(parameter, tensor, ranks, own.muon_tp_mode)
            yield from [("all_reduce", float(size * side**2))] * own.muon_num_ns_steps


def _sides(parameter: PackedParameter, tensor: TensorSpec, ranks: int, mode: str) -> tuple[int, int]:
    """Return the side of a projection's Gram matrix and the other side, on one tensor parallel rank."""
    rows, columns = tensor.shape
    if ranks == 1 or parameter.split == "replicated" or mode == "duplicated":
        return min(rows, columns), max(rows, columns)
    whole, share = tensor.shape[1 - parameter.dim], parameter.rank_size(tensor, ranks)
    return (whole, share) if mode == "distributed" else (min(whole, share), max(whole, share))


def _own(settings: Settings) -> MuonFields:
    assert isinstance(settings, MuonFields)  # OptimizerConfig inherits them
    return settings


_TIMES_BF16 = {"medium": 1, "high": 2, "highest": 15}
"""Time of a GEMM in units of bf16's, by peak rates of an H100: 989 TFLOP/s in bf16, 495 in TF32, 67 in fp32."""
MEGATRON_NAME = "packed_muon"
"""Name under which train/optimizers/muon.py registers the class with megatron-core."""

SPEC = Muon(
    name="muon",
    states=("momentum_buffer",),
    torch_class="torch.optim.Muon",
    host_class=None,
    whole_matrices=True,
    implementation="megatron_hybrid.train.optimizers.muon",
    unsupported={
        "deepspeed": "its ZeRO shards matrices, and Muon needs whole ones",
        "offload": "megatron-core's HybridDeviceOptimizer has no Muon",
        "fp8_param_gather": "only megatron-core's distributed optimizer casts masters to FP8, and it would split matrices",
    },
)
