"""Jobs of ranks that hold slices of sequences, and their comparison with whole sequences."""

import torch
import torch.distributed as dist

from hybrid_kernels.conv_gates import conv_gates
from hybrid_kernels.gated_delta_rule import gated_delta_rule
from hybrid_kernels.testing import relative_error
from megatron_hybrid.distributed.context_parallel import with_halo
from megatron_hybrid.distributed.state_passing import gated_delta_rule_of_slices


def results(fn, inputs: list, given: list) -> list[torch.Tensor]:
    """Return fn's results, then the gradients of its inputs for the given gradients of the results."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = fn(*leaves)
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, given))]


def drawn(out: tuple) -> list[torch.Tensor]:
    """Draw gradients of results."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in out]


def delta_rule(
    inputs: list, given: list, bounds: list[int], positions: torch.Tensor | None, **options
) -> list[torch.Tensor]:
    """Return o and five gradients, all [b, s of this rank, ...]."""
    options = in_segments(options)
    mine = slice(*bounds[dist.get_rank() : dist.get_rank() + 2])
    options["positions_bs"] = None if positions is None else positions[:, mine]
    rule = lambda *x: (gated_delta_rule_of_slices(*x, group=dist.group.WORLD, **options),)  # noqa: E731
    return results(rule, [x[:, mine] for x in inputs], [x[:, mine] for x in given])


def conv(inputs: list, given: list, bounds: list[int], positions: torch.Tensor | None, **options) -> list[torch.Tensor]:
    """Return q, k, v, g, beta [b, s of this rank, ...], the gate and the gradient of packed [s of this rank, b, ...], and three
    gradients summed over all ranks.
    """
    options = walking(options)
    mine = slice(*bounds[dist.get_rank() : dist.get_rank() + 2])
    packed, *weights = inputs
    options["positions_bs"] = None if positions is None else positions[:, mine]

    def op(packed, *weights):
        packed, halo = with_halo(packed, weights[0].shape[1] - 1, dist.group.WORLD)
        return conv_gates(packed, *weights, halo_sbw=halo, return_gate=True, **options)

    found = results(op, [packed[mine], *weights], [*(x[:, mine] for x in given[:5]), given[5][mine]])
    for x in found[7:]:
        dist.all_reduce(x)
    return found


def in_segments(options: dict) -> dict:
    """Make Triton's delta rule cut sequences into the number of segments in `options`, if any."""
    if "segments" in options:
        from hybrid_kernels.gated_delta_rule.backends.triton import op

        options = dict(options)
        count = options.pop("segments")
        op.segments_of = lambda *_: count
    return options


def walking(options: dict) -> dict:
    """Make a program of Triton's conv_gates iterate over the few tokens in `options`, if any: the interpreter is slow."""
    if "walk" in options:
        from hybrid_kernels.conv_gates.backends.triton import op

        options = dict(options)
        op.SEGMENTS, op.FORWARD_SEGMENT, op.BACKWARD_SEGMENT = options.pop("walk")
    return options


def check_delta_rule(ranks, inputs, bounds, tolerance, positions=None, **options) -> None:
    """Compare ranks that hold one slice each with the reference in fp64 on whole sequences."""
    given = drawn([inputs[2]])
    whole = lambda *x: gated_delta_rule(*x, positions_bs=positions, backend="torch")[:1]  # noqa: E731
    exact = results(whole, [x.double() for x in inputs], [x.double() for x in given])
    job = dict(inputs=inputs, given=given, bounds=bounds, positions=positions)
    found = ranks.run(delta_rule, len(bounds) - 1, **job, **options)
    for name, parts, oracle in zip(("o", "dq", "dk", "dv", "dg", "dbeta"), zip(*found), exact):
        assert relative_error(torch.cat(parts, 1), oracle) < tolerance, name


def check_conv(ranks, inputs, bounds, tolerance, positions=None, **options) -> None:
    """Do the same for conv_gates."""
    whole = lambda *x: conv_gates(*x, backend="torch", return_gate=True, **of_all)  # noqa: E731
    of_all = {name: value for name, value in options.items() if name not in ("backend", "walk")}
    of_all["positions_bs"] = positions
    given = drawn(whole(*inputs))
    exact = results(whole, [x.double() for x in inputs], [x.double() for x in given])
    job = dict(inputs=inputs, given=given, bounds=bounds, positions=positions)
    found = ranks.run(conv, len(bounds) - 1, **job, **options)
    names = ("q", "k", "v", "g", "beta", "gate", "dpacked", "dweight", "dA_log", "ddt_bias")
    for at, (name, oracle) in enumerate(zip(names, exact)):
        parts = [results[at] for results in found]
        whole_again = parts[0] if at > 6 else torch.cat(parts, 1 if at < 5 else 0)
        assert relative_error(whole_again, oracle) < tolerance, name
