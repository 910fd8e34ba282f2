"""Registry of optimizers. To add one, write a file like `adamw.py` and list it here.

An optimizer with fields of its own (`muon.py`) also adds them to OptimizerFields.
"""

from typing import TYPE_CHECKING, Literal

from megatron_hybrid.arch.optimizers import adamw, muon
from megatron_hybrid.arch.optimizers.spec import OptimizerSpec

OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        adamw.SPEC,
        muon.SPEC,
    )
}  # fmt: skip

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]  # so that validation names the choices


class OptimizerFields(muon.MuonFields):
    """Fields of `train.optimizer` that single optimizers read."""
