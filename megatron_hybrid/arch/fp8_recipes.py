"""Table of FP8 recipes. To add one, add an entry.

The table is torch-free, so that configuration checks and the planner can use it; `precision/recipes.py` makes Transformer
Engine's recipe objects. megatron-core must know the name too (`TransformerConfig.fp8_recipe`).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_hybrid.arch.packing import FP8_ALIGNMENT

HYBRID_FORMAT = "fp8 e4m3 (gradients e5m2)"
FP8_SPEEDUP = 2.0
"""Peak of dense FP8 GEMMs over that of bf16, on every GPU that has FP8."""


@dataclass(frozen=True)
class Fp8Recipe:
    """An FP8 recipe of GEMMs and what depends on it."""

    name: str
    """Value of `precision.fp8_recipe`, and megatron-core's name."""
    transformer_engine_class: str
    """Name of its class in `transformer_engine.common.recipe`."""
    description: str
    """Number format and scaling, for the table that a run prints at its start."""
    support_check: str = "check_fp8_support"
    """Function of `transformer_engine.pytorch.quantization` that tells whether this GPU and its CUDA can run it."""
    alignment: int = FP8_ALIGNMENT
    """Rows and columns of every FP8 matrix on a rank must be multiples of this."""
    user_buffers: bool = True
    """Whether user buffers can exchange its tensors (parallel.tp_comm_overlap)."""
    scales_from_past_steps: bool = False
    """Whether scales are state: checkpoints hold them, and FP8 parameters must be cast again after a skipped step."""
    norm_casts: bool = False
    """Whether Transformer Engine's norm writes its result in FP8. With other recipes it writes bf16, which a second kernel casts."""
    bf16_layers: bool = True
    """Whether the first and last layers may stay in bf16."""
    weight_copy_bytes: int = 2
    """Bytes per parameter of the FP8 copies of a weight: one row-wise, one column-wise."""
    amax_all_reduces: int = 0
    """All-reduces of scales among the tensor parallel ranks, per layer and pass."""


FP8_RECIPES: dict[str, Fp8Recipe] = {
    recipe.name: recipe
    for recipe in (
        Fp8Recipe(
            "delayed",
            "DelayedScaling",
            f"{HYBRID_FORMAT}, delayed scaling",
            scales_from_past_steps=True,
            norm_casts=True,
            bf16_layers=False,
        ),
        Fp8Recipe("tensorwise", "Float8CurrentScaling", f"{HYBRID_FORMAT}, current scaling", amax_all_reduces=2),
        Fp8Recipe(
            "blockwise",
            "Float8BlockScaling",
            "fp8 e4m3, blockwise scaling",
            support_check="check_fp8_block_scaling_support",
            user_buffers=False,  # its scales are separate tensors
        ),
    )
}

RECOMMENDED = FP8_RECIPES["tensorwise"]
"""The recipe that error messages suggest: it has none of the restrictions above."""
ATTENTION = FP8_RECIPES["delayed"]
"""The recipe of FP8 attention, the only one that supports it on Hopper."""

if TYPE_CHECKING:
    Fp8RecipeName = str
else:
    Fp8RecipeName = Literal[tuple(FP8_RECIPES)]  # so that validation names the choices
