"""Jobs of test_gradient_averages.py, which run on ranks."""

from typing import Any
from unittest import mock

from megatron.core.distributed import DistributedDataParallelConfig

from megatron_hybrid.train.optimizers import megatron
from testing import jobs


def curve(averages: bool, **arguments: Any) -> dict[str, Any]:
    """Run testing.jobs.curve with gradients averaged in collectives as the trainer decides, or divided before a sum."""
    used = []

    def config(**fields: Any) -> DistributedDataParallelConfig:
        used.append(fields["average_in_collective"])
        return DistributedDataParallelConfig(**fields)

    decide = megatron.averages_exactly if averages else lambda ranks: False
    with mock.patch.multiple(megatron, DistributedDataParallelConfig=config, averages_exactly=decide):
        found = jobs.curve(**arguments)
    assert used == [averages], "the layout's ranks are a power of two"
    return found
