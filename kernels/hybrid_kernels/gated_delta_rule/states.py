"""Composition of state updates, for parts of a sequence that were processed separately. Any device, fp32 or fp64.

A part of a sequence maps the state S before it to M S + E after it. E [K, V] is its final state after a zero initial state, and
M [K, K] its transition. In the backward pass it maps the gradient D of its final state to M^T D + F, the gradient of its initial
state; F is that gradient for D = 0.
"""

from functools import reduce

import torch


def fold(ends: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """Return the state after all parts, from zero: S <- M S + E. ends [n, ..., K, V], transitions [n, ..., K, K], n >= 1."""
    state = ends[0].contiguous()
    for end, transition in zip(ends[1:], transitions[1:], strict=True):
        state = torch.matmul(transition, state) + end
    return state


def fold_backward(firsts: torch.Tensor, transitions: torch.Tensor) -> torch.Tensor:
    """Return the gradient before all parts, from zero after them: D <- M^T D + F, from the last part to the first."""
    return fold(firsts.flip(0), transitions.flip(0).mT)


def compose(transitions: torch.Tensor) -> torch.Tensor:
    """Return the transition of all parts together: transitions[-1] @ ... @ transitions[0]."""
    return reduce(lambda so_far, transition: torch.matmul(transition, so_far), transitions.unbind())
