"""Tokens for heads and back: attention over an exchange is attention, its gradients too, with dummy heads and without."""

import pytest
import torch

from tests.distributed.context_jobs import attend, exchanged


@pytest.mark.parametrize(
    ("ranks_", "heads", "groups"),
    [(2, 4, 4), (2, 6, 3), (4, 6, 6), pytest.param(4, 6, 3, id="a rank of dummies alone"), (1, 3, 3)],
)
def test_attention_over_an_exchange(ranks_, heads, groups, ranks):
    generator = torch.Generator().manual_seed(0)
    q, k, v, given = (
        torch.randn(8, 2, *width, generator=generator, dtype=torch.float64)
        for width in ((heads, 5), (groups, 5), (groups, 5), (heads * 5,))
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    expected = [out.detach(), *torch.autograd.grad(out, leaves, given)]
    found = ranks.run(exchanged, ranks_, q=q, k=k, v=v, given=given, attend=attend)
    for whole, *parts in zip(expected, *found):
        torch.testing.assert_close(torch.cat(parts), whole)
