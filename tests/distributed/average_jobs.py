"""Jobs of test_gradient_averages.py, which run on ranks."""

from typing import Any
from unittest import mock

from megatron.core.distributed import DistributedDataParallelConfig

from megatron_hybrid.train.optimizers import megatron
from testing import jobs


def both_curves(**arguments: Any) -> dict[bool, dict[str, Any]]:
    """Run testing.jobs.curve with gradients averaged in collectives (True), and divided before a sum (False)."""
    found = {}
    for averages in (True, False):
        used = []

        def config(used=used, **fields: Any) -> DistributedDataParallelConfig:
            used.append(fields["average_in_collective"])
            return DistributedDataParallelConfig(**fields)

        decide = megatron.averages_exactly if averages else lambda ranks: False
        patched = dict(DistributedDataParallelConfig=config, averages_exactly=decide)
        with mock.patch.multiple(megatron, **patched):
            found[averages] = jobs.curve(**arguments)
        assert used == [averages], "the layout's ranks are a power of two"
    return found
