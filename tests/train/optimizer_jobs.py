"""Jobs of test_optimizers.py, which run on ranks."""

from typing import Any

from megatron_hybrid.arch.optimizers import OPTIMIZERS
from megatron_hybrid.arch.optimizers.spec import OptimizerSpec, Settings
from testing import jobs

MOMENTUM = 0.9


class Sgd(OptimizerSpec):
    """SGD with momentum."""

    def torch_arguments(self, settings: Settings) -> dict[str, Any]:
        return {"momentum": MOMENTUM}

    def megatron_fields(self, settings: Settings) -> dict[str, Any]:
        return {"optimizer": "sgd", "sgd_momentum": MOMENTUM}


SGD = Sgd(
    name="sgd",
    states=("momentum_buffer",),
    torch_class="torch.optim.SGD",
    host_class=None,
    distributed=False,
    counts_steps=False,
)


def curve_of_sgd(**arguments: Any) -> dict[str, Any]:
    """Run testing.jobs.curve with SGD in the place of the default optimizer."""
    OPTIMIZERS["adamw"] = SGD
    return jobs.curve(**arguments)
