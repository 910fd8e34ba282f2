"""Functions that tests/distributed/test_context.py runs on ranks."""

import torch
import torch.distributed as dist

from megatron_hybrid.distributed.context_parallel import HeadExchange


def exchanged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, given: torch.Tensor, attend) -> list[torch.Tensor]:
    """Attention of this rank's slice of q, k, v [s, b, heads, d] through the exchange, and their gradients."""
    group = dist.group.WORLD
    rank, ranks = dist.get_rank(), dist.get_world_size()
    q, k, v, given = (x.chunk(ranks)[rank].clone() for x in (q, k, v, given))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    exchange = HeadExchange(group, q.shape[2], k.shape[2])
    whole = [exchange.to_heads(x, n) for x, n in zip(leaves, (exchange.heads, exchange.groups, exchange.groups))]
    assert all(x.shape[0] == ranks * q.shape[0] and x.is_contiguous() for x in whole)
    out = exchange.to_tokens(attend(*whole))
    assert out.is_contiguous()
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, given))]


def attend(q, k, v) -> torch.Tensor:
    """Causal attention [s, b, heads * d]."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)
