"""Jobs of test_param_gather.py, which run on ranks."""

import warnings
from contextlib import nullcontext
from typing import Any
from unittest import mock

from megatron_hybrid.train.optimizers import megatron
from testing import jobs


def warnings_of_a_wrong_order(linked: bool, **arguments: Any) -> list[str]:
    """Run testing.jobs.curve and return megatron-core's warnings of buckets that are gathered too early.

    Args:
        linked: gather the buckets of all buffers one after the other, as DDP does by itself.
    """
    buffers = mock.patch.object(megatron, "unlink_buffers", lambda wrapped: None) if linked else nullcontext()
    with warnings.catch_warnings(record=True) as caught, buffers:
        warnings.simplefilter("always")
        jobs.curve(**arguments)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "all-gather operation has already been dispatched" in text]
