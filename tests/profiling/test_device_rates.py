"""Measurements for the planner's hardware files: every mixer's operations, with positive times, from which rates are fitted."""

import pytest
import torch

from megatron_hybrid.config.presets import olmo_hybrid_tiny, preset
from megatron_hybrid.distributed.timing import both_passes
from megatron_hybrid.planner.hardware import load
from megatron_hybrid.planner.points import from_points
from megatron_hybrid.profiling.device_rates import device_points


def test_every_mixer_measures_its_operations(ranks):
    model = olmo_hybrid_tiny()
    (points,) = ranks.run(measured, 1)
    assert all(point["seconds"] >= 0 for point in points)
    mixers = {"attention", "recurrence", "conv_gates", "gated_norm"}
    assert {point["op"] for point in points} == {"copy", "linear", *mixers}
    base = load("h200")
    found = from_points(points, model, base, name="cpu", measured="here", memory_bytes=1e9)
    assert found.name == "cpu" and found.recurrence != base.recurrence and found.attention != base.attention


def test_a_model_without_a_mixer_does_not_measure_it(ranks):
    (points,) = ranks.run(measured, 1, pattern="A")
    assert {point["op"] for point in points} == {"copy", "linear", "attention"}


def measured(pattern: str = "GA") -> list[dict]:
    model = preset("olmo_hybrid_tiny").model_copy(update={"layer_pattern": pattern})
    return list(device_points(model, tokens=128, degrees=(1, 2)))


def test_the_backward_pass_accumulates_nothing():
    """Adding gradients of leaves to `.grad` once took as long as the operation: 0.78 ms instead of 0.43 for conv_gates."""
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    points = list(both_passes({"op": "linear"}, lambda: x @ w, (x, w)))
    assert [point["pass"] for point in points] == ["forward", "backward"]
    assert x.grad is None and w.grad is None


class _Half(torch.autograd.Function):
    """Return 2 x and a strided half of x, and keep whether their gradients are contiguous."""

    contiguous: list[bool] = []

    @staticmethod
    def forward(ctx, x):
        return 2 * x, x[:, : x.shape[1] // 2]

    @staticmethod
    def backward(ctx, *grads):
        _Half.contiguous += [grad.is_contiguous() for grad in grads]
        return 2 * grads[0] + torch.nn.functional.pad(grads[1], (0, grads[0].shape[1] // 2))


def test_gradients_of_strided_outputs_are_contiguous():
    """As the gate's in training. Its copy once made conv_gates' backward pass 0.39 instead of 0.26 ms long."""
    x = torch.randn(8, 4, requires_grad=True)
    assert not _Half.apply(x)[1].is_contiguous()
    list(both_passes({"op": "conv_gates"}, lambda: _Half.apply(x), (x,)))
    assert _Half.contiguous and all(_Half.contiguous)


class _IntoMainGrad(torch.autograd.Function):
    """x @ w, whose weight gradient goes to `main_grad`, as in Transformer Engine's linears with fuse_wgrad_accumulation."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        w.main_grad += x.t() @ grad
        return grad @ w.t(), None


def test_a_weight_gradient_may_go_to_the_buffer_of_training():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    w.main_grad = torch.zeros(4, 4)
    points = list(both_passes({"op": "linear"}, lambda: _IntoMainGrad.apply(x, w), (x, w)))
    assert [point["pass"] for point in points] == ["forward", "backward"]
    assert w.main_grad.abs().sum() > 0 and w.grad is None


def test_an_input_that_the_operation_leaves_out_is_an_error():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with pytest.raises(AssertionError, match="an input has no gradient"):
        list(both_passes({"op": "linear"}, lambda: x * 2.0, (x, w)))
