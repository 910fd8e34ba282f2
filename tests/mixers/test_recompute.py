"""Selective recompute between two linears against the same without it."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from megatron_hybrid.mixers.recompute import between_linears


class Block(nn.Module):
    """A function with a parameter of its own, and a linear that returns (output, bias)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.weight = nn.Parameter(torch.rand(16)), nn.Parameter(torch.randn(8, 16))
        self.runs = 0

    def run(self, x):
        self.runs += 1
        return torch.nn.functional.silu(x) * self.scale

    def linear(self, x):
        return x @ self.weight.t(), None

    def forward(self, x, recompute):
        return between_linears(self.run, x, self.linear, recompute)


def test_same_output_and_gradients():
    plain, recomputing = Block(), Block()
    x = torch.randn(5, 3, 16)
    results = []
    for block, recompute in ((plain, False), (recomputing, True)):
        mine = x.clone().requires_grad_()
        y, bias = block(mine * 1.0, recompute)
        (y.square().sum() + mine.sum()).backward()
        assert bias is None
        results.append((y.detach(), mine.grad, block.scale.grad, block.weight.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert (plain.runs, recomputing.runs) == (1, 2)


def test_the_output_is_given_back_between_the_passes():
    block, kept = Block(), []

    def linear(x):
        kept.append(x)
        return block.linear(x)

    y, _ = between_linears(block.run, torch.randn(4, 16, requires_grad=True), linear, True)
    assert kept[0].untyped_storage().nbytes() == 0
    y.sum().backward()
    assert kept[0].untyped_storage().nbytes() == 4 * 16 * 4


def test_a_forward_pass_without_a_backward_pass_is_freed():
    block = Block()
    x = torch.randn(4, 16, requires_grad=True)
    y, _ = block(x * 1.0, True)
    y, _ = block(torch.cat([y, y], -1), True)
    left = weakref.ref(block)
    del block, y
    gc.collect()
    assert left() is None


def test_several_at_once_and_one_within_another():
    def network(blocks, x, recompute):
        for block in blocks:
            y, _ = block(x, recompute)
            x = x + torch.cat((y, y), -1)
        return x

    blocks = [Block() for _ in range(3)]
    others = copy.deepcopy(blocks)
    x = torch.randn(2, 16, requires_grad=True)
    for stack, recompute in ((blocks, False), (others, True)):
        passes = [network(stack, x * (1 + i), recompute) for i in range(2)]  # as 1F1B does: two micro-batches in flight
        for loss in passes:
            loss.square().mean().backward()
    for a, b in zip(blocks, others, strict=True):
        assert torch.equal(a.scale.grad, b.scale.grad) and torch.equal(a.weight.grad, b.weight.grad)


def test_an_input_without_a_gradient_still_trains_the_function():
    block = Block()
    block(torch.randn(4, 16), recompute=True)[0].sum().backward()
    assert block.scale.grad is not None


@pytest.mark.parametrize("recompute", [True, False])
def test_without_gradients_it_just_runs(recompute):
    block = Block()
    with torch.no_grad():
        y, _ = block(torch.randn(4, 16), recompute)
    assert block.runs == 1 and not y.requires_grad
