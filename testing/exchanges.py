"""Keep account of every exchange between pipeline stages: whose memory is in flight, and in which order messages go."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import p2p_communication, schedules

from testing.disturbance import planted_race
from testing.repetitions import run_once

_DIRECTIONS = dict(
    tensor_send_next="activation",
    tensor_recv_prev="activation",
    tensor_send_prev="gradient",
    tensor_recv_next="gradient",
)


@dataclass
class Ledger:
    """The exchanges of one rank."""

    in_flight: dict[int, tuple[str, torch.Tensor]] = field(default_factory=dict)
    """(`send` or `receive`, tensor) of each exchange that is not waited for yet, by number."""
    count: int = 0
    violations: list[str] = field(default_factory=list)
    sent: dict[tuple[str, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    """What was sent, in order, by (group, receiver)."""
    received: dict[tuple[str, int], list[str]] = field(default_factory=lambda: defaultdict(list))
    """What was received, in the order in which the receives were posted, by (group, sender)."""

    def check(self, kind: str, tensors, action: str) -> None:
        """Note a violation if one of these tensors is in flight."""
        for tensor in tensors if isinstance(tensors, list) else [tensors]:
            if any(what == kind and other is tensor for what, other in self.in_flight.values()):
                self.violations.append(f"{action} while its {kind} is in flight")

    def check_empty(self) -> None:
        """Note a violation if anything is in flight."""
        if self.in_flight:
            self.violations.append(f"{len(self.in_flight)} exchanges are in flight after the step")


class _Tracked:
    """A Work that its ledger forgets once it is waited for. What is sent must be the same before and after."""

    def __init__(self, ledger: Ledger, kind: str, tensor: torch.Tensor, work):
        self._ledger, self._work, self._number = ledger, work, ledger.count
        self._sent = tensor.detach().clone() if kind == "send" else None
        ledger.in_flight[ledger.count] = kind, tensor
        ledger.count += 1

    def wait(self) -> None:
        self._work.wait()
        _, tensor = self._ledger.in_flight.pop(self._number)
        if self._sent is not None and not torch.equal(tensor.detach(), self._sent):
            self._ledger.violations.append("a tensor is written while its send is in flight")


@contextmanager
def _replaced(module, **functions) -> Iterator[None]:
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function(before[name]))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


def _tracked_exchanges(ledger: Ledger):
    """Replacements of torch's isend and irecv, and of the function in which megatron-core calls them."""
    current: dict[str, torch.Tensor | None] = {}

    def p2p_ops(call):
        def wrapped(**arguments):
            current.update(arguments)
            return call(**arguments)

        return wrapped

    def direction(tensor: torch.Tensor) -> str:
        return next(what for name, what in _DIRECTIONS.items() if current[name] is tensor)

    def isend(call):
        def wrapped(tensor, dst, group):
            ledger.sent[group.group_name, dst].append(direction(tensor))
            return _Tracked(ledger, "send", tensor, call(tensor=tensor, dst=dst, group=group))

        return wrapped

    def irecv(call):
        def wrapped(tensor, src, group):
            ledger.received[group.group_name, src].append(direction(tensor))
            return _Tracked(ledger, "receive", tensor, call(tensor=tensor, src=src, group=group))

        return wrapped

    return _replaced(dist, isend=isend, irecv=irecv), _replaced(p2p_communication, _p2p_ops=p2p_ops)


def _checked_schedule(ledger: Ledger):
    """Replacements of what megatron-core's schedules do with tensors that they exchange."""

    def deallocate_output_tensor(call):
        def wrapped(output, deallocate_pipeline_outputs=False):
            ledger.check("send", output, "an output is deallocated")
            call(output, deallocate_pipeline_outputs)

        return wrapped

    def forward_step(call):
        def wrapped(step, iterator, model, count, input_tensor, *args, **kwargs):
            ledger.check("receive", input_tensor, "an activation is read")
            return call(step, iterator, model, count, input_tensor, *args, **kwargs)

        return wrapped

    def backward_step(call):
        def wrapped(input_tensor, output_tensor, output_tensor_grad, config):
            ledger.check("receive", output_tensor_grad, "a gradient is read")
            return call(input_tensor, output_tensor, output_tensor_grad, config)

        return wrapped

    return _replaced(
        schedules,
        deallocate_output_tensor=deallocate_output_tensor,
        forward_step=forward_step,
        backward_step=backward_step,
    )


def account(config: dict, race: bool = False) -> dict:
    """Train with a ledger on this rank. race: plant a race."""
    ledger = Ledger()
    with ExitStack() as stack:
        for replacement in (*_tracked_exchanges(ledger), _checked_schedule(ledger)):
            stack.enter_context(replacement)
        if race:
            stack.enter_context(planted_race())
        run_once(config, after_schedule=ledger.check_empty)
    return {
        "count": ledger.count,
        "violations": ledger.violations,
        "sent": dict(ledger.sent),
        "received": dict(ledger.received),
    }
