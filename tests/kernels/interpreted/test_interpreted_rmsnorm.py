"""rmsnorm's Triton kernels under the interpreter, against plain torch in fp64."""

import pytest
import torch

from hybrid_kernels.rmsnorm import explain, residual_rmsnorm, rmsnorm
from hybrid_kernels.testing import relative_error

SHAPES = [(7, 3, 24), (1, 16), (70, 256), (5, 1000), (3, 2, 3840)]
WAYS = ("norm", "stream", "sum")


def inputs_of(shape, dtype=torch.float32, weight_dtype=None):
    generator = torch.Generator().manual_seed(0)
    x, residual = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator)
    return [x.to(dtype), residual.to(dtype), weight.to(weight_dtype or dtype)]


def gradients(inputs, way, **options):
    """Return the results of one entry point, and the gradients of the inputs that it takes."""
    x, residual, weight = (t.detach().clone().requires_grad_() for t in inputs)
    if way == "norm":
        leaves, results = [x, weight], [rmsnorm(x, weight, 1e-5, **options)]
    elif way == "stream":
        leaves, results = [x, weight], list(residual_rmsnorm(x, None, weight, 1e-5, **options))
    else:
        leaves, results = [x, residual, weight], list(residual_rmsnorm(x, residual, weight, 1e-5, **options))
    given = [t.detach().cos() + i for i, t in enumerate(results)]
    return [t.detach() for t in (*results, *torch.autograd.grad(results, leaves, given))]


def agree(ours, oracle, tolerance):
    assert len(ours) == len(oracle)
    for mine, theirs in zip(ours, oracle, strict=True):
        assert torch.isfinite(mine).all()
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, way, zero_centered):
    inputs, options = inputs_of(shape), dict(zero_centered=zero_centered)
    exact = gradients([t.double() for t in inputs], way, backend="torch", **options)
    agree(gradients(inputs, way, backend="triton", **options), exact, 1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_several_tiles_a_program_and_programs_that_are_no_multiple(way, monkeypatch):
    from hybrid_kernels.rmsnorm.backends.triton import op

    monkeypatch.setattr(op, "BACKWARD_PROGRAMS", 3)
    monkeypatch.setattr(op, "TILE", 64)
    monkeypatch.setattr(op, "SUM_ROWS", 2)
    inputs = inputs_of((23, 24))
    exact = gradients([t.double() for t in inputs], way, backend="torch")
    agree(gradients(inputs, way, backend="triton"), exact, 1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("way", WAYS)
def test_in_bf16_twice(way, weight_dtype):
    inputs = inputs_of((9, 2, 96), torch.bfloat16, weight_dtype)
    assert explain(inputs[0], inputs[2], inputs[1]).backend == "triton"
    ours, again = gradients(inputs, way), gradients(inputs, way)
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    *others, dweight = ours
    assert dweight.dtype == weight_dtype and all(x.dtype == torch.bfloat16 for x in others)
    exact = gradients([t.double() for t in inputs], way, backend="torch")
    agree(ours, exact, 2e-2)  # the interpreter cuts off where the GPU rounds


@pytest.mark.parametrize("used", [0, 1])
def test_a_result_that_nothing_reads(used):
    """Autograd passes zeros for the stream or for the norm."""
    found = []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "torch")):
        x, residual, weight = (t.to(dtype).requires_grad_() for t in inputs_of((4, 24)))
        result = residual_rmsnorm(x, residual, weight, 1e-5, backend=backend)[used]
        grads = torch.autograd.grad(result, [x, residual, weight], result.detach().cos(), allow_unused=True)
        found.append(
            [torch.zeros_like(t) if g is None else g for t, g in zip((x, residual, weight), grads, strict=True)]
        )
    agree(*found, 1e-5)


def test_tensors_that_are_not_contiguous():
    x, residual, weight = inputs_of((6, 4, 48))
    exact = gradients(
        [x.double().transpose(0, 1), residual.double().transpose(0, 1), weight.double()], "sum", backend="torch"
    )
    agree(gradients([x.transpose(0, 1), residual.transpose(0, 1), weight], "sum", backend="triton"), exact, 1e-5)


def test_rows_that_are_too_wide_are_refused():
    with pytest.raises(ValueError, match="rows of 9000 channels are not between 1 and 8192"):
        rmsnorm(torch.ones(1, 9000), torch.ones(9000), 1e-5, backend="triton")


@pytest.mark.parametrize("way", WAYS)
def test_compiled_without_a_break(way):
    """torch.compile sees one operator for each direction, with the shapes that it really returns."""
    x, residual, weight = inputs_of((5, 2, 24))

    def run(x, residual, weight):
        if way == "norm":
            return rmsnorm(x, weight, 1e-5, backend="triton")
        stream, y = residual_rmsnorm(x, None if way == "stream" else residual, weight, 1e-5, backend="triton")
        return stream + 2 * y

    found = []
    for fn in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        result = fn(*leaves)
        grads = torch.autograd.grad(result, leaves, result.detach().cos(), allow_unused=True)
        found.append([t for t in (result, *grads) if t is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_derivative_is_refused():
    x, _, weight = inputs_of((4, 8))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rmsnorm(x, weight, 1e-5, backend="triton").pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
