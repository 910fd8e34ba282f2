"""Attribution of a loss or gradient that is not finite: rank, micro-batch, layer and parameter."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_hybrid.data.batch import Batch
from megatron_hybrid.distributed.device import node_name
from megatron_hybrid.train.engines.megatron import MegatronEngine
from megatron_hybrid.train.random_state import get_random_state, set_random_state

_MOST_RANKS = 4
"""Ranks to describe one by one."""
_COMMUNICATION = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func")


@dataclass(frozen=True)
class Finding:
    """Result of one rank. None: everything was finite."""

    rank: int
    host: str
    output: str | None
    """First module, in the order of computation, whose output is not finite when the step is run again."""
    gradient: str | None
    """First parameter, in the order of the backward pass, whose gradient on this rank is not finite when the step is run again."""
    reduced: str | None
    """The same in the original step, after the reduction over data parallel ranks."""

    @property
    def reproduces(self) -> bool:
        return self.output is not None or self.gradient is not None

    def __str__(self) -> str:
        parts = [
            f"{what} {name}" for what, name in (("output of", self.output), ("gradient of", self.gradient)) if name
        ]
        return f"rank {self.rank} on {self.host}: {', '.join(parts)}"


def attribute(engine: MegatronEngine, batches: list[Batch]) -> str:
    """Run a step's micro-batches again without communication of gradients, and describe what is not finite and where.

    Every rank calls it, before the next step. Gradients are overwritten; parameters and random state are left as they are.
    """
    reduced = _first_bad_gradient(engine)
    output, gradient = _run_again(engine, batches)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, Finding(dist.get_rank(), node_name(), output, gradient, reduced))
    return describe(found)


def describe(found: list[Finding]) -> str:
    """Return the findings of all ranks as a sentence."""
    again = [finding for finding in found if finding.reproduces]
    if not again:
        names = dict.fromkeys(finding.reduced for finding in found if finding.reduced)
        where = f"; in the step itself, the gradient of {next(iter(names))} was not finite" if names else ""
        return (
            "not reproducible: the same micro-batches are finite on all ranks when they are run again, so a device or the network "
            f"may have failed{where}"
        )
    # a rank that computes something bad passes it on to later pipeline stages and to its tensor parallel group
    shown = "; ".join(map(str, again[:_MOST_RANKS]))
    more = f"; and {len(again) - _MOST_RANKS} more ranks" if len(again) > _MOST_RANKS else ""
    return f"reproducible with the same micro-batches: {shown}{more}"


def _run_again(engine: MegatronEngine, batches: list[Batch]) -> tuple[str | None, str | None]:
    """Return the first output and the first local gradient that are not finite."""
    state = get_random_state()
    flags: list[tuple[str, torch.Tensor]] = []
    for chunk in engine.wrapped:
        chunk.zero_grad_buffer()  # it turns the reduction on
    engine.optimizer.zero_grad()
    with ExitStack() as stack:
        stack.enter_context(_without_reduction(engine))
        for name, module in _modules(engine):
            handle = module.register_forward_hook(_record(name, flags))
            stack.callback(handle.remove)
        engine.run(batches)
    set_random_state(state)
    bad = torch.stack([flag for _, flag in flags]).tolist() if flags else []
    output = next((name for (name, _), is_bad in zip(flags, bad, strict=True) if is_bad), None)
    return output, _first_bad_gradient(engine)


def _modules(engine: MegatronEngine) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of this rank with their names over all pipeline stages."""
    for chunk in engine.chunks:
        offset = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
        for name, module in chunk.named_modules():
            yield engine.layout.global_name(name, offset) or "the model", module


def _record(name: str, flags: list[tuple[str, torch.Tensor]]) -> Any:
    """Return a hook that records whether a module's output is finite, without waiting for the device."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                flags.append((name, ~torch.isfinite(tensor.detach()).all()))

    return hook


@contextmanager
def _without_reduction(engine: MegatronEngine) -> Iterator[None]:
    """Leave every rank with the gradients of its own micro-batches."""
    configs = [chunk.module.config for chunk in engine.wrapped]
    before = [{name: getattr(config, name) for name in _COMMUNICATION} for config in configs]
    with ExitStack() as stack:
        for chunk in engine.wrapped:
            stack.enter_context(chunk.no_sync())
        for config in configs:
            config.finalize_model_grads_func = config.grad_sync_func = config.param_sync_func = None
            config.no_sync_func = nullcontext
        try:
            yield
        finally:
            for config, fields in zip(configs, before, strict=True):
                for name, value in fields.items():
                    setattr(config, name, value)


@torch.no_grad()
def _first_bad_gradient(engine: MegatronEngine) -> str | None:
    """Return the parameter nearest to the loss whose gradient is not finite: from there, the backward pass spreads it."""
    named = [(name, p.main_grad) for name, p, _ in engine.layout.parameters(engine.chunks) if hasattr(p, "main_grad")]
    if not named:
        return None
    bad = torch.stack([~torch.isfinite(gradient).all() for _, gradient in named]).tolist()
    return next((name for (name, _), is_bad in reversed(list(zip(named, bad, strict=True))) if is_bad), None)
