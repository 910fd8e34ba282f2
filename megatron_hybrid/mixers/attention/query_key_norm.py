"""Norm and rotary embedding of queries and keys, and the split of linear_qkv's output.

Suffixes of tensor names: s tokens, b sequences, w channels of this rank, d channels of a head.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

from hybrid_kernels.dispatch import Choice
from hybrid_kernels.head_norm_rope import explain as explain_head_norm_rope
from hybrid_kernels.head_norm_rope import head_norm_rope
from hybrid_kernels.qk_norm_rope import explain as explain_qk_norm_rope
from hybrid_kernels.qk_norm_rope import qk_norm_rope
from megatron_hybrid.distributed.collectives import all_reduce_sum
from megatron_hybrid.mixers.attention.sizes import AttentionSizes

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""q, k and v [s, b, heads, d], and the output gate [s, b, w], if there is one."""


class QueryKeyNorm:
    """The norm of one mixer's q and k, on this rank's heads.

    Args:
        heads, groups: heads of q, and of k, on this rank, dummies included.
        group: tensor parallel ranks.
        sequence_parallel: gradients of weights that all ranks share are summed by megatron-core, once per step.
    """

    def __init__(
        self, sizes: AttentionSizes, heads: int, groups: int, group: dist.ProcessGroup, sequence_parallel: bool
    ) -> None:
        self.sizes, self.heads, self.groups = sizes, heads, groups
        self.group, self.sequence_parallel = group, sequence_parallel
        self.per_head = sizes.qk_norm == "per_head"
        self._all_reduce = all_reduce_sum(group)

    def mark(self, *weights: torch.nn.Parameter) -> None:
        """Mark weights that serve every rank's heads: their gradients are summed over the ranks together with the norms'."""
        if self.per_head:
            for weight in weights:
                weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def __call__(
        self,
        packed_sbw: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        angles_sb1d: torch.Tensor | None,
    ) -> Parts:
        """Split [q | k | v | gate], and normalise and rotate q and k."""
        q_weight, k_weight = self._effective(q_weight), self._effective(k_weight)
        if self.per_head:
            return head_norm_rope(
                packed_sbw, q_weight, k_weight, angles_sb1d,
                num_heads=self.heads, num_groups=self.groups, eps=self.sizes.norm_eps, gated=self.sizes.output_gate,
            )  # fmt: skip
        return self._over_projections(packed_sbw, q_weight, k_weight, angles_sb1d)

    def _over_projections(
        self, packed_sbw: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, angles_sb1d: torch.Tensor | None
    ) -> Parts:
        sizes, gate = self.sizes, None
        if sizes.output_gate:
            width = (self.heads + 2 * self.groups) * sizes.head_dim
            packed_sbw, gate = packed_sbw[..., :width], packed_sbw[..., width:]
        q, k, v = qk_norm_rope(
            packed_sbw,
            q_weight,
            k_weight,
            angles_sb1d,
            head_dim=sizes.head_dim,
            true_widths=(sizes.heads * sizes.head_dim, sizes.groups * sizes.head_dim),
            eps=sizes.norm_eps,
            all_reduce=self._all_reduce,
        )
        return q, k, v, gate

    def _effective(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the factor by which the norm multiplies."""
        if self.per_head and not self.sequence_parallel:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.group)
        return 1 + weight.float() if self.sizes.zero_centered_norm else weight

    def explain(self, packed_sbw: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> Choice:
        """Return which backend a call would run, and why."""
        if self.per_head:
            return explain_head_norm_rope(packed_sbw, q_weight, k_weight)
        return explain_qk_norm_rope(packed_sbw, q_weight, k_weight)
