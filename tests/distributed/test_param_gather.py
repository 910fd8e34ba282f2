"""Parameters are gathered in the order in which the forward pass needs them."""

import pytest

from testing.layouts import MODEL, SHALLOW, TRAIN, layout
from tests.distributed.param_gather_jobs import warnings_of_a_wrong_order


@pytest.mark.parametrize("linked", [False, True])
def test_no_bucket_is_gathered_too_early(linked, ranks):
    """In bf16, decays are in an fp32 buffer of their own, which the first layer needs. DDP by itself gathers it out of order."""
    parallel = layout(overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=10_000)
    model, train = MODEL | {"layer_pattern": SHALLOW}, TRAIN | {"dtype": "bf16"}
    arguments = dict(model=model, parallel=parallel, train=train, steps=2)
    for found in ranks.run(warnings_of_a_wrong_order, 2, linked=linked, **arguments):
        assert bool(found) is linked
