"""Muon for packed, padded and tensor parallel weights: megatron-core's TensorParallelMuon, one projection at a time.

What is orthogonalized together, and why, is stated in arch/optimizers/muon.py. The iteration itself is NVIDIA's package
emerging-optimizers, which megatron-core's class needs too. Paths and lines are those of megatron-core 0.19.2, below `megatron/core/`.

- TensorParallelMuon splits `linear_qkv` only, in the order of megatron-core's own packing, and takes padding for data
  (optimizer/emerging_optimizers.py:264). PackedMuon overrides `orthogonalize`, as emerging-optimizers intends for packed weights.
- LayerWiseDistributedOptimizer wraps the optimizers that it is given only if `config.bf16` is set (layer_wise_optimizer.py:504). So it
  is set for fp32 as well: Float16OptimizerWithFloat16Params keeps no masters of fp32 parameters.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import emerging_optimizers as upstream
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate

from megatron_hybrid.arch.optimizers.muon import MEGATRON_NAME, MuonFields
from megatron_hybrid.arch.packing import PackedParameter
from megatron_hybrid.base.errors import ConfigError
from megatron_hybrid.train.optimizers.layer_wise import is_tagged

REQUIREMENT = "emerging-optimizers>=0.3,<0.4"


class PackedMuon(upstream.TensorParallelMuon):  # type: ignore[misc]
    """TensorParallelMuon that orthogonalizes each projection of a packed weight.

    Args:
        params: parameter groups of matrices.
        tp_group: the tensor parallel group.
        num_ns_steps, coefficient_type, scale_mode, extra_scale_factor, tp_mode: as in TensorParallelMuon.
        options: its other arguments.
    """

    def __init__(
        self,
        params: Any,
        tp_group: dist.ProcessGroup,
        num_ns_steps: int,
        coefficient_type: str,
        scale_mode: str,
        extra_scale_factor: float,
        tp_mode: str,
        **options: Any,
    ) -> None:
        super().__init__(params, num_ns_steps=num_ns_steps, tp_mode=tp_mode, **options)
        self.iteration = {"steps": num_ns_steps, "coefficient_type": coefficient_type}
        self.scale_mode, self.extra_scale_factor = scale_mode, extra_scale_factor
        self.tp_group = tp_group
        self.packing: dict[torch.Tensor, PackedParameter] = {}

    def orthogonalize(self, p: torch.Tensor, grad: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the update of a packed weight, to be multiplied by the learning rate. Padding gets zeros.

        Args:
            p: the weight that is updated, fp32, this rank's [rows, columns].
            grad: its momentum, or with Nesterov the mean of gradient and momentum.
            kwargs: options of the parameter group, which emerging-optimizers passes to every override.
        """
        packed, ranks, rank = self.packing[p], self.tp_group.size(), self.tp_group.rank()
        if packed.split == "replicated":
            ranks, rank = 1, 0
        shards = self._gather(grad) if ranks > 1 and self.tp_mode == "duplicated" else []
        shared = {"tp_group": self.tp_group, "partition_dim": packed.dim, "tp_mode": "distributed"}
        update, at, dim = torch.zeros_like(grad), 0, packed.dim
        for tensor in packed.tensors:
            size, true_size = packed.rank_size(tensor, ranks), tensor.shape[dim]
            start = min(rank * size, true_size)
            length = min(start + size, true_size) - start
            if shards:
                padded = torch.cat([shard.narrow(dim, at, size) for shard in shards], dim)
                whole = padded.narrow(dim, 0, true_size).contiguous()  # other strides would round differently
                found = self._iterate(whole, whole.shape).narrow(dim, start, length)
            elif ranks > 1 and self.tp_mode == "distributed":  # zeros change neither the norm nor the Gram matrix
                found = self._iterate(grad.narrow(dim, at, size), tensor.shape, **shared).narrow(dim, 0, length)
            else:
                block = grad.narrow(dim, at, length)
                found = self._iterate(block, block.shape) if length else block
            update.narrow(dim, at, length).copy_(found)
            at += size
        return update

    def _gather(self, matrix: torch.Tensor) -> list[torch.Tensor]:
        """Return the matrices of all tensor parallel ranks."""
        shards = [torch.empty_like(matrix) for _ in range(self.tp_group.size())]
        dist.all_gather(shards, matrix.contiguous(), group=self.tp_group)
        return shards

    def _iterate(self, matrix: torch.Tensor, shape: Iterable[int], **shared: Any) -> torch.Tensor:
        """Orthogonalize a matrix, or with other ranks the blocks of one of true shape `shape`, and scale it."""
        options = {"tp_group": None} | self.iteration | shared
        factor: float = upstream.get_muon_scale_factor(*shape, mode=self.scale_mode)
        return upstream.newton_schulz_tp(matrix, **options) * (factor * self.extra_scale_factor)  # type: ignore[no-any-return]


def make_known() -> None:
    """Register PackedMuon with megatron-core, with AdamW for the parameters that are not tagged.

    Raises:
        ConfigError: emerging-optimizers is not installed, or not in a version that megatron-core can import.
    """
    if not upstream.HAVE_EMERGING_OPTIMIZERS:
        raise ConfigError.at(
            "train.optimizer.kind",
            f"muon needs NVIDIA's package emerging-optimizers; install it with pip install '{REQUIREMENT}', or set it to adamw",
        )
    others = ParamKey(predicate=ParamPredicate("not_muon", lambda parameter: not is_tagged(parameter)))
    upstream._EMERGING_OPTIMIZERS[MEGATRON_NAME] = upstream.EmergingOptimizerEntry(
        optimizer_cls=PackedMuon,
        config_to_kwargs=_arguments,
        default_param_overrides={others: {"optimizer": "adam"}},
    )


def _arguments(config: Any, model_chunks: Any, groups: Any) -> dict[str, Any]:
    """Return the arguments of PackedMuon for megatron-core's OptimizerConfig."""
    own = {name.removeprefix("muon_"): getattr(config, name) for name in MuonFields.model_fields}
    return own | {"lr": config.lr, "weight_decay": config.weight_decay, "tp_group": groups.tp}


def connect(optimizer: torch.optim.Optimizer, packing: dict[torch.Tensor, PackedParameter]) -> None:
    """Tell a PackedMuon how its parameters are packed. Other optimizers are left as they are.

    Args:
        packing: by the fp32 tensor that is updated.
    """
    if isinstance(optimizer, PackedMuon):
        optimizer.packing = packing
