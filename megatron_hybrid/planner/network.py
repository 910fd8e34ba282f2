"""Predict the time of collectives from where their ranks are.

Ranks are numbered tensor parallel first, then context, data, pipeline (distributed/process_groups.py). A group inside one
node communicates over NVLink. A group that spans nodes runs rings through the network, and each of its GPUs in a node has
its share of the bandwidth. A ring is as fast as its slowest link, and its latency adds up hop by hop.
"""

from dataclasses import dataclass

from megatron_hybrid.planner.hardware import Hardware
from megatron_hybrid.planner.plan import Plan
from megatron_hybrid.planner.work import hops, wire_bytes


@dataclass(frozen=True)
class Group:
    """Ranks that talk to one another."""

    ranks: int
    in_node: int
    """Of them, in each node."""

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.in_node)


def groups(plan: Plan, gpus_per_node: int) -> dict[str, Group]:
    """Tensor, context, data (with context) and pipeline parallel groups of a plan; of the last, two neighbours."""
    tp, cp, dp = plan.tp, plan.cp, plan.sharing
    neighbours_share = plan.world_size <= gpus_per_node
    return {
        "tp": Group(tp, min(tp, gpus_per_node)),
        "cp": Group(cp, max(1, min(cp, gpus_per_node // tp))),
        "dp": Group(dp, max(1, min(dp, gpus_per_node // tp))),
        "pp": Group(min(plan.pp, 2), min(plan.pp, 2) if neighbours_share else 1),
    }


def seconds(op: str, size: float, group: Group, hardware: Hardware) -> float:
    """Of one collective: all_reduce, all_gather, reduce_scatter of a whole tensor of `size` bytes, or p2p. An all-to-all puts as
    much on the wire as an all-gather of a tensor of the size that each rank has."""
    if group.ranks == 1:
        return 0.0
    wire, near = wire_bytes(op, group.ranks, size), hardware.node[op]
    time = wire / near.bytes_a_second
    if group.nodes == 1:
        return time + hops(op, group.ranks) * near.latency
    far = hardware.across[op]
    rounds = hops(op, group.ranks) / max(1, group.ranks - 1)
    latency = rounds * ((group.nodes - 1) * far.latency + (group.ranks - group.nodes) * near.latency)
    return max(time, wire / (group.in_node * far.bytes_a_second)) + latency


def assumptions(hardware: Hardware) -> list[str]:
    """What predictions beyond one node rest on, in words."""
    far = hardware.across["all_gather"]
    return [
        f"nodes of {hardware.gpus_per_node} GPUs, ranks placed tensor parallel first, then context, data, pipeline",
        f"between nodes {far.bytes_a_second / 1e9:.0f} GB/s a GPU and {far.latency * 1e6:.0f} us a hop (assumed unless the "
        "hardware file says otherwise); no congestion, no stragglers",
        "inside a node NVLink at the measured rate, whatever else runs at the same time",
        "context parallelism is predicted, not measured: all-to-alls at the rate of all-gathers, and the delta rule's second scans "
        "in proportion to its own",
        "pipeline transfers are waited for on both sides; tensor parallel collectives of the backward pass hide behind the "
        "products they can hide behind, those of the forward pass behind nothing (parallel.tp_comm_overlap is not predicted); "
        "gradient reduction and weight gathering hide behind a backward and a forward pass where they are overlapped",
        f"rates: {hardware.name}, {hardware.measured}",
    ]
